"""The agent's parts put together in the test's own process, over a fake device and the fake QEMU."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from common.errors import Reason, SevattestError
from common.sev.abi import PEK_OCA_CEK_SIZE, Algo, PlatformState, Usage
from common.sev.certs.sev import SevCertificate, encode
from common.sev.measurement import FirmwareVersion
from common.telemetry.prometheus import PrometheusMeter
from host_agent.devices import PlatformStatus
from host_agent.hypervisors.base import GuestDefinition, Hypervisor
from host_agent.hypervisors.monitored import QemuSettings
from host_agent.hypervisors.qemu import QemuHypervisor
from host_agent.launches import custody
from host_agent.launches.custody import Custody
from host_agent.launches.launch import Launch
from host_agent.launches.ledger import Ledger
from host_agent.launches.runner import Runner, StartRequest
from host_agent.launches.state import LaunchState
from host_agent.launches.supervisor import Limits, Supervisor
from host_agent.store.folders import LaunchFolders
from tests.support import fake_qemu
from tests.support.firmware import amdsev_image
from tests.support.recording_log import RecordingLog
from tests.support.rpc import SettableClock

ALICE = "spiffe://datacenter.example/orchestrator/alice"
BOB = "spiffe://datacenter.example/orchestrator/bob"
POLICY = 0x0F
HEADER = bytes(range(200, 252))
PAYLOAD = bytes(range(100, 164))


def dh_certificate() -> SevCertificate:
    """A certificate for Diffie-Hellman with a fresh key, unsigned."""
    return encode(
        usage=Usage.PDH, algo=Algo.ECDH_SHA256, public_key=ec.generate_private_key(ec.SECP384R1()).public_key()
    )


@dataclass
class FakeDevice:
    """A platform that exports what it is told, or fails as it is told.

    Attributes:
        pdh: its current PDH.
        errors: raised one after the other, one a call.
    """

    pdh: SevCertificate = field(default_factory=dh_certificate)
    errors: list[SevattestError] = field(default_factory=list)
    exports: int = 0

    async def status(self) -> PlatformStatus:
        self._fail()
        return PlatformStatus(
            firmware=FirmwareVersion(1, 55, 24),
            state=PlatformState.WORKING,
            externally_owned=False,
            es_enabled=True,
            guest_count=1,
        )

    async def export_chain(self) -> bytes:
        self._fail()
        self.exports += 1
        return self.pdh.raw + bytes(PEK_OCA_CEK_SIZE)

    async def chip_id(self) -> bytes:
        self._fail()
        return bytes(range(64))

    def _fail(self) -> None:
        if self.errors:
            raise self.errors.pop(0)


@dataclass
class Script:
    """What the fake QEMU is to do, and what it has noted."""

    path: Path

    def __post_init__(self) -> None:
        if not self.path.exists():
            self.set()

    def set(self, **keys: Any) -> None:
        """Replace the script; at once, so that a running program never reads half of it."""
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(keys))
        new.replace(self.path)

    @property
    def journal(self) -> list[dict[str, Any]]:
        """Everything that arrived, over all runs of the program."""
        journal = self.path.with_suffix(".journal")
        if not journal.exists():
            return []
        whole, _, _ = journal.read_text().rpartition("\n")  # the last line may be half written
        return [json.loads(line) for line in whole.splitlines()]

    def commands(self, name: str) -> list[dict[str, Any]]:
        """The arguments of each `name` that arrived."""
        return [entry.get("arguments", {}) for entry in self.journal if entry.get("execute") == name]

    @property
    def started(self) -> list[dict[str, Any]]:
        """What each run of the program was started with."""
        return [entry for entry in self.journal if "argv" in entry]


QUICK = QemuSettings(cbitpos=51, reduced_phys_bits=1, start_timeout=20, command_timeout=20, stop_timeout=5)


def change(settings: QemuSettings, **seconds: float) -> None:
    """Change the limits of an agent that runs: those for what is honest are too long for what is not."""
    for name, limit in seconds.items():
        object.__setattr__(settings, name, limit)


LIMITS = Limits(
    lifetime=timedelta(minutes=15),
    check_interval=timedelta(seconds=5),
    silent_checks=3,
    retain_age=timedelta(days=30),
    retain_count=1000,
)


class Rig:
    """One run of an agent; another on the same folder is the agent restarted.

    Attributes:
        passed: the points that steps have passed.
    """

    def __init__(
        self,
        folder: Path,
        *,
        settings: QemuSettings = QUICK,
        limits: Limits = LIMITS,
        device: Any = None,
        clock: SettableClock | None = None,
        hypervisor: Hypervisor | None = None,
    ) -> None:
        self.folder = folder
        self.script = Script(folder / "script.json")
        self.firmware = folder / "OVMF.fd"
        self.firmware.write_bytes(amdsev_image())
        self.device = device or FakeDevice()
        self.clock = clock or SettableClock()
        self.log = RecordingLog()
        self.passed: list[str] = []
        program = (sys.executable, "-ISE", fake_qemu.__file__, str(self.script.path))
        args = ("-machine", "q35", "-m", "256M", "-kernel", "/boot/vmlinuz")
        guests = {
            name: GuestDefinition(program=program, firmware=self.firmware, args=args) for name in ("web", "db", "cache")
        }
        self._settings = replace(settings)
        self.hypervisor = hypervisor or QemuHypervisor(guests, self._settings)
        self.folders = LaunchFolders(folder / "state")
        self.meter = PrometheusMeter()
        self.ledger = Ledger(self.folders, self.meter)
        self.custody = Custody(ledger=self.ledger, clock=self.clock, log=self.log, observe=self._note)
        self.runner = Runner(
            ledger=self.ledger,
            custody=self.custody,
            hypervisor=self.hypervisor,
            device=self.device,
            clock=self.clock,
        )
        self.supervisor = Supervisor(
            ledger=self.ledger,
            custody=self.custody,
            hypervisor=self.hypervisor,
            clock=self.clock,
            log=self.log,
            limits=limits,
        )

    def hurry(self, seconds: float = 2.0) -> None:
        """Wait only so long for a command from now on; what is honest about one without an answer has its time, too."""
        change(self._settings, command_timeout=seconds)

    def _note(self, point: str, _launch_id: UUID, /) -> None:
        self.passed.append(point)

    def order(self, **changes: Any) -> StartRequest:
        """A StartLaunch that should succeed, with some fields changed."""
        fields: dict[str, Any] = {
            "request_id": uuid4(),
            "launch_id": uuid4(),
            "guest": "web",
            "policy": POLICY,
            "godh": b"g" * 2084,
            "session": b"s" * 128,
            "pdh_fingerprint": self.device.pdh.fingerprint,
        }
        return StartRequest(**{**fields, **changes})

    async def up_to(self, state: LaunchState, **changes: Any) -> Launch:
        """A launch of Alice's that has come as far as `state`."""
        launch = await self.runner.start(ALICE, self.order(**changes))
        if state is LaunchState.PAUSED:
            return launch
        launch = await self.runner.measure(ALICE, launch.launch_id)
        if state is LaunchState.MEASURED:
            return launch
        launch = await self.runner.inject(ALICE, launch.launch_id, uuid4(), HEADER, PAYLOAD)
        if state is LaunchState.INJECTED:
            return launch
        assert state is LaunchState.RESUMED
        return await self.runner.resume(ALICE, launch.launch_id, uuid4())

    def now(self, launch: Launch) -> Launch:
        """The launch, as it stands now."""
        return self.runner.get(ALICE, launch.launch_id)

    async def leave(self) -> None:
        """End the agent's run as a kill would: machines are let go of and go on."""
        await self.supervisor.close()
        self.custody.close()
        self.folders.close()

    async def until(self, launch: Launch, state: LaunchState) -> Launch:
        """Wait until the launch stands in `state`; the test's own time limit applies."""
        async for seen in self.runner.watch(launch.caller):
            if seen.launch_id != launch.launch_id:
                continue
            if seen.state is state:
                return seen
            assert not seen.is_final, f"{seen.state} and never {state}: {seen.failure}"
        raise AssertionError("unreachable")


@asynccontextmanager
async def rig(folder: Path, **options: Any) -> AsyncIterator[Rig]:
    """An agent on `folder`; at the end nothing of it is left, whatever state it is in."""
    made = Rig(folder, **options)
    made.folders.open()
    try:
        await made.supervisor.recover()
        yield made
    finally:
        for launch in made.ledger.unfinished():
            machine = made.custody.machine(launch.launch_id)
            if machine is not None:
                await machine.end()
        await made.leave()


def machines_live_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the agent not wait long whether a machine whose monitor broke off dies; for tests in which it does not."""
    monkeypatch.setattr(custody, "_DYING", 0.05)


def reason(launch: Launch) -> Reason | None:
    return None if launch.failure is None else launch.failure.reason


def pid_of(launch: Launch) -> int:
    """The pid of the launch's machine."""
    assert launch.machine is not None
    return launch.machine.pid


def alive(pid: int) -> bool:
    """Whether there is a process with this pid that is not a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def strays(folder: Path) -> Iterator[int]:
    """Processes that were started for anything below `folder`, which a test must not leave behind."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                line = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if os.fsencode(folder) in line and alive(int(entry.name)):
                yield int(entry.name)


def open_descriptors(pid: int | None = None) -> int:
    """How many descriptors a process has open; this one, if none is named."""
    return len(list(Path(f"/proc/{pid or 'self'}/fd").iterdir()))
