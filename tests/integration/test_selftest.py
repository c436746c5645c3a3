"""`sev-host-agent selftest` on the software platform: an honest host passes; what cannot be tested is said."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from emulator.firmware_image import build_image
from tests.support.agent_site import REPOSITORY, Site
from tests.support.platform import Platform, running_platform
from tests.support.qmp import running_machine
from tests.support.selftest import AGENT, STEPS, assert_nothing_is_left, rooted, run_selftest, selftest
from tests.support.sev_host import make_host, wait_for_no_guest
from tests.support.stages import short_folder

pytestmark = pytest.mark.slow


def test_an_honest_host_passes_every_line(site: Site) -> None:
    code, found, out = selftest(site, *rooted(site))
    assert (code, list(found), set(found.values())) == (0, STEPS, {"PASS"})
    assert "VMSA legacy" in out
    assert out.endswith("the selftest passed\n")
    # The guest was never resumed, so it has read nothing.
    assert site.read_by_guest == []
    assert_nothing_is_left(site)


def test_a_guest_without_sev_es_passes_too(site: Site) -> None:
    code, found, out = selftest(site, "--for", "sev", *rooted(site))
    assert (code, list(found), set(found.values())) == (0, STEPS, {"PASS"})
    assert "PASS measurement.matches: SEV with kernel hashes; vCPUs and CPU type are not measured" in out


def test_every_line_is_on_the_page() -> None:
    page = (REPOSITORY / "docs" / "selftest.md").read_text(encoding="utf-8")
    assert [step for step in [*STEPS, "guest.resumed"] if f"`{step}`" not in page] == []


@pytest.mark.parametrize("flavour", ["legacy+debug-swap", "init2", "init2+debug-swap", "init2-ap-zero"])
def test_the_line_says_which_save_areas_the_host_makes(site: Site, platform: Platform, flavour: str) -> None:
    site.program = platform.machine("--vmsa", flavour)
    code, _, out = selftest(site)
    assert code == 0
    assert f"PASS measurement.matches: SEV-ES with kernel hashes, 2 vCPUs EPYC-Milan (25-1-1), VMSA {flavour}\n" in out


def test_with_resume_the_guest_runs_and_reads_what_it_was_given(site: Site) -> None:
    code, found, _ = selftest(site, "--resume")
    assert code == 0
    assert list(found)[-2:] == ["guest.resumed", "guest.ended"]
    assert any("5e1f7e57-0000-4000-8000-000000000001" in line for line in site.read_by_guest)
    assert_nothing_is_left(site)


def test_without_a_key_service_the_root_is_skipped(site: Site) -> None:
    code, found, _ = selftest(site)
    assert (code, found["chain.root"], found["chain.links"]) == (0, "SKIP", "PASS")


def test_a_line_is_an_object_for_programs(site: Site) -> None:
    site.write_config()
    done = subprocess.run(
        [*AGENT, "selftest", "--json", "--config", str(site.config)], capture_output=True, check=False, timeout=100
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["probe"] for line in lines] == STEPS
    assert done.returncode == 0


def test_the_platform_may_be_asked_by_way_of_a_qemu(site: Site) -> None:
    with short_folder() as folder:
        host = make_host(folder, site.platform)
        with running_machine(host.words(), host.qmp):
            site.write_config()
            by_socket = f'driver = "socket"\npath = "{site.platform.socket}"'
            text = site.config.read_text()
            assert by_socket in text
            site.config.write_text(text.replace(by_socket, f'driver = "qmp"\npath = "{host.qmp}"\ntimeout = 20'))
            words = ["selftest", "--config", str(site.config), *map(str, rooted(site))]
            code, found, out = run_selftest([*AGENT, *words])
    assert (code, list(found)) == (0, STEPS), out
    assert {step: verdict for step, verdict in found.items() if verdict != "PASS"} == {"guest.ended": "SKIP"}
    wait_for_no_guest(site.platform)
    assert_nothing_is_left(site)


@pytest.mark.parametrize(("words", "sentence"), [(["--guest", "db"], "there is no guest 'db'"), ([], "missing key")])
def test_what_cannot_be_used_is_said_and_nothing_is_done(site: Site, words: list[str], sentence: str) -> None:
    site.write_config()
    if not words:
        site.config.write_text('listen = "127.0.0.1:0"\n')
    done = subprocess.run(
        [*AGENT, "selftest", "--config", str(site.config), *words], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert sentence in done.stderr


def test_another_root_fails(site: Site, tmp_path: Path) -> None:
    with running_platform(tmp_path / "other", "rome") as other:
        code, found, _ = selftest(site, "--kds", site.platform.kds, "--ca", other.ask_ark)
    assert (code, list(found)[-1], found["chain.root"]) == (1, "chain.root", "FAIL")


def test_a_firmware_without_room_for_secrets_fails_before_anything_is_started(site: Site) -> None:
    site.firmware.write_bytes(build_image("plain", secret_area=(0, 0)))
    code, found, out = selftest(site)
    assert (code, list(found)[-1], found["guest.files"]) == (1, "guest.files", "FAIL")
    assert "AmdSev" in out


def test_a_platform_that_is_not_there_fails(site: Site, tmp_path: Path) -> None:
    site.platform = Platform(state=tmp_path, generation="milan")
    code, found, _ = selftest(site)
    assert (code, found) == (1, {"platform.answers": "FAIL"})
