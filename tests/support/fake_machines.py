"""A hypervisor in memory: machines that live, die, lie and lose answers as a test wants, without processes."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from uuid import UUID

from common.errors import OutcomeUnknown, PlatformFailed, Reason, Refused, Unavailable
from common.sev.digest.ovmf import Area
from common.sev.measurement import FirmwareVersion
from host_agent.hypervisors.base import Inspection, Machine, MachineId, SevState, StartOrder, Trace
from host_agent.store.folders import LaunchFolders

Packet = tuple[bytes, bytes]
_pids = count(1000)


@dataclass
class Guest:
    """What a machine really is, whoever looks at it.

    Attributes:
        policy: it was started with.
        released: its program has begun.
        running: its vCPUs run.
        packets: what the firmware took, in order.
        ran_with: how many packets it had when it first ran; None if it never ran.
    """

    identity: MachineId
    policy: int
    alive: bool = True
    released: bool = False
    running: bool = False
    silent: bool = False
    packets: list[Packet] = field(default_factory=list)
    ran_with: int | None = None
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    def run(self) -> None:
        """Let the vCPUs run."""
        if self.alive and not self.running:
            self.running = True
            self.ran_with = len(self.packets)

    def die(self) -> None:
        """End."""
        self.alive = False
        self.running = False
        self.gone.set()


@dataclass
class FakeHypervisor:
    """Makes and finds machines.

    Attributes:
        guests: every machine that ever was.
        next_fault: what happens to the next `inject` or `resume`: `lost` (before it takes effect), `unheard` (after
            it), `refused`, `dies`; None: it goes well.
        start_fault: `dies` or `refused` for the next start.
    """

    guests: dict[MachineId, Guest] = field(default_factory=dict)
    next_fault: str | None = None
    start_fault: str | None = None

    def driver(self, guest: str) -> str:
        assert guest
        return "qemu"

    def secret_area(self, guest: str) -> Area | None:
        assert guest
        return Area(base=0x810000, size=0xC00)

    async def create(self, order: StartOrder) -> Machine:
        identity = MachineId(pid=next(_pids), start_time=1, boot_id="boot")
        guest = self.guests[identity] = Guest(identity=identity, policy=order.policy)
        return FakeMachine(self, guest)

    async def find(self, trace: Trace) -> Machine | None:
        assert trace.driver == "qemu"
        found = None if trace.identity is None else self.guests[trace.identity]
        return FakeMachine(self, found) if found is not None and found.alive else None

    async def sweep(self, trace: Trace) -> None:
        assert trace.identity is None or trace.identity in self.guests

    def fault(self) -> str | None:
        """The next fault, once."""
        fault, self.next_fault = self.next_fault, None
        return fault

    def agent_died(self) -> None:
        """What the gate does when the agent dies: machines that were never released end."""
        for guest in self.guests.values():
            if not guest.released:
                guest.die()


class FakeMachine:
    """One machine, as the agent sees it."""

    def __init__(self, hypervisor: FakeHypervisor, guest: Guest) -> None:
        self._hypervisor = hypervisor
        self.guest = guest

    @property
    def identity(self) -> MachineId:
        return self.guest.identity

    @property
    def alive(self) -> bool:
        return self.guest.alive

    def release(self) -> None:
        self.guest.released = True

    async def wait_ready(self) -> None:
        fault, self._hypervisor.start_fault = self._hypervisor.start_fault, None
        if fault == "refused":
            self.guest.die()
            raise Refused(Reason.FIRMWARE_BAD_MEASUREMENT, "fw_error=11", fw_error="11")
        if fault == "dies":
            self.guest.die()
            raise PlatformFailed(Reason.HYPERVISOR_FAILED, "died before its monitor greeted")
        self._hear()

    async def inspect(self) -> Inspection:
        self._hear()
        return Inspection(
            enabled=True,
            state=SevState.RUNNING if self.guest.running else SevState.LAUNCH_SECRET,
            policy=self.guest.policy,
            firmware=FirmwareVersion(1, 55, 24),
            running=self.guest.running,
            status="running" if self.guest.running else "prelaunch",
        )

    async def measurement(self) -> bytes:
        self._hear()
        return bytes(48)

    async def inject(self, header: bytes, payload: bytes) -> None:
        self._hear()
        fault = self._hypervisor.fault()
        if self.guest.running or fault == "refused":
            raise Refused(Reason.FIRMWARE_BAD_MEASUREMENT, "fw_error=11", fw_error="11")
        if fault not in {"lost", "dies"}:
            self.guest.packets.append((header, payload))
        self._answer(fault)

    async def resume(self) -> None:
        self._hear()
        fault = self._hypervisor.fault()
        if fault == "refused":
            raise PlatformFailed(Reason.HYPERVISOR_FAILED, "no")
        if fault not in {"lost", "dies"}:
            self.guest.run()
        self._answer(fault)

    async def report(self, nonce: bytes) -> bytes:
        self._hear()
        return nonce + bytes(192)

    def forget_inputs(self) -> None: ...

    def trim_log(self) -> None: ...

    async def wait_gone(self) -> None:
        await self.guest.gone.wait()

    async def end(self) -> None:
        self.guest.die()

    def close(self) -> None: ...

    def _hear(self) -> None:
        if self.guest.silent or not self.guest.alive:
            raise Unavailable(Reason.PLATFORM_UNAVAILABLE, "no answer")

    def _answer(self, fault: str | None) -> None:
        if fault == "dies":
            self.guest.die()
        if fault in {"lost", "unheard", "dies"}:
            raise OutcomeUnknown(Reason.OUTCOME_UNKNOWN, "cut short")


class MemoryFolders(LaunchFolders):
    """The store without a disk; what is kept survives a restart of the agent, as a disk would.

    Attributes:
        kept: the records.
        full: whether writing fails.
    """

    def __init__(self) -> None:
        super().__init__(Path("/nowhere"))
        self.kept: dict[UUID, bytes] = {}
        self.full = False

    def open(self) -> None: ...

    def close(self) -> None: ...

    def records(self) -> list[tuple[UUID, Path, bytes]]:  # type: ignore[override]  # a list is iterated over as well
        return [(launch, self.folder(launch), record) for launch, record in self.kept.items()]

    def save(self, launch: UUID, record: bytes) -> None:
        if self.full:
            raise Unavailable(Reason.STORE_UNAVAILABLE, "no space left on device")
        self.kept[launch] = record

    def clear(self, launch: UUID, *, keep: object) -> None: ...

    def remove(self, launch: UUID) -> None:
        self.kept.pop(launch, None)
