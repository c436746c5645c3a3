"""`sev-host-agent selftest` on hosts that lie: it fails at the line that shows the lie."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from common.errors import Reason, Unavailable
from common.sev.abi import PlatformState
from common.sev.certs.roots import named_root
from common.sev.measurement import FirmwareVersion
from common.sev.policy import GuestPolicy
from emulator.firmware_image import write_image
from host_agent import config
from host_agent.devices import open_device
from host_agent.doctor.findings import Finding
from host_agent.hypervisors.base import GuestDefinition
from host_agent.hypervisors.qemu import QemuHypervisor
from host_agent.selftest.steps import Selftest, Subject
from tests.support.agent_site import Site
from tests.support.platform import SEVATTEST
from tests.support.selftest import STEPS, assert_nothing_is_left, dishonest, first_failure, rooted, selftest

pytestmark = pytest.mark.slow

# ------------------------------------------------------------------------------------------- lies on the command line

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
def test_a_dishonest_host_fails_at_the_line_that_shows_it(site: Site, twin: str) -> None:
    edit, step, words = TWINS[twin]
    write_image(site.root / "other.fd", "two")
    site.program = dishonest(site, edit, site.program)
    code, found, out = selftest(site, *rooted(site))
    assert code == 1
    before = STEPS[: STEPS.index(step)]
    assert found == {**dict.fromkeys(before, "PASS"), step: "FAIL", "guest.ended": "PASS"}, out
    line = next(line for line in out.splitlines() if line.startswith("FAIL "))
    assert words in line
    assert_nothing_is_left(site)


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
