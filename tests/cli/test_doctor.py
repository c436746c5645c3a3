"""`sev-host-agent doctor` as a person runs it: lines, exit codes, JSON, and that it changes nothing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from emulator.firmware_image import build_image
from host_agent.cli import main
from tests.support.agent_site import Site, agent_site
from tests.support.hosts import HOSTS
from tests.support.pki import Pki
from tests.support.platform import SEVATTEST, running_platform
from tests.support.qmp import running_machine
from tests.support.sev_host import make_host
from tests.support.stages import short_folder

LINE = re.compile(r"(PASS|WARN|FAIL|SKIP) ([\w.-]+): .*[^.\n]\n")
ADVICE = re.compile(r" {5}advice: .*[^.\n]\n")


def doctor(*words: object) -> int:
    return main(["doctor", *map(str, words)])


def verdicts(out: str) -> dict[str, str]:
    return {name: verdict for verdict, name in LINE.findall(out)}


def test_a_host_that_is_ready_ends_with_zero(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor("--root", HOSTS / "rome-sev-es") == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.endswith("nothing stops a launch: 19 PASS, 0 WARN, 0 FAIL, 1 SKIP\n")


def test_a_host_that_is_not_ends_with_one_and_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor("--root", HOSTS / "rome-asid-limit-1") == 1
    out = capsys.readouterr().out
    assert (
        "FAIL cpu.asids: 0 for SEV-ES guests, 509 for SEV guests\n"
        "     advice: raise the BIOS's `SEV-ES ASID Space Limit` from 1 "
        "to the number of SEV-ES guests wanted plus one\n"
    ) in out
    assert out.splitlines()[-1].startswith("guests cannot be launched: ")


def test_the_same_host_is_good_for_guests_without_sev_es(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor("--for", "sev", "--root", HOSTS / "rome-asid-limit-1") == 0
    assert verdicts(capsys.readouterr().out)["cpu.asids"] == "WARN"


@pytest.mark.parametrize("name", sorted(folder.name for folder in HOSTS.iterdir() if folder.is_dir()))
def test_every_line_has_its_form(capsys: pytest.CaptureFixture[str], name: str) -> None:
    doctor("--root", HOSTS / name)
    *lines, _ = capsys.readouterr().out.splitlines(keepends=True)
    assert [line for line in lines if not LINE.fullmatch(line) and not ADVICE.fullmatch(line)] == []


def test_for_programs_it_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor("--json", "--root", HOSTS / "intel") == 1
    told = json.loads(capsys.readouterr().out)
    assert told["ready"] is False
    assert told["findings"][0] == {
        "probe": "cpu.vendor",
        "outcome": "FAIL",
        "seen": "GenuineIntel",
        "advice": "SEV exists on AMD EPYC processors only",
    }
    assert doctor("--json", "--root", HOSTS / "rome-sev-es") == 0
    assert json.loads(capsys.readouterr().out)["ready"] is True


def test_this_machine_is_looked_at_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor() in {0, 1}
    out, err = capsys.readouterr()
    assert err == ""
    assert {"cpu.vendor", "kvm.device", "device.present", "firmware.answers"} <= set(verdicts(out))


def test_on_a_software_platform_only_the_hardware_is_left_out(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--kds", site.platform.kds, "--ca", site.platform.ask_ark]
    assert doctor("--config", site.config, *words) == 0
    found = verdicts(capsys.readouterr().out)
    assert (found["cpu"], found["kernel"]) == ("SKIP", "SKIP")
    assert {name for name, verdict in found.items() if verdict in {"SKIP", "WARN"}} <= {
        "cpu",
        "kernel",
        "qemu.web.version",  # the stand-in machine is none
        "clock.sane",
        "state_dir.local",
        "agent.unit",  # a test runs in no service
    }
    assert found["cek.obtainable"] == "PASS"


def ask_a_qemu(site: Site, monitor: Path) -> None:
    """Configure the driver `qmp`."""
    text = site.config.read_text()
    by_socket = f'driver = "socket"\npath = "{site.platform.socket}"'
    assert by_socket in text
    site.config.write_text(text.replace(by_socket, f'driver = "qmp"\npath = "{monitor}"\ntimeout = 20'))


@pytest.mark.slow
def test_a_platform_that_a_qemu_tells_of_is_looked_at_as_far_as_it_tells(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    with short_folder() as folder:
        host = make_host(folder, site.platform)
        ask_a_qemu(site, host.qmp)
        with running_machine(host.words(), host.qmp):
            doctor("--config", site.config, "--kds", site.platform.kds, "--ca", site.platform.ask_ark)
    found = verdicts(capsys.readouterr().out)
    answers = ("agent.config", "firmware.answers", "firmware.api", "firmware.es", "pdh.stable", "cek.obtainable")
    assert {name: found[name] for name in answers} == dict.fromkeys(answers, "PASS") | {"firmware.es": "SKIP"}


def test_a_qemu_that_is_not_there_fails(site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ask_a_qemu(site, tmp_path / "none")
    assert doctor("--config", site.config) == 1
    found = verdicts(capsys.readouterr().out)
    assert (found["agent.config"], found["firmware.answers"]) == ("PASS", "FAIL")


def test_another_platforms_root_is_noticed(site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with running_platform(tmp_path / "other", "rome") as other:
        assert doctor("--config", site.config, "--kds", site.platform.kds, "--ca", other.ask_ark) == 1
    assert verdicts(capsys.readouterr().out)["cek.obtainable"] == "FAIL"


def test_a_platform_that_is_not_there_fails(site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    site.config.write_text(site.config.read_text().replace(str(site.platform.socket), str(tmp_path / "none")))
    assert doctor("--config", site.config) == 1
    assert verdicts(capsys.readouterr().out)["firmware.answers"] == "FAIL"


def test_an_ordinary_firmware_is_found_in_a_guests_definition(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.firmware.write_bytes(build_image("plain", secret_area=(0, 0), hashes_area=(0, 0)))
    assert doctor("--config", site.config) == 1
    found = verdicts(capsys.readouterr().out)
    assert (found["guest.web.secret_area"], found["guest.web.hashes_area"]) == ("FAIL", "FAIL")


def test_what_the_agent_refuses_in_a_definition_is_named_and_the_rest_is_looked_at(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    nvram = '"-drive", "if=pflash,format=raw,unit=1,file=/var/vars.fd", "-machine", "q35"'
    site.config.write_text(site.config.read_text().replace('"-machine", "q35"', nvram))
    assert doctor("--config", site.config) == 1
    found = verdicts(capsys.readouterr().out)
    assert (found["agent.config"], found["guest.web.nvram"]) == ("FAIL", "FAIL")
    assert found["firmware.answers"] == "PASS"


@pytest.mark.parametrize("text", ["", "listen = 5\n", "not toml", None])
def test_a_configuration_that_is_none_is_a_finding(
    tmp_path: Path, text: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "agent.toml"
    if text is not None:
        path.write_text(text)
    assert doctor("--config", path, "--root", HOSTS / "rome-sev-es") == 1
    found = verdicts(capsys.readouterr().out)
    assert (found["agent.config"], found["cpu.vendor"]) == ("FAIL", "PASS")


@pytest.mark.parametrize(
    "words", [["--root", "/nowhere"], ["--kds", "ftp://x"], ["--ca", "/nowhere"], ["--for", "snp"]]
)
def test_words_that_cannot_be_used_end_with_two(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor(*words) == 2
    assert capsys.readouterr().err.startswith("sev-host-agent: ")


def test_nothing_is_changed_and_the_device_is_only_read(pki: Pki, tmp_path: Path) -> None:
    state = tmp_path / "p"
    with running_platform(state) as first, agent_site(first, pki) as site:
        site.write_config()
    # Once more, with a line for each command.
    words = [*SEVATTEST, "platform", "serve", "--state", str(state), "--trace"]
    with (
        (tmp_path / "trace").open("w") as trace,
        subprocess.Popen(words, stdout=subprocess.PIPE, stderr=trace) as served,
    ):
        assert served.stdout is not None
        served.stdout.readline()
        with agent_site(first, pki) as site:
            site.write_config()
            before = {path: path.stat().st_mtime_ns for path in [site.root, *site.root.rglob("*")]}
            command = [sys.executable, "-c", "import sys; from host_agent.cli import main; sys.exit(main())"]
            command += ["doctor", "--config", str(site.config), "--kds", str(first.kds), "--ca", str(first.ask_ark)]
            done = subprocess.run(command, capture_output=True, check=False, timeout=60)
            assert {path: path.stat().st_mtime_ns for path in [site.root, *site.root.rglob("*")]} == before
        served.terminate()
        served.wait(60)
    assert done.returncode == 0
    asked = set(re.findall(r"\b[A-Z]+(?:_[A-Z0-9]+)+\b", (tmp_path / "trace").read_text()))
    assert asked == {"PLATFORM_STATUS", "PDH_CERT_EXPORT", "GET_ID2"}
