"""A machine that somebody else starts: the agent says what it is started with, meets it at its monitor, and ends it.

The guest's definition names a folder of the agent's own for the owner's files (`inputs.py`) and the place where the
machine's monitor will be. In order:

1. The place must be free. A machine that is there already was not started with this launch's session; it is left alone.
2. The owner's files are written, and when the launch is on record `launch.cfg`, which calls for the machine. Whoever
   starts it waits for that; or the definition names a command, which is run without a shell, behind the gate of
   `process.py`. So an agent that finds no `launch.cfg` at its start knows that the machine was never called for.
3. What then listens at that place is the guest's machine if it began after the launch and reads `launch.cfg`
   (`expected.py`); anything else there fails the launch and is left alone. It is known by pid (SO_PEERCRED), start time
   and boot, and held by a pidfd. Every later connection must lead to the same process, and signals go through that
   pidfd and to nothing else.
4. An end before the machine came takes the files away, so that QEMU cannot start with them, ends the command and
   everything that has the launch's mark from it, and looks once more: QEMU makes its monitor before it reads the files.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar
from uuid import UUID

from common.errors import PlatformFailed, Reason, SevattestError, Unavailable, WrongState
from host_agent.firmware_errors import hypervisor_failure
from host_agent.hypervisors import console
from host_agent.hypervisors.arguments import LAUNCH_FILE, MONITOR, MachineOptions, launch_file
from host_agent.hypervisors.base import Machine, MachineId, StartOrder, Trace
from host_agent.hypervisors.expected import Expected
from host_agent.hypervisors.guests import Guests
from host_agent.hypervisors.inputs import Inputs
from host_agent.hypervisors.monitored import MonitoredMachine, QemuSettings, until_greeted
from host_agent.hypervisors.process import Process, boot_id, end_family
from host_agent.hypervisors.qmp import MonitorSession, is_taken, listening_pid, monitor

_INPUTS = "inputs"  # a link in the launch's folder: it outlives the guest's definition, as the monitor's does


@dataclass(frozen=True, kw_only=True)
class AttachDefinition:
    """A guest that somebody else starts, already checked.

    Attributes:
        firmware: the guest's firmware image.
        monitor: absolute, where its machine's monitor is.
        inputs: absolute, the folder for the owner's files.
        start: a command that starts the machine, with its arguments; none where somebody else does.
    """

    driver: ClassVar[str] = "attach"
    firmware: Path
    monitor: Path
    inputs: Path
    start: tuple[str, ...] = ()


class AttachHypervisor(Guests[AttachDefinition]):
    """Meets the guests of the configuration where their definitions say."""

    def __init__(self, guests: Mapping[str, AttachDefinition], settings: QemuSettings) -> None:
        super().__init__(guests)
        self._settings = settings

    async def create(self, order: StartOrder) -> Machine:
        """See `Hypervisor`."""
        definition = self.definition(order.guest)
        return await expect(definition, order, self._settings)

    async def find(self, trace: Trace) -> Machine | None:
        """See `Hypervisor`."""
        return find_again(trace, self._settings)

    async def sweep(self, trace: Trace) -> None:
        """See `Hypervisor`."""
        await sweep_up(trace)


async def expect(definition: AttachDefinition, order: StartOrder, settings: QemuSettings) -> Machine:
    """Prepare for a machine that is about to be started, for a driver's `create`.

    Raises:
        WrongState: `GUEST_BUSY`; there is a machine already.
        InvalidInput: `INVALID_CONFIGURATION`; a path cannot be handed to QEMU.
        PlatformFailed: `HYPERVISOR_FAILED`; files or command cannot be made.
    """
    if await is_taken(definition.monitor.parent, definition.monitor.name):
        raise WrongState(
            Reason.GUEST_BUSY,
            "the guest has a machine already, which was not started for this launch; it is left alone",
            guest=order.guest,
        )
    options = MachineOptions(
        firmware=definition.firmware,
        cbitpos=settings.cbitpos,
        reduced_phys_bits=settings.reduced_phys_bits,
        policy=order.policy,
    )
    inputs = Inputs(definition.inputs)
    inputs.prepare()
    _link(order.folder / MONITOR, definition.monitor)
    _link(order.folder / _INPUTS, definition.inputs)
    expected = Expected.from_now(definition.inputs / LAUNCH_FILE, order.launch)
    call = expected.head + launch_file(options, definition.inputs)
    starter = None
    if definition.start:
        with console.open_log(order.folder) as log:
            starter = Process.spawn(definition.start, folder=order.folder, log=log, marker=str(order.launch))
    try:
        inputs.write(order.godh, order.session)
    except BaseException:
        if starter is not None:
            starter.close()  # its gate closes with it
        raise
    return AttachedMachine(
        order.folder,
        inputs,
        settings,
        launch=order.launch,
        expected=expected,
        call=call,
        starter=starter,
        session=None if starter is None else starter.identity.pid,
    )


def find_again(trace: Trace, settings: QemuSettings) -> Machine | None:
    """The machine of a launch that was prepared for by `expect`, for a driver's `find`."""
    folder, identity = _inputs_folder(trace), trace.identity
    if folder is None:
        return None  # nothing was prepared yet
    expected, starter, process, session = None, None, None, None
    if identity is not None:
        session = identity.pid if identity.starter else identity.session
    if identity is None or identity.starter:
        expected = Expected.read(folder / LAUNCH_FILE, trace.launch)
        if expected is None:
            return None
        starter = None if identity is None else Process.attach(identity, marker=str(trace.launch))
    else:
        process = Process.attach(identity, marker=None)
        if process is None:
            return None
    return AttachedMachine(
        trace.folder,
        Inputs(folder),
        settings,
        launch=trace.launch,
        expected=expected,
        starter=starter,
        process=process,
        session=session,
    )


async def sweep_up(trace: Trace) -> None:
    """Remove what a machine that is gone left behind, for a driver's `sweep`."""
    folder = _inputs_folder(trace)
    if folder is not None:
        Inputs(folder).remove()
    identity = trace.identity
    if identity is not None and identity.boot_id == boot_id():
        if identity.starter:
            await end_family(None, str(trace.launch))
        elif identity.session is not None:
            await end_family(identity.session, str(trace.launch))


class AttachedMachine(MonitoredMachine):
    """A machine that is to come, or has come, at its place; see `Machine`."""

    def __init__(
        self,
        folder: Path,
        inputs: Inputs,
        settings: QemuSettings,
        *,
        launch: UUID,
        expected: Expected | None,
        call: str | None = None,
        starter: Process | None = None,
        process: Process | None = None,
        session: int | None = None,
    ) -> None:
        super().__init__(lambda: self._monitor(settings.command_timeout))
        self._folder = folder
        self._inputs = inputs
        self._settings = settings
        self._launch = launch
        self._expected = expected
        self._call = call
        self._starter = starter
        self._process = process
        self._session = session
        self._over = False
        self._decided = asyncio.Event()  # whether there is a machine: one has come, or none will
        if process is not None:
            self._decided.set()

    @property
    def identity(self) -> MachineId | None:
        """See `Machine`."""
        if self._process is not None:
            return replace(self._process.identity, session=self._session)
        if self._starter is None:
            return None
        command = self._starter.identity
        return MachineId(pid=command.pid, start_time=command.start_time, boot_id=command.boot_id, starter=True)

    @property
    def alive(self) -> bool:
        """See `Machine`."""
        return self._process.alive if self._process is not None else not self._over

    def release(self) -> None:
        """See `Machine`."""
        if self._call is not None:
            self._inputs.call(self._call)
        if self._starter is not None:
            self._starter.open_gate()

    async def wait_ready(self) -> None:
        """See `Machine`."""
        limit = self._settings.start_timeout
        try:
            await until_greeted(self._greet, self._check, limit=limit)
        except TimeoutError:
            what = "did not come up" if self._process is None else "came up, and its monitor did not greet"
            raise self._start_failure(f"the machine {what} in {limit:g} s") from None

    async def _greet(self, left: float) -> None:
        if self._process is None:
            await self._meet()
        async with self._monitor(left):
            pass

    def _check(self) -> None:
        if self._process is not None:
            if not self._process.alive:
                raise self._start_failure("the machine died before its monitor greeted")
        elif self._starter is not None and self._starter.exit_code not in {None, 0}:
            raise self._start_failure("the command that starts the machine failed")

    async def _meet(self) -> None:
        """Take the process that listens at the machine's place for the machine, if it is the one that is expected.

        Raises:
            Unavailable: nobody does, or another user.
            PlatformFailed: `HYPERVISOR_FAILED`; another process than the machine does, which is left alone.
        """
        limit = self._settings.command_timeout
        pid = await listening_pid(self._folder, MONITOR, limit=limit)
        process = Process.adopt(pid)
        if process is None:
            raise Unavailable(Reason.PLATFORM_UNAVAILABLE, "the machine's monitor has no process behind it")
        try:
            # Asked again, now that the pidfd is bound: it is the listener's, and not that of a pid used again.
            again = await listening_pid(self._folder, MONITOR, limit=limit)
            self._check_met(process, again)
        except BaseException:
            process.close()
            raise
        self._process = process
        self._decided.set()

    def _check_met(self, process: Process, listener: int) -> None:
        assert self._expected is not None  # noqa: S101 -- a machine whose process is known is not met again
        pid = process.identity.pid
        objection = self._expected.objection(process.identity)
        if listener != pid or not process.alive:
            raise Unavailable(Reason.PLATFORM_UNAVAILABLE, "the machine's monitor changes hands")
        if objection is not None:
            raise PlatformFailed(
                Reason.HYPERVISOR_FAILED,
                f"the process {pid} that listens at the machine's monitor {objection}; it is left alone",
            )

    def _start_failure(self, what: str) -> SevattestError:
        words = console.last_words(self._folder, "")
        code = None if self._starter is None else self._starter.exit_code
        return hypervisor_failure(f"{what} (exit code {code})" if code is not None else what, words)

    def _monitor(self, limit: float) -> AbstractAsyncContextManager[MonitorSession]:
        if self._process is None:
            raise Unavailable(Reason.PLATFORM_UNAVAILABLE, "the machine has not come up yet")
        return monitor(self._folder, MONITOR, limit=limit, listener=self._process.identity.pid)

    def forget_inputs(self) -> None:
        """See `Machine`."""
        self._inputs.remove()

    def trim_log(self) -> None:
        """See `Machine`."""
        console.trim_log(self._folder)

    async def wait_gone(self) -> None:
        """See `Machine`."""
        await self._decided.wait()
        if self._process is not None:
            await self._process.wait_gone()

    async def end(self) -> None:
        """See `Machine`."""
        self._inputs.remove()
        grace = self._settings.stop_timeout
        if self._process is None and not self._over:
            if self._starter is not None:
                await self._starter.end(grace)
            # The command may be gone since a restart, but not what it started.
            await end_family(None, str(self._launch))
            with suppress(Unavailable, PlatformFailed):
                await self._meet()
        if self._process is not None:
            await self._process.end(grace)
        if self._starter is not None:
            await self._starter.end(grace)
        elif self._session is not None:
            # Of a former run of the agent. By now the number may be another's, but not with the launch's mark.
            await end_family(self._session, str(self._launch))
        self._over = True
        self._decided.set()

    def close(self) -> None:
        """See `Machine`."""
        for process in (self._process, self._starter):
            if process is not None:
                process.close()


def _inputs_folder(trace: Trace) -> Path | None:
    """The folder as the definition had it, which may have links in it."""
    link = trace.folder / _INPUTS
    return link.readlink() if link.is_symlink() else None


def _link(link: Path, target: Path) -> None:
    try:
        link.unlink(missing_ok=True)
        link.symlink_to(target)
    except OSError as error:
        raise PlatformFailed(
            Reason.HYPERVISOR_FAILED, f"the launch's folder cannot be written: {error.strerror or error}"
        ) from error
