"""What happens to launches when nobody asks: restarts, deaths, time limits, and guests that run too early.

At its start the agent goes through every launch that has not ended. One whose machine is still the very process that
was written down goes on where it stood; one whose machine is gone ends. Where the machine is still coming up, that
launch's callers wait, as before, and nobody else. While the agent runs, a machine's death is noticed as it happens;
guests that are to be paused are looked at from time to time, and a launch that is not resumed within its lifetime is
ended. So whatever happened to the agent, a guest either runs with its secret or is not running.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

from common.clock import Clock
from common.errors import PlatformFailed, Reason, SevattestError, WrongState
from common.telemetry.log import Log
from host_agent.hypervisors.base import Hypervisor, Machine
from host_agent.launches.custody import Custody
from host_agent.launches.launch import Failure, Launch
from host_agent.launches.ledger import Ledger
from host_agent.launches.state import BEFORE_INJECTED, Event, LaunchState

_S, _E = LaunchState, Event
_RETENTION_INTERVAL = timedelta(minutes=10)
_PATIENCE = 10.0  # seconds for one tick before the next one begins beside it


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the supervisor enforces.

    Attributes:
        lifetime: from StartLaunch to the guest's first instruction; what takes longer is ended.
        check_interval: between two looks at a paused guest.
        silent_checks: looks in a row without an answer after which a machine is ended.
        retain_age: how long a launch is kept after its end.
        retain_count: how many ended launches are kept.
    """

    lifetime: timedelta
    check_interval: timedelta
    silent_checks: int
    retain_age: timedelta
    retain_count: int


class Supervisor:
    """Looks after the launches; see the module."""

    def __init__(
        self, *, ledger: Ledger, custody: Custody, hypervisor: Hypervisor, clock: Clock, log: Log, limits: Limits
    ) -> None:
        self._ledger = ledger
        self._custody = custody
        self._hypervisor = hypervisor
        self._clock = clock
        self._log = log
        self._limits = limits
        self._tasks: set[asyncio.Task[None]] = set()
        self._looked: dict[UUID, datetime] = {}
        self._silent: dict[UUID, int] = {}
        self._swept: datetime | None = None
        custody.on_machine = self._watch

    async def recover(self) -> None:
        """Find the machines of a former run again, and bring every launch in line with its own.

        A start goes on in the background, since it can take `qemu.start_timeout`. It has its launch's lock before
        anybody is served, so that whoever asks for a step of it waits.

        Raises:
            InvalidInput: a record cannot be read; names the file.
        """
        await asyncio.to_thread(self._ledger.load)
        for launch in self._ledger.ended():
            # The agent may have died before it did.
            await self._custody.clear(launch)
        unfinished = self._ledger.unfinished()
        await asyncio.gather(*(self._recover(launch.launch_id) for launch in unfinished))
        if unfinished:
            self._log.info("launches.recovered", found=len(unfinished), open=len(self._ledger.unfinished()))

    async def tick(self) -> None:
        """Look after every launch once; steps that are under way are left alone."""
        now = self._clock.now()
        unfinished = {launch.launch_id for launch in self._ledger.unfinished()}
        self._looked = {launch_id: when for launch_id, when in self._looked.items() if launch_id in unfinished}
        self._silent = {launch_id: count for launch_id, count in self._silent.items() if launch_id in unfinished}
        await asyncio.gather(*(self._look_after(launch_id) for launch_id in unfinished))
        if self._swept is None or abs(now - self._swept) >= _RETENTION_INTERVAL:
            self._swept = now
            forgotten = await self._ledger.forget_old(
                now=now, age_limit=self._limits.retain_age, count_limit=self._limits.retain_count
            )
            if forgotten:
                self._log.info("launches.forgotten", count=forgotten)

    async def run(self, interval: float) -> None:
        """Tick every `interval` seconds until cancelled.

        An error in one tick is logged, and the next one comes. So it does when a tick takes long: a machine that does
        not end must not keep the others from being looked after, and its own lock keeps it from being looked at twice.
        """
        while True:
            tick = asyncio.create_task(self.tick())
            self._keep(tick)
            await asyncio.wait({tick}, timeout=_PATIENCE)
            await asyncio.sleep(interval)

    async def close(self) -> None:
        """Stop watching; the machines go on."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _recover(self, launch_id: UUID) -> None:
        async with self._ledger.lock(launch_id):
            launch = self._ledger.find(launch_id)
            assert launch is not None  # noqa: S101 -- it was just listed
            trace = launch.trace(self._ledger.folders.folder(launch_id))
            machine = await self._hypervisor.find(trace)
            if machine is None:
                await self._hypervisor.sweep(trace)
            else:
                self._custody.take(launch_id, machine)
                if launch.state is not _S.STARTING:
                    # The agent may have died before it did; the machine has read them.
                    await asyncio.to_thread(machine.forget_inputs)
            if not self._comes_up(launch):
                await self._bring_in_line(launch)
                return
        # Nobody is served yet, so this is the first to have the lock again.
        self._keep(asyncio.create_task(self._look_after(launch_id)))

    async def _look_after(self, launch_id: UUID) -> None:
        lock = self._ledger.lock(launch_id)
        if lock.locked():
            return
        async with lock:
            launch = self._ledger.find(launch_id)
            if launch is None or launch.is_final:
                return
            machine = self._custody.machine(launch_id)
            if machine is not None:
                await asyncio.to_thread(machine.trim_log)
            await self._bring_in_line(launch)

    async def _bring_in_line(self, launch: Launch) -> None:
        """One look at a launch; errors of the store or the machine are logged, and met again at the next look."""
        launch_id = launch.launch_id
        try:
            if await self._overdue(launch):
                return
            machine = self._custody.machine(launch_id)
            if self._comes_up(launch):
                await self._finish_start(launch)
                return
            if machine is not None and machine.alive and launch.ending is None and not self._due(launch_id):
                return
            await self._custody.settle(launch)
            self._silent.pop(launch_id, None)
        except SevattestError as error:
            self._log.warning("launch.silent", launch_id=launch_id, state=launch.state, error=error)
            await self._count_silence(launch)

    def _comes_up(self, launch: Launch) -> bool:
        """Whether the agent died while the launch's machine came up, which it still may."""
        machine = self._custody.machine(launch.launch_id)
        return launch.state is _S.STARTING and launch.ending is None and machine is not None and machine.alive

    async def _finish_start(self, launch: Launch) -> None:
        try:
            await self._custody.check_started(launch)
        except SevattestError as error:
            await self._custody.end(launch, _E.FAILED, Failure.of(error))

    async def _overdue(self, launch: Launch) -> bool:
        # Also where the clock was set back: how long the guest has stood there is not known any more.
        if launch.state is _S.RESUMED or abs(self._clock.now() - launch.create_time) <= self._limits.lifetime:
            return False
        if launch.state is _S.RESUMING:
            launch, _ = await self._custody.settle(launch)
            if launch.state is _S.RESUMED or launch.is_final:
                return True
        seconds = self._limits.lifetime.total_seconds()
        why = WrongState(Reason.LAUNCH_EXPIRED, f"the guest was not resumed within {seconds:g} s")
        await self._custody.end(launch, _E.ABORTED, Failure.of(why))
        return True

    def _due(self, launch_id: UUID) -> bool:
        now = self._clock.now()
        looked = self._looked.get(launch_id)
        if looked is not None and abs(now - looked) < self._limits.check_interval:
            return False
        self._looked[launch_id] = now
        return True

    async def _count_silence(self, launch: Launch) -> None:
        """End a machine that has not said for long whether it is paused: it may be running without its secret."""
        launch_id = launch.launch_id
        self._silent[launch_id] = self._silent.get(launch_id, 0) + 1
        current = self._ledger.find(launch_id)
        if current is None or current.state not in BEFORE_INJECTED:
            return
        if self._silent[launch_id] < self._limits.silent_checks:
            return
        why = PlatformFailed(
            Reason.HYPERVISOR_FAILED, f"the machine's monitor was silent {self._silent[launch_id]} times in a row"
        )
        try:
            await self._custody.end(current, _E.FAILED, Failure.of(why))
        except SevattestError as error:
            self._log.error("launch.end_failed", launch_id=launch_id, error=error)

    def _watch(self, launch_id: UUID, machine: Machine) -> None:
        self._keep(asyncio.create_task(self._note_death(launch_id, machine)))

    def _keep(self, task: asyncio.Task[None]) -> None:
        """Hold a reference to a task while it runs, since asyncio does not; what goes wrong in it is logged."""
        self._tasks.add(task)
        task.add_done_callback(self._note_end)

    def _note_end(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._log.error("supervisor.defect", error=error)

    async def _note_death(self, launch_id: UUID, machine: Machine) -> None:
        await machine.wait_gone()
        # A step that is under way finds out by itself.
        async with self._ledger.lock(launch_id):
            launch = self._ledger.find(launch_id)
            if launch is None or launch.is_final or self._custody.machine(launch_id) is not machine:
                return
            try:
                await self._custody.gone(launch)
            except SevattestError as error:
                self._log.error("launch.end_failed", launch_id=launch_id, error=error)
