"""The machines of the launches: what they say against what the records say, and how they are ended.

Everything here is called with the launch's lock held. A machine is believed only about itself: a launch moves on what
`query-sev` and `query-status` say, never on an assumption about a command whose answer got lost.

`observe` is told each point that a step passes. In a service that is the log; the crash tests put a kill there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, Protocol, TypeVar
from uuid import UUID

from common.clock import Clock
from common.errors import OutcomeUnknown, PlatformFailed, Reason, SevattestError, Unavailable, WrongState
from common.telemetry.log import Log
from host_agent.firmware_errors import printable
from host_agent.hypervisors.base import Inspection, Machine
from host_agent.hypervisors.console import LOG
from host_agent.launches.launch import Ending, Failure, Launch
from host_agent.launches.ledger import Ledger
from host_agent.launches.state import BEFORE_INJECTED, Event, LaunchState

_S, _E = LaunchState, Event
_T = TypeVar("_T")
# A machine whose monitor broke off has this many seconds to be gone, before it counts as alive.
_DYING = 1.0


class Observer(Protocol):
    """Is told where a step stands, before and after each thing that cannot be taken back."""

    def __call__(self, point: str, launch_id: UUID, /) -> None:
        """`point` was reached."""
        ...


class Custody:
    """Keeps the machines of the launches; see the module.

    Attributes:
        on_machine: told of each machine that is taken over; the supervisor watches it.
    """

    def __init__(self, *, ledger: Ledger, clock: Clock, log: Log, observe: Observer) -> None:
        self._ledger = ledger
        self._clock = clock
        self._log = log
        self.observe = observe
        self._machines: dict[UUID, Machine] = {}
        self.on_machine: Callable[[UUID, Machine], None] = lambda _launch_id, _machine: None

    def take(self, launch_id: UUID, machine: Machine) -> None:
        """Take a machine over."""
        self._machines[launch_id] = machine
        self.on_machine(launch_id, machine)

    def machine(self, launch_id: UUID) -> Machine | None:
        """The launch's machine, if there is one."""
        return self._machines.get(launch_id)

    @property
    def machines(self) -> int:
        """How many machines there are."""
        return len(self._machines)

    def close(self) -> None:
        """Let go of all machines, which go on."""
        for machine in self._machines.values():
            machine.close()
        self._machines.clear()

    async def settle(self, launch: Launch) -> tuple[Launch, Inspection | None]:
        """Bring the record in line with what the machine says.

        Returns:
            The launch as it stands then, and what the machine said, if it was asked.

        Raises:
            SevattestError: the machine is there and does not say.
        """
        machine = self._machines.get(launch.launch_id)
        if machine is None or not machine.alive:
            return await self.gone(launch), None
        if launch.ending is not None:
            return await self.end(launch, launch.ending.event, launch.ending.failure), None
        if launch.state is _S.RESUMED:
            return launch, None
        try:
            seen = await machine.inspect()
        except Unavailable:
            if not await _dying(machine):
                raise
            return await self.gone(launch), None
        return await self._believe(launch, seen), seen

    async def _believe(self, launch: Launch, seen: Inspection) -> Launch:
        if seen.has_run and launch.state in BEFORE_INJECTED:
            why = WrongState(Reason.GUEST_NOT_PAUSED, "the guest was running before it had its secret")
            return await self.end(launch, _E.FAILED, Failure.of(why))
        if seen.has_run:
            return await self._ledger.save(launch.moved(_E.RESUMED, self._clock.now()))
        if launch.state is _S.RESUMING:
            return await self._ledger.save(launch.moved(_E.NOT_RESUMED, self._clock.now()))
        return launch

    async def check_started(self, launch: Launch) -> Launch:
        """Wait for a starting machine, see that it is what was asked for, and write down that it is paused.

        Raises:
            SevattestError: it is not; the launch is as it was.
        """
        machine = self._machines[launch.launch_id]
        await machine.wait_ready()
        seen = await machine.inspect()
        if not seen.enabled:
            raise PlatformFailed(Reason.HYPERVISOR_FAILED, "SEV is not enabled in the machine")
        if seen.policy != launch.policy:
            raise PlatformFailed(
                Reason.HYPERVISOR_FAILED,
                f"the machine has the policy 0x{seen.policy:x}, asked for was 0x{launch.policy:x}",
            )
        if not seen.is_paused:
            raise WrongState(
                Reason.GUEST_NOT_PAUSED,
                f"the machine is {printable(seen.status)} ({seen.state}), not paused before its first instruction",
            )
        self.observe("start: machine checked", launch.launch_id)
        # Where somebody else started it, only now is it known which process it is.
        launch = await self._ledger.save(launch.moved(_E.STARTED, self._clock.now(), machine=machine.identity))
        self.observe("start: paused", launch.launch_id)
        machine.forget_inputs()
        self.observe("start: done", launch.launch_id)
        return launch

    async def hand_over(self, launch: Launch, step: Coroutine[Any, Any, None]) -> None:
        """Run a step that hands something to the firmware; an answer against it ends the launch.

        Raises:
            SevattestError: what the step raised, or that the machine is gone.
        """
        machine = self._machines[launch.launch_id]
        try:
            await step
        except (OutcomeUnknown, Unavailable):
            if await _dying(machine):
                raise (await self.gone(launch)).refusal("the step") from None
            raise
        except SevattestError as error:
            await self.end(launch, _E.FAILED, Failure.of(error))
            raise

    async def handed_over(self, launch: Launch) -> Launch:
        """Write down that the firmware took the packet.

        Raises:
            OutcomeUnknown: that cannot be written down; the launch stays in INJECTING.
        """
        try:
            return await self._ledger.save(launch.moved(_E.INJECTED, self._clock.now()))
        except Unavailable as error:
            raise OutcomeUnknown(
                Reason.OUTCOME_UNKNOWN, f"the packet was handed over; {error.message}; send the same bytes again"
            ) from error

    async def look(self, launch: Launch, step: Coroutine[Any, Any, _T]) -> _T:
        """Run a step that only reads; the machine's death under it ends the launch, nothing else does.

        Raises:
            SevattestError: what the step raised, or that the machine is gone.
        """
        machine = self._machines[launch.launch_id]
        try:
            return await step
        except Unavailable:
            if await _dying(machine):
                raise (await self.gone(launch)).refusal("the step") from None
            raise

    async def resume(self, launch: Launch) -> Launch:
        """Resume a launch in RESUMING, and see what came of it.

        Returns:
            The launch, `RESUMED`, or `STOPPED` if the guest's life was short.

        Raises:
            OutcomeUnknown: the machine does not say; the launch stays in RESUMING.
            SevattestError: it did not resume; the launch is back in `INJECTED`, or has ended.
        """
        machine = self._machines[launch.launch_id]
        try:
            await machine.resume()
        except SevattestError as error:
            self.observe("resume: answered", launch.launch_id)
            return await self._not_resumed(launch, error)
        self.observe("resume: answered", launch.launch_id)
        try:
            launch = await self._resumed(launch, machine)
        except Unavailable as error:  # it does not say, or what it says cannot be written down
            raise _resume_unknown() from error
        if launch.state is _S.INJECTED:
            raise PlatformFailed(Reason.HYPERVISOR_FAILED, "the guest is still paused after it was resumed")
        return launch

    async def _resumed(self, launch: Launch, machine: Machine) -> Launch:
        """What has become of a launch whose machine said that its guest runs."""
        try:
            seen = await machine.inspect()
        except SevattestError as error:
            if not await _dying(machine):
                raise _resume_unknown() from error
            # It said that the guest runs, and is gone: a short life, but a life.
            launch = await self._ledger.save(launch.moved(_E.RESUMED, self._clock.now()))
            return await self.gone(launch)
        return await self._believe(launch, seen)

    async def _not_resumed(self, launch: Launch, error: SevattestError) -> Launch:
        try:
            launch, _ = await self.settle(launch)
        except SevattestError as silence:
            raise _resume_unknown() from silence
        if launch.state is _S.RESUMED:
            return launch
        if launch.is_final:
            raise launch.refusal("ResumeGuest") from error
        if isinstance(error, OutcomeUnknown):
            # Asked, the machine says that it stands still: no longer unknown.
            raise PlatformFailed(Reason.HYPERVISOR_FAILED, "the guest was not resumed; ask again") from error
        raise error

    async def gone(self, launch: Launch) -> Launch:
        """Write down that the launch's machine has ended by itself, or as it was meant to."""
        if launch.ending is not None:
            return await self._close(launch, launch.ending.event, launch.ending.failure)
        failure = None
        if launch.state is not _S.RESUMED:
            failure = Failure.of(WrongState(Reason.GUEST_GONE, "the guest's machine has ended before the guest ran"))
        return await self._close(launch, _E.GONE, failure)

    async def end(self, launch: Launch, event: Event, failure: Failure | None) -> Launch:
        """End the launch's machine, and the launch with it: intent, deed, record.

        An end that was begun before stays what it was.

        Raises:
            Unavailable: `STORE_UNAVAILABLE`; the machine is ended, the record still says that it was to be.
        """
        if launch.ending is None:
            # A full disk must not keep a machine alive.
            with suppress(Unavailable):
                launch = await self._ledger.save(launch.amended(ending=Ending(event=event, failure=failure)))
        else:
            event, failure = launch.ending.event, launch.ending.failure
        self.observe("end: written down", launch.launch_id)
        return await self._close(launch, event, failure)

    async def _close(self, launch: Launch, event: Event, failure: Failure | None) -> Launch:
        """The end of a launch, once for all: no machine, a final record, no files."""
        machine = self._machines.get(launch.launch_id)
        if machine is not None:
            await machine.end()
        self.observe("end: machine gone", launch.launch_id)
        launch = await self._ledger.save(
            launch.moved(event, self._clock.now(), failure=failure, ending=None, machine=None)
        )
        self._machines.pop(launch.launch_id, None)
        if machine is not None:
            machine.close()
        await self.clear(launch)
        self.observe("end: done", launch.launch_id)
        self._log.info(
            "launch.ended",
            launch_id=launch.launch_id,
            guest=launch.guest,
            state=launch.state,
            reason=None if failure is None else failure.reason,
            text=None if failure is None else failure.message,
        )
        return launch

    async def clear(self, launch: Launch) -> None:
        """Remove the files of a launch that has ended."""
        # What the machine said last helps whoever wonders why it failed.
        keep = {LOG} if launch.state is _S.FAILED else set()
        await asyncio.to_thread(self._ledger.folders.clear, launch.launch_id, keep=keep)


async def _dying(machine: Machine) -> bool:
    """Whether the machine is gone, or will be in a moment: a monitor closes a little before its process ends."""
    with suppress(TimeoutError):
        async with asyncio.timeout(_DYING):
            await machine.wait_gone()
    return not machine.alive


def _resume_unknown() -> OutcomeUnknown:
    return OutcomeUnknown(Reason.OUTCOME_UNKNOWN, "nobody knows whether the guest was resumed; ask again")
