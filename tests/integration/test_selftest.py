"""`sev-host-agent selftest` on the software platform: an honest host passes, a dishonest one fails where it lies."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from common.errors import Reason, Unavailable
from common.sev.abi import PlatformState
from common.sev.certs.roots import named_root
from common.sev.measurement import FirmwareVersion
from common.sev.policy import GuestPolicy
from emulator.firmware_image import build_image, write_image
from host_agent import config
from host_agent.devices import open_device
from host_agent.doctor.findings import Finding
from host_agent.doctor.processor import look
from host_agent.doctor.this_machine import ThisMachine
from host_agent.hypervisors.base import GuestDefinition
from host_agent.hypervisors.qemu import QemuHypervisor
from host_agent.selftest.steps import Selftest, Subject
from tests.support.agent_site import REPOSITORY, Site, agent_site
from tests.support.eventually import until
from tests.support.kvm import needs_kvm
from tests.support.pki import Pki
from tests.support.platform import SEVATTEST, Platform, give_chip, running_platform
from tests.support.qmp import running_machine
from tests.support.real_qemu import EACH_QEMU, qemu, small_kernel
from tests.support.sev_host import make_host, wait_for_no_guest
from tests.support.stages import short_folder
from tests.support.under import run_words

__all__ = ["qemu"]  # a fixture
pytestmark = pytest.mark.slow

AGENT = (sys.executable, "-c", "import sys; from host_agent.cli import main; sys.exit(main())")
STEPS = [
    "platform.answers",
    "chain.exported",
    "chain.links",
    "chain.root",
    "pdh.stable",
    "guest.files",
    "session.made",
    "guest.started",
    "guest.sev_state",
    "measurement.read",
    "measurement.matches",
    "secret.tampered",
    "secret.injected",
    "report.verified",
    "pdh.unchanged",
    "guest.paused",
    "guest.ended",
]
# Between the agent and the machine's program: does to its words what the test says, and becomes it.
DISHONEST = """\
import os, subprocess, sys
words = sys.argv[2:]
def put(option, value): words[words.index(option) + 1] = value
def swap(old, new):
    assert any(old in word for word in words), (old, words)
    words[:] = [word.replace(old, new) for word in words]
exec(sys.argv[1])
os.execv(words[0], words)
"""


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    with running_platform(tmp_path_factory.mktemp("p")) as running:
        yield running


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture
def site(platform: Platform, pki: Pki) -> Iterator[Site]:
    with agent_site(platform, pki) as made:
        yield made


def selftest(site: Site, *words: object) -> tuple[int, dict[str, str], str]:
    """Exit code, verdict by step in their order, and everything that was printed."""
    site.write_config()
    return run_selftest([*AGENT, "selftest", "--config", str(site.config), *map(str, words)])


def run_selftest(command: list[str]) -> tuple[int, dict[str, str], str]:
    """The same of a command."""
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
        cwd=REPOSITORY,
    )
    assert done.stderr == ""
    lines = re.findall(r"^(PASS|FAIL|SKIP) ([a-z_.]+): .+$", done.stdout, re.MULTILINE)
    return done.returncode, {name: verdict for verdict, name in lines}, done.stdout


def rooted(site: Site) -> list[object]:
    """The words that name the platform's root and its signed CEK."""
    return ["--kds", site.platform.kds, "--ca", site.platform.ask_ark]


def assert_nothing_is_left(site: Site) -> None:
    assert site.machines() == []
    assert [*(site.root / "state").glob("selftest-*")] == []
    shown = subprocess.run(
        [*SEVATTEST, "show", "guests", "--device", str(site.platform.socket)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert shown.stdout == "0\n"


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


# --------------------------------------------------------------------------------------------------- dishonest hosts

OTHER_FIRMWARE = "swap('OVMF.amdsev.fd', 'other.fd')"
ROTATED = f"subprocess.run({[*SEVATTEST]!r} + ['rotate', '--device', DEVICE], check=True)"
SESSION = (
    "file = next(w for w in words if 'session-file=' in w).split('session-file=')[1].split(',')[0];"
    "old = open(file).read(); open(file, 'w').write(('A' if old[30] != 'A' else 'B').join((old[:30], old[31:])))"
)
NO_SESSION = "import re; words[:] = [re.sub(',(dh-cert|session)-file=[^,]*', '', word) for word in words]"
TWINS = {
    "another firmware": (OTHER_FIRMWARE, "measurement.matches", "matches nothing on file"),
    "another kernel": ("put('-kernel', words[words.index('-initrd') + 1])", "measurement.matches", ""),
    "another command line": ("put('-append', 'console=ttyS0 init=/bin/sh')", "measurement.matches", ""),
    "one vCPU more": ("put('-smp', '3')", "measurement.matches", "vCPU count 3 instead of 2"),
    "another CPU type": ("put('-cpu', 'EPYC-Rome')", "measurement.matches", "CPU type"),
    "no kernel hashes": ("swap(',kernel-hashes=on', '')", "measurement.matches", "kernel hashes"),
    "a session with one letter changed": (SESSION, "guest.started", "BAD_MEASUREMENT"),
    "no session": (NO_SESSION, "measurement.matches", "all-zero TIK"),
    "a guest that is not paused": ("words.remove('-S')", "guest.sev_state", "not paused"),
    "a PDH that is rotated before the start": (ROTATED, "guest.started", "BAD_MEASUREMENT"),
    "a machine that dies": ("words[:] = ['/bin/false']", "guest.started", "died"),
}


@pytest.mark.parametrize("twin", TWINS)
def test_a_dishonest_host_fails_at_the_line_that_shows_it(site: Site, platform: Platform, twin: str) -> None:
    edit, step, words = TWINS[twin]
    write_image(site.root / "other.fd", "two")
    script = site.root / "dishonest.py"
    script.write_text(DISHONEST.replace("exec(", f"DEVICE = {str(platform.socket)!r}\nexec(", 1))
    site.program = [sys.executable, str(script), edit, *site.program]
    code, found, out = selftest(site, *rooted(site))
    assert code == 1
    before = STEPS[: STEPS.index(step)]
    assert found == {**dict.fromkeys(before, "PASS"), step: "FAIL", "guest.ended": "PASS"}, out
    line = next(line for line in out.splitlines() if line.startswith("FAIL "))
    assert words in line
    assert_nothing_is_left(site)


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


# A machine that never greets; the stubborn one does not end on SIGTERM, so that its end takes a while.
WAITING = "import time; time.sleep(3600)"
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); "


@contextmanager
def waiting_selftest(site: Site, program: str = WAITING, *before: str) -> Iterator[subprocess.Popen[str]]:
    """A selftest whose machine runs `program` and does not answer."""
    site.program = [sys.executable, "-c", program]
    site.write_config()
    command = [*before, *AGENT, "selftest", "--config", str(site.config)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            asyncio.run(until(lambda: any(b"3600" in _command_line(pid) for pid in site.machines())))
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
def test_a_signal_ends_the_guest_first(site: Site, number: signal.Signals) -> None:
    with waiting_selftest(site) as process:
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "Traceback" not in errors
    assert_nothing_is_left(site)


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
def test_further_signals_do_not_keep_the_guest_from_being_ended(site: Site, second: signal.Signals) -> None:
    site.qemu["stop_timeout"] = 1.5
    with waiting_selftest(site, STUBBORN + WAITING) as process:
        log = site.root / "state"
        asyncio.run(until(lambda: any(b"deaf" in path.read_bytes() for path in log.glob("selftest-*/machine.log"))))
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):  # the machine is deaf, so its end is under way for so long
            process.wait(timeout=0.5)
        assert process.poll() is None
        process.send_signal(second)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in errors
    assert_nothing_is_left(site)


def test_a_terminal_that_hangs_up_ends_the_guest_first(site: Site) -> None:
    site.program = [sys.executable, "-c", WAITING]
    site.write_config()
    ours, theirs = os.openpty()
    command = ["setsid", "--ctty", "--wait", *AGENT, "selftest", "--config", str(site.config)]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        try:
            os.close(theirs)
            asyncio.run(until(lambda: any(b"3600" in _command_line(pid) for pid in site.machines())))
            os.close(ours)
            process.wait(timeout=60)
        finally:
            process.kill()
    asyncio.run(until(lambda: not site.machines() and not [*(site.root / "state").glob("selftest-*")]))
    assert_nothing_is_left(site)


def test_a_signal_that_was_ignored_before_stays_ignored(site: Site) -> None:
    with waiting_selftest(site, WAITING, "nohup") as process:
        process.send_signal(signal.SIGHUP)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert_nothing_is_left(site)


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


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


# ------------------------------------------------------------------------------------------ lies that need a monitor


class Lying:
    """A machine or a device as another one is, save for what the test says."""

    def __init__(self, honest: Any, **lies: Any) -> None:
        self._honest = honest
        self.__dict__.update(lies)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._honest, name)


class LyingHypervisor(QemuHypervisor):
    """Starts machines that lie."""

    twist: Callable[[Any], Any]

    async def create(self, order: Any) -> Any:
        return type(self).twist(await super().create(order))


def run_in_process(
    site: Site, twist: Callable[[Any], Any], *, device: Callable[[Any], Any] = lambda honest: honest
) -> dict[str, str]:
    """The verdicts, with the machine and the device as the test makes them."""
    site.write_config()
    loaded = config.load(site.config, {})
    definition = loaded.definitions()["web"]
    assert isinstance(definition, GuestDefinition)
    hypervisor = type("Twisted", (LyingHypervisor,), {"twist": staticmethod(twist)})
    found: dict[str, str] = {}

    def tell(finding: Finding) -> None:
        found[finding.probe] = str(finding.outcome)

    subject = Subject(
        device=device(open_device("socket", site.platform.socket, timeout=10)),
        hypervisor=hypervisor({"web": definition}, loaded.qemu_settings()),
        guest="web",
        definition=definition,
        state_dir=loaded.state_dir,
        policy=GuestPolicy.parse(0xF),
        host_cpu=None,
        key_service=None,
        roots=(named_root(site.platform.ask_ark.read_bytes()),),
        resume=False,
    )
    good = asyncio.run(Selftest(subject, tell).run())
    assert good == ("FAIL" not in found.values())
    return found


def first_failure(found: dict[str, str]) -> str | None:
    return next((name for name, verdict in found.items() if verdict == "FAIL"), None)


def test_a_machine_that_tells_the_truth_passes(site: Site) -> None:
    assert first_failure(run_in_process(site, lambda honest: honest)) is None


def test_a_machine_that_takes_every_packet_is_found_out(site: Site) -> None:
    async def inject(_header: bytes, _payload: bytes) -> None:
        """As a host would that hands nothing to the firmware."""

    assert first_failure(run_in_process(site, lambda honest: Lying(honest, inject=inject))) == "secret.tampered"


def test_a_measurement_of_an_earlier_launch_is_found_out(site: Site) -> None:
    blobs: list[bytes] = []

    def twist(honest: Any) -> Any:
        async def measurement() -> bytes:
            blobs.append(await honest.measurement())
            return blobs[0]

        return Lying(honest, measurement=measurement)

    assert first_failure(run_in_process(site, twist)) is None
    assert first_failure(run_in_process(site, twist)) == "measurement.matches"


def test_a_report_over_another_nonce_is_found_out(site: Site) -> None:
    def twist(honest: Any) -> Any:
        async def report(_nonce: bytes) -> bytes:
            data: bytes = await honest.report(bytes(16))
            return data

        return Lying(honest, report=report)

    assert first_failure(run_in_process(site, twist)) == "report.verified"


def test_a_report_that_was_altered_is_found_out(site: Site) -> None:
    def twist(honest: Any) -> Any:
        async def report(nonce: bytes) -> bytes:
            data: bytes = await honest.report(nonce)
            return data[:0x10] + bytes(32) + data[0x30:]

        return Lying(honest, report=report)

    assert first_failure(run_in_process(site, twist)) == "report.verified"


def test_a_guest_that_was_let_run_is_found_out(site: Site) -> None:
    def twist(honest: Any) -> Any:
        async def report(nonce: bytes) -> bytes:
            data: bytes = await honest.report(nonce)
            await honest.resume()
            return data

        return Lying(honest, report=report)

    assert first_failure(run_in_process(site, twist)) == "guest.paused"


def test_a_pdh_that_is_rotated_meanwhile_is_found_out(site: Site) -> None:
    def twist(honest: Any) -> Any:
        async def report(nonce: bytes) -> bytes:
            data: bytes = await honest.report(nonce)
            rotate = [*SEVATTEST, "rotate", "--device", str(site.platform.socket)]
            await asyncio.to_thread(subprocess.run, rotate, check=True, timeout=60)
            return data

        return Lying(honest, report=report)

    assert first_failure(run_in_process(site, twist)) == "pdh.unchanged"


def test_a_machine_that_does_not_end_is_found_out(site: Site) -> None:
    def twist(honest: Any) -> Any:
        async def end() -> None:
            await honest.end()
            raise Unavailable(Reason.PLATFORM_UNAVAILABLE, "the machine was killed, and its process does not end")

        return Lying(honest, end=end)

    assert first_failure(run_in_process(site, twist)) == "guest.ended"


def test_what_a_device_does_not_tell_is_skipped_and_no_failure(site: Site) -> None:
    def device(honest: Any) -> Any:
        async def status() -> Any:
            unknown = dict.fromkeys(("firmware", "externally_owned", "es_enabled", "guest_count"))
            return type(told := await honest.status())(**{**vars(told), **unknown})

        return Lying(honest, status=status)

    found = run_in_process(site, lambda honest: honest, device=device)
    assert found.pop("guest.ended") == "SKIP"
    assert found.pop("chain.root") == "SKIP"  # no key service is named
    assert set(found.values()) == {"PASS"}
    assert_nothing_is_left(site)


def test_a_monitor_that_names_another_firmware_is_found_out(site: Site) -> None:
    def device(honest: Any) -> Any:
        async def status() -> Any:
            told = await honest.status()
            assert told.state in set(PlatformState)
            return type(told)(**{**vars(told), "firmware": FirmwareVersion(1, 55, 99)})

        return Lying(honest, status=status)

    assert first_failure(run_in_process(site, lambda honest: honest, device=device)) == "guest.sev_state"


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


# ------------------------------------------------------------------------------------------------------- a real QEMU


@EACH_QEMU
@pytest.mark.parametrize("kind", ["es", "sev"])
def test_a_real_qemu_behind_the_front_passes(site: Site, platform: Platform, qemu: str, kind: str) -> None:
    site.kernel.write_bytes(small_kernel())
    site.program = platform.front(qemu, "--vmsa", "init2")
    code, found, out = selftest(site, "--for", kind, *rooted(site))
    assert (code, list(found), set(found.values())) == (0, STEPS, {"PASS"}), out
    assert ("VMSA init2\n" in out) == (kind == "es")
    assert_nothing_is_left(site)


def dishonest_qemu(site: Site, option: str, value: str, program: list[str]) -> list[str]:
    """The program, with one of its options changed on the way."""
    script = site.root / "dishonest.py"
    script.write_text(DISHONEST)
    return [sys.executable, str(script), f"put({option!r}, {value!r})", *program]


@pytest.mark.parametrize(("option", "value"), [("-smp", "3"), ("-append", "quiet")])
def test_a_real_qemu_with_other_words_fails(site: Site, platform: Platform, qemu: str, option: str, value: str) -> None:
    site.kernel.write_bytes(small_kernel())
    site.program = dishonest_qemu(site, option, value, platform.front(qemu))
    code, found, out = selftest(site, *rooted(site))
    assert (code, first_failure(found)) == (1, "measurement.matches"), out
    assert_nothing_is_left(site)


# ------------------------------------------------------------------------------- the whole path that a real host has


def under(site: Site, *words: str) -> tuple[int, dict[str, str], str]:
    """The selftest with the driver of /dev/sev, under `platform run`."""
    site.use_dev_sev()
    site.qemu["cbitpos"] = look(ThisMachine()).c_bit or 0
    site.write_config()
    return run_selftest(run_words(site.platform, *AGENT, "selftest", "--config", str(site.config), *words))


@needs_kvm
@EACH_QEMU
@pytest.mark.parametrize("kind", ["es", "sev"])
def test_the_ioctl_driver_and_an_unmodified_qemu_on_kvm_pass(site: Site, qemu: str, kind: str) -> None:
    site.kernel.write_bytes(small_kernel())
    site.program = [qemu, "-accel", "kvm"]
    code, found, out = under(site, "--for", kind, *map(str, rooted(site)))
    assert (code, list(found), set(found.values())) == (0, STEPS, {"PASS"}), out
    assert_nothing_is_left(site)


@needs_kvm
def test_the_pages_lines_for_a_host_without_hardware_work_as_they_stand(qemu: str, tmp_path: Path) -> None:
    page = (REPOSITORY / "docs" / "selftest.md").read_text(encoding="utf-8")
    lines = page.partition("## Without hardware")[2].partition("```sh\n")[2].partition("```")[0]
    assert "cbitpos = 0," in lines
    lines = lines.replace("cbitpos = 0,", f"cbitpos = {look(ThisMachine()).c_bit or 0},")
    give_chip(tmp_path / "p", "milan")  # made once a run of the tests
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, module in (("sevattest", "orchestrator.cli"), ("sev-host-agent", "host_agent.cli")):
        call = f"import sys; sys.path.insert(0, {str(REPOSITORY)!r}); from {module} import main; sys.exit(main())"
        (commands / name).write_text(f'#!/bin/sh\nexec {sys.executable} -c {shlex.quote(call)} "$@"\n')
        (commands / name).chmod(0o755)
    environ = {**os.environ, "PATH": f"{commands}:{Path(str(shutil.which(qemu))).parent}:{os.environ['PATH']}"}
    with subprocess.Popen(
        ["bash", "-e", "-c", lines],
        cwd=tmp_path,
        env=environ,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as shell:
        try:
            out, _ = shell.communicate(timeout=100)
        finally:
            with suppress(ProcessLookupError):  # where the lines stop early, the platform is still served
                os.killpg(shell.pid, signal.SIGKILL)
    found = re.findall(r"^(PASS|FAIL|SKIP) ([a-z_.]+): ", out, re.MULTILINE)
    assert (shell.returncode, found) == (0, [("PASS", step) for step in STEPS]), out


@needs_kvm
def test_an_unmodified_qemu_on_kvm_with_one_vcpu_more_fails(site: Site, qemu: str) -> None:
    site.kernel.write_bytes(small_kernel())
    site.program = dishonest_qemu(site, "-smp", "3", [str(shutil.which(qemu)), "-accel", "kvm"])
    code, found, out = under(site)
    assert (code, first_failure(found)) == (1, "measurement.matches"), out
    assert "vCPU count 3 instead of 2" in out
    assert_nothing_is_left(site)
