"""QEMU as a child of the agent: files, process and monitor of one machine.

The machine's program is whatever the definition names; it takes QEMU's own arguments (`arguments.py`). It runs in the
launch's folder, in a session of its own, and outlives the agent. What it says is checked in `qapi.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path

from common.errors import SevattestError
from host_agent.firmware_errors import hypervisor_failure
from host_agent.hypervisors import console, memlock
from host_agent.hypervisors.arguments import MONITOR, MachineOptions, command_line
from host_agent.hypervisors.base import GuestDefinition, Machine, MachineId, StartOrder, Trace
from host_agent.hypervisors.guests import Guests
from host_agent.hypervisors.inputs import Inputs
from host_agent.hypervisors.memlock import LockLimit
from host_agent.hypervisors.monitored import MonitoredMachine, QemuSettings, until_greeted
from host_agent.hypervisors.process import Process, boot_id, end_family
from host_agent.hypervisors.qmp import MonitorSession, monitor


class QemuHypervisor(Guests[GuestDefinition]):
    """Starts the guests of the configuration as QEMU processes.

    Args:
        guests: their definitions, by name.
        settings: how machines are spoken to.
        lock_limit: asked before each start, where the guest's memory will be pinned; None where it will not.
    """

    def __init__(
        self, guests: Mapping[str, GuestDefinition], settings: QemuSettings, lock_limit: LockLimit | None = None
    ) -> None:
        super().__init__(guests)
        self._settings = settings
        self._lock_limit = lock_limit

    async def create(self, order: StartOrder) -> Machine:
        """See `Hypervisor`."""
        definition = self.definition(order.guest)
        if self._lock_limit is not None:
            memlock.check(order.guest, definition.args, definition.firmware, self._lock_limit())
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
        Inputs(order.folder).write(order.godh, order.session)
        with console.open_log(order.folder) as log:
            process = Process.spawn(argv, folder=order.folder, log=log, marker=str(order.launch))
        return QemuMachine(process, order.folder, definition.program[0], self._settings)

    async def find(self, trace: Trace) -> Machine | None:
        """See `Hypervisor`."""
        if trace.identity is None:
            return None  # its gate never opened
        process = Process.attach(trace.identity, marker=str(trace.launch))
        # A guest may have left the configuration while its machine went on; the name is for messages only.
        program = self.guests[trace.guest].program[0] if trace.guest in self.guests else ""
        return None if process is None else QemuMachine(process, trace.folder, program, self._settings)

    async def sweep(self, trace: Trace) -> None:
        """See `Hypervisor`."""
        if trace.identity is not None and trace.identity.boot_id == boot_id():
            await end_family(trace.identity.pid, str(trace.launch))


class QemuMachine(MonitoredMachine):
    """One QEMU process; see `Machine`."""

    def __init__(self, process: Process, folder: Path, program: str, settings: QemuSettings) -> None:
        super().__init__(lambda: self._monitor(settings.command_timeout))
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
            await until_greeted(self._greet, self._check_alive, limit=limit)
        except TimeoutError:
            raise self._start_failure(f"the machine's monitor did not greet in {limit:g} s") from None

    async def _greet(self, left: float) -> None:
        async with self._monitor(left):
            pass

    def _check_alive(self) -> None:
        if not self._process.alive:
            raise self._start_failure("the machine died before its monitor greeted")

    def _start_failure(self, what: str) -> SevattestError:
        words = console.last_words(self._folder, self._program)
        code = self._process.exit_code
        return hypervisor_failure(f"{what} (exit code {code})" if code is not None else what, words)

    def _monitor(self, limit: float) -> AbstractAsyncContextManager[MonitorSession]:
        return monitor(self._folder, MONITOR, limit=limit)

    def forget_inputs(self) -> None:
        """See `Machine`."""
        Inputs(self._folder).remove()

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
