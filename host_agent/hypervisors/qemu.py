"""QEMU as a child of the agent: files, process and monitor of one machine.

The machine's program is whatever the definition names; it takes QEMU's own arguments (`arguments.py`). It runs in the
launch's folder, in a session of its own, and outlives the agent. What it says is checked in `qapi.py`.
"""

from __future__ import annotations

import asyncio
import base64
import os
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from common.errors import InvalidInput, NotFound, PlatformFailed, Reason, SevattestError, Unavailable
from common.sev.digest.ovmf import TAIL_SIZE_MAX, Area, parse_footer
from host_agent.firmware_errors import hypervisor_failure
from host_agent.hypervisors import console, qapi
from host_agent.hypervisors.arguments import GODH_FILE, MONITOR, SESSION_FILE, MachineOptions, command_line
from host_agent.hypervisors.base import GuestDefinition, Inspection, Machine, MachineId, StartOrder
from host_agent.hypervisors.process import Process, boot_id, end_family
from host_agent.hypervisors.qmp import MonitorSession, monitor

_POLL = 0.02  # seconds between looks for the monitor's socket
_MACHINE_FILES = (GODH_FILE, SESSION_FILE)


@dataclass(frozen=True, kw_only=True)
class QemuSettings:
    """How machines are started and spoken to.

    Attributes:
        cbitpos: position of the encryption bit in guest page tables (CPUID 8000001F, EBX 5:0).
        reduced_phys_bits: physical address bits that encryption costs (EBX 11:6).
        start_timeout: seconds from the program's start to the monitor's first answer.
        command_timeout: seconds that one monitor command may take.
        stop_timeout: seconds between SIGTERM and SIGKILL.
    """

    cbitpos: int
    reduced_phys_bits: int
    start_timeout: float
    command_timeout: float
    stop_timeout: float


class QemuHypervisor:
    """Starts the guests of the configuration as QEMU processes."""

    def __init__(self, guests: Mapping[str, GuestDefinition], settings: QemuSettings) -> None:
        self._guests = guests
        self._settings = settings

    def define(self, guests: Mapping[str, GuestDefinition]) -> None:
        """Take other definitions, for the machines that are started from now on."""
        self._guests = guests

    def secret_area(self, guest: str) -> Area | None:
        """See `Hypervisor`."""
        return read_secret_area(self._definition(guest).firmware)

    async def create(self, order: StartOrder) -> Machine:
        """See `Hypervisor`."""
        definition = self._definition(order.guest)
        argv = command_line(
            definition.program,
            definition.args,
            MachineOptions(
                firmware=definition.firmware,
                cbitpos=self._settings.cbitpos,
                reduced_phys_bits=self._settings.reduced_phys_bits,
                policy=order.policy,
            ),
        )
        try:
            _write_private(order.folder / GODH_FILE, base64.b64encode(order.godh))
            _write_private(order.folder / SESSION_FILE, base64.b64encode(order.session))
            log = console.open_log(order.folder)
        except OSError as error:
            raise PlatformFailed(
                Reason.HYPERVISOR_FAILED, f"the machine's files cannot be written: {error.strerror or error}"
            ) from error
        with log:
            process = Process.spawn(argv, folder=order.folder, log=log, marker=str(order.launch))
        return QemuMachine(process, order.folder, definition.program[0], self._settings)

    def find(self, guest: str, launch: UUID, folder: Path, identity: MachineId) -> Machine | None:
        """See `Hypervisor`."""
        process = Process.attach(identity, marker=str(launch))
        # A guest may have left the configuration while its machine went on; the name is for messages only.
        program = self._guests[guest].program[0] if guest in self._guests else ""
        return None if process is None else QemuMachine(process, folder, program, self._settings)

    def _definition(self, guest: str) -> GuestDefinition:
        if guest not in self._guests:
            raise NotFound(Reason.NOT_FOUND, "no such guest", guest=guest)
        return self._guests[guest]

    async def sweep(self, launch: UUID, identity: MachineId) -> None:
        """See `Hypervisor`."""
        if identity.boot_id == boot_id():
            await end_family(identity.pid, str(launch))


class QemuMachine:
    """One QEMU process; see `Machine`."""

    def __init__(self, process: Process, folder: Path, program: str, settings: QemuSettings) -> None:
        self._process = process
        self._folder = folder
        self._program = program
        self._settings = settings

    @property
    def identity(self) -> MachineId:
        """Which process it is."""
        return self._process.identity

    @property
    def alive(self) -> bool:
        """Its process exists."""
        return self._process.alive

    def release(self) -> None:
        """See `Machine`."""
        self._process.open_gate()

    async def wait_ready(self) -> None:
        """See `Machine`."""
        limit = self._settings.start_timeout
        try:
            async with asyncio.timeout(limit):
                await self._until_greeted()
        except TimeoutError:
            raise self._start_failure(f"the machine's monitor did not greet in {limit:g} s") from None

    async def _until_greeted(self) -> None:
        while True:
            try:
                # Without a limit of its own: start_timeout is the caller's, and a slow start is no reason to hang up.
                async with monitor(self._folder, MONITOR, limit=self._settings.start_timeout):
                    return
            except Unavailable:
                # No socket yet, or one that closed without a word: both end in a greeting or in the process's death.
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._process.wait_gone(), _POLL)
            if not self._process.alive:
                raise self._start_failure("the machine died before its monitor greeted")

    def _start_failure(self, what: str) -> SevattestError:
        words = console.last_words(self._folder, self._program)
        code = self._process.exit_code
        return hypervisor_failure(f"{what} (exit code {code})" if code is not None else what, words)

    async def inspect(self) -> Inspection:
        """See `Machine`."""
        async with self._monitor() as session:
            status = await session.execute("query-status")
            sev = await session.execute("query-sev")
        return qapi.inspection(status, sev)

    async def measurement(self) -> bytes:
        """See `Machine`."""
        async with self._monitor() as session:
            return qapi.measurement(await session.execute("query-sev-launch-measure"))

    async def inject(self, header: bytes, payload: bytes) -> None:
        """See `Machine`."""
        arguments = {
            "packet-header": base64.b64encode(header).decode(),
            "secret": base64.b64encode(payload).decode(),
            # No gpa: QEMU takes the base of the area in the firmware that it measured.
        }
        async with self._monitor() as session:
            await session.execute("sev-inject-launch-secret", arguments)

    async def resume(self) -> None:
        """See `Machine`."""
        async with self._monitor() as session:
            await session.execute("cont")

    async def report(self, nonce: bytes) -> bytes:
        """See `Machine`."""
        arguments = {"mnonce": base64.b64encode(nonce).decode()}
        async with self._monitor() as session:
            return qapi.report(await session.execute("query-sev-attestation-report", arguments))

    def _monitor(self) -> AbstractAsyncContextManager[MonitorSession]:
        return monitor(self._folder, MONITOR, limit=self._settings.command_timeout)

    def forget_inputs(self) -> None:
        """See `Machine`."""
        for name in _MACHINE_FILES:
            with suppress(OSError):
                (self._folder / name).unlink(missing_ok=True)

    def trim_log(self) -> None:
        """See `Machine`."""
        console.trim_log(self._folder)

    async def wait_gone(self) -> None:
        """See `Machine`."""
        await self._process.wait_gone()

    async def end(self) -> None:
        """See `Machine`."""
        await self._process.end(self._settings.stop_timeout)

    def close(self) -> None:
        """See `Machine`."""
        self._process.close()


def read_secret_area(firmware: Path) -> Area | None:
    """Where an image wants its secrets; None where it has no place for them.

    Raises:
        InvalidInput: `INVALID_CONFIGURATION`; the image cannot be read.
    """
    try:
        with firmware.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_SIZE_MAX))
            tail = file.read(TAIL_SIZE_MAX)
    except OSError as error:
        raise InvalidInput(
            Reason.INVALID_CONFIGURATION, f"firmware {firmware} cannot be read: {error.strerror or error}"
        ) from error
    return parse_footer(tail).secret_area


def _write_private(path: Path, data: bytes) -> None:
    """A new file that nobody else can open; an old one of that name is not followed and not kept."""
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with open(descriptor, "wb") as file:  # noqa: PTH123 -- from a descriptor
        file.write(data)
