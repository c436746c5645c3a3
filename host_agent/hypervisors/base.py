"""What the agent asks of a hypervisor, whichever it is: hold, start, look, measure, inject, resume, end.

One Protocol, four drivers (docs/hypervisors.md): `qemu.py` spawns QEMU from a definition, `attach.py` reaches a QEMU
that somebody else starts, `proxmox.py` has it started by Proxmox VE, `libvirt.py` by libvirt. `fleet.py` picks the
driver of each guest. What all of them promise is tests/contract/test_hypervisors.py, which runs on each.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import ClassVar, Protocol
from uuid import UUID

from common.sev.digest.ovmf import Area
from common.sev.measurement import FirmwareVersion


@dataclass(frozen=True, kw_only=True)
class GuestDefinition:
    """A guest as the agent's configuration names it, already checked.

    Attributes:
        program: the machine's program and its own leading arguments; the first word is absolute or found on the PATH.
        firmware: the guest's firmware image.
        args: QEMU's arguments, without what the agent adds.
    """

    driver: ClassVar[str] = "qemu"
    program: tuple[str, ...]
    firmware: Path
    args: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class StartOrder:
    """One machine to start, paused.

    Attributes:
        launch: the launch that it is for.
        guest: the guest's name.
        policy: the guest policy, 32 bits.
        godh: the owner's certificate, 2084 bytes.
        session: the session blob, 128 bytes.
        folder: the launch's private folder, which exists.
    """

    launch: UUID
    guest: str
    policy: int
    godh: bytes
    session: bytes
    folder: Path


@dataclass(frozen=True, kw_only=True)
class MachineId:
    """A process, so that no other is ever taken for it: a pid alone is used again.

    Attributes:
        pid: its pid; of a process of our own also its session's and process group's.
        start_time: field 22 of /proc/PID/stat, clock ticks since boot; does not change over execve.
        boot_id: of the kernel's run, a UUID.
        starter: it is the command that starts the machine, and the machine itself was not seen yet.
        session: of the command that started it; None where nobody of ours did.
    """

    pid: int
    start_time: int
    boot_id: str
    starter: bool = False
    session: int | None = None


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What a launch's record tells of its machine.

    Attributes:
        launch: the launch that it is for.
        guest: the guest's name, which may have left the configuration.
        driver: what started it.
        folder: the launch's private folder.
        identity: which process it is; None where it has none on record.
    """

    launch: UUID
    guest: str
    driver: str
    folder: Path
    identity: MachineId | None


class SevState(StrEnum):
    """`SevState` of QEMU's QAPI schema."""

    UNINIT = "uninit"
    LAUNCH_UPDATE = "launch-update"
    LAUNCH_SECRET = "launch-secret"  # noqa: S105 -- a state's name
    RUNNING = "running"
    SEND_UPDATE = "send-update"
    RECEIVE_UPDATE = "receive-update"


# Run states of a machine that never ran, or stands still; a fresh one with -S says `prelaunch`.
_STANDING = frozenset({"prelaunch", "paused"})


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What the hypervisor says of a machine.

    Attributes:
        enabled: it is an SEV guest.
        state: of the launch at the firmware.
        policy: the guest policy, 32 bits.
        firmware: the SEV firmware's version.
        running: its vCPUs run.
        status: the hypervisor's run state, in its own words.
    """

    enabled: bool
    state: SevState
    policy: int
    firmware: FirmwareVersion
    running: bool
    status: str

    @property
    def is_paused(self) -> bool:
        """It is measured, takes secrets and has not run."""
        return self.enabled and self.state is SevState.LAUNCH_SECRET and not self.running and self.status in _STANDING

    @property
    def has_run(self) -> bool:
        """Its launch is finished, or its vCPUs run: it may have executed instructions."""
        return self.running or self.state is SevState.RUNNING


class Machine(Protocol):
    """One machine.

    Steps that only look raise `Unavailable(PLATFORM_UNAVAILABLE)` where the machine gives no answer. `inject` and
    `resume` raise `OutcomeUnknown` where the link broke after the command was sent, `Unavailable` where it was not
    sent, `Refused` for the firmware's verdicts and `PlatformFailed` for everything else that was answered.
    """

    @property
    def identity(self) -> MachineId | None:
        """Which process it is. It may be known, or become another one, when `wait_ready` returns.

        None while nobody knows, and always where the hypervisor knows a machine by its launch (libvirt).
        """
        ...

    @property
    def alive(self) -> bool:
        """It exists, or may come into being for this launch at any moment."""
        ...

    def release(self) -> None:
        """Let begin what `Hypervisor.create` held back.

        Raises:
            PlatformFailed: `HYPERVISOR_FAILED`; it cannot be called for.
        """
        ...

    async def wait_ready(self) -> None:
        """Wait until the machine answers.

        Raises:
            SevattestError: it died or did not answer in time; its own words are in the message.
        """
        ...

    async def inspect(self) -> Inspection:
        """How it stands."""
        ...

    async def measurement(self) -> bytes:
        """The measurement blob, 48 bytes."""
        ...

    async def inject(self, header: bytes, payload: bytes) -> None:
        """Hand the secret packet to the firmware. It goes where the guest's firmware says; nobody else is asked."""
        ...

    async def resume(self) -> None:
        """Let the vCPUs run."""
        ...

    async def report(self, nonce: bytes) -> bytes:
        """An attestation report over a 16-byte nonce, 208 bytes."""
        ...

    def forget_inputs(self) -> None:
        """Remove the files that the machine has read and needs no more."""
        ...

    def trim_log(self) -> None:
        """Keep the machine's log within its bound."""
        ...

    async def wait_gone(self) -> None:
        """Return when it has ended."""
        ...

    async def end(self) -> None:
        """End it and what it started, and wait until they are gone. Does nothing where they are.

        A machine that was to come into being does not any more.

        Raises:
            Unavailable: `PLATFORM_UNAVAILABLE`; it was killed and does not end.
        """
        ...

    def close(self) -> None:
        """Stop watching it; it goes on."""
        ...


class Hypervisor(Protocol):
    """Starts machines and finds them again."""

    def driver(self, guest: str) -> str:
        """The name of what starts the guest, for the launch's record.

        Raises:
            NotFound: no such guest.
        """
        ...

    def secret_area(self, guest: str) -> Area | None:
        """Where the guest's firmware wants its secrets, from the firmware file; None where it has no place for them.

        Raises:
            NotFound: no such guest.
            InvalidInput: `INVALID_CONFIGURATION`; the file cannot be read.
        """
        ...

    async def create(self, order: StartOrder) -> Machine:
        """A machine that does not begin until `Machine.release`.

        It ends by itself when this process ends before that. So a caller who writes the identity down before it calls
        `release` never leaves a machine behind that nobody knows.

        Raises:
            NotFound: no such guest.
            WrongState: `GUEST_BUSY`; the guest has a machine already, which is left alone.
            InvalidInput: `INVALID_CONFIGURATION`; the guest cannot be started as it is set up on this host.
            PlatformFailed: `HYPERVISOR_FAILED`; it cannot be made.
        """
        ...

    async def find(self, trace: Trace) -> Machine | None:
        """The machine of a former run of the agent, if it is the very one and exists, or may still come.

        Where the hypervisor does not say, it counts as one that exists.

        Raises:
            Unavailable: `PLATFORM_UNAVAILABLE`; the kernel does not say. Nothing may be given up for that.
        """
        ...

    async def sweep(self, trace: Trace) -> None:
        """Remove what a machine that `find` did not find left behind."""
        ...
