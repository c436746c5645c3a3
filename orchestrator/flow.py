"""The main job: one guest through the seven steps of an attested launch, over its host and its owner.

Theory of operation. The steps are taken in the one order that there is; each takes what the step before answered, so
that no other order can be written:

    1 export    host   certificates of the platform
    2 begin     owner  platform verified, session made         -> launch id
    3 start     host   guest up and paused, under that session
    4 measure   host   what the platform's firmware measured
    5 release   owner  measurement judged, secret packet made
    6 inject    host   packet handed to the firmware
    7 resume    host   guest runs

A step that ends in `OutcomeUnknown` or `Unavailable` is repeated with the same request id: both services answer a
repeat as they answered the first, so a repeat can never start a second guest or release a second packet. The ids are
derived from the launch id, so that an orchestrator that was itself restarted repeats the same requests. Every other
error ends the launch, and so does the end of patience; then both sides are told to give it up, as well as that goes.
The verifier lets every launch expire, and the agent resumes no guest without its secret, so a launch whose orchestrator
vanishes is lost and not unsafe.

Prints nothing, reads no clock and no file of its own; holds nothing secret.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TypeVar
from uuid import UUID

from common.errors import OutcomeUnknown, Reason, SevattestError, Unavailable, exit_code
from common.ids import step_request_id
from common.rpc.steps import shielded
from orchestrator.drivers.base import SAYS_NOTHING, Evidence, Host, Measured, Owner, Packet, Session

_T = TypeVar("_T")

# Neither service accepts a deadline further away than 60 s.
CALL_LIMIT = 55.0
# What giving up may take after the first error; the launch's own time may be used up by then.
ABORT_LIMIT = 10.0


class Step(StrEnum):
    """The steps of a launch, in order; the names are part of what `sevattest launch --json` prints."""

    EXPORT = "export"
    BEGIN = "begin"
    START = "start"
    MEASURE = "measure"
    RELEASE = "release"
    INJECT = "inject"
    RESUME = "resume"


@dataclass(frozen=True, kw_only=True)
class Order:
    """What is to be launched.

    Attributes:
        guest: the guest's name in the agent's configuration.
        workload: the workload's name at the verifier.
        grant: the grant to spend, where the caller may spend more than one.
        request_id: of the begin step; the same again repeats the same launch.
        timeout: seconds for the whole launch.
    """

    guest: str
    workload: str
    grant: str | None = None
    request_id: UUID
    timeout: float = 120.0


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How a step is repeated: after `first` seconds, each wait twice the last up to `longest`, `attempts` in all.

    The defaults span about 20 s, which is what a service needs to be started anew by whoever looks after it.
    """

    first: float = 0.25
    longest: float = 4.0
    attempts: int = 9

    def waits(self) -> list[float]:
        """The waits between the attempts, in seconds."""
        return [min(self.first * 2**turn, self.longest) for turn in range(self.attempts - 1)]


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """A step that was taken: its time in seconds with all waits, how often it was asked for, and how it failed."""

    step: Step
    seconds: float
    attempts: int
    error: SevattestError | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a launch went, as far as it went; what was not reached is None."""

    order: Order
    steps: tuple[StepResult, ...] = ()
    evidence: Evidence | None = None
    session: Session | None = None
    measured: Measured | None = None
    receipt: str | None = None
    error: SevattestError | None = None

    @property
    def running(self) -> bool:
        """Whether the guest runs, attested, with its secret."""
        return self.error is None and len(self.steps) == len(Step)

    @property
    def state(self) -> str:
        """`running`, or how the launch ended: `refused`, `expired`, `abandoned`, `released`, `failed`, `unknown`."""
        if self.error is None:
            return "running" if self.running else "unknown"
        if named := _STATE_OF.get(self.error.reason):
            return named
        return {1: "refused", 4: "unknown"}.get(exit_code(self.error), "failed")


# Where the verifier's own word for the launch's state says more than the class of the error.
_STATE_OF = {
    Reason.LAUNCH_EXPIRED: "expired",
    Reason.LAUNCH_ABANDONED: "abandoned",
    Reason.ALREADY_RELEASED: "released",
}


@dataclass(kw_only=True)
class Launch:
    """One run of the flow.

    Attributes:
        host: the host's side.
        owner: the guest owner's side.
        order: what is to be launched.
        patience: how a step is repeated.
        on_step: told of each step when it has ended.
        on_repeat: told of each repeat before the wait: the step, the error, the wait in seconds.
        clock: seconds, monotonic.
        sleep: waits that many seconds.
    """

    host: Host
    owner: Owner
    order: Order
    patience: Patience = field(default_factory=Patience)
    on_step: Callable[[StepResult, Outcome], None] = lambda _result, _outcome: None
    on_repeat: Callable[[Step, SevattestError, float], None] = lambda _step, _error, _wait: None
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep

    def __post_init__(self) -> None:
        self._ends = self.clock() + self.order.timeout
        self._outcome = Outcome(order=self.order)

    async def run(self) -> Outcome:
        """Take the seven steps.

        Returns:
            How far it came; `error` is the first error, after which both sides were told to give the launch up.

        Raises:
            asyncio.CancelledError: the caller was cancelled; both sides were told to give the launch up.
        """
        try:
            await self._steps()
        except SevattestError as error:
            self._outcome = replace(self._outcome, error=error)
            # A signal waits for it: whoever sends one is told that the launch was given up.
            await shielded(self._give_up(error.reason))
        except BaseException:
            # Ctrl-C, or a defect: nobody goes on with this launch, and no guest is left behind paused.
            await shielded(self._give_up(None))
            raise
        return self._outcome

    async def _steps(self) -> None:
        host, owner, order = self.host, self.owner, self.order

        evidence = await self._take(Step.EXPORT, lambda within: host.export_chain(within=within))
        session = await self._take(Step.BEGIN, lambda within: self._begin(evidence, within))
        launch_id = session.launch_id

        def request_id(step: Step) -> UUID:
            return step_request_id(launch_id, step)

        await self._take(
            Step.START,
            lambda within: host.start(session, order.guest, request_id=request_id(Step.START), within=within),
        )
        measured = await self._take(Step.MEASURE, lambda within: host.measure(launch_id, within=within))
        packet = await self._take(
            Step.RELEASE,
            lambda within: owner.release(launch_id, measured, request_id=request_id(Step.RELEASE), within=within),
        )
        await self._take(
            Step.INJECT,
            lambda within: host.inject(launch_id, packet, request_id=request_id(Step.INJECT), within=within),
        )
        await self._take(
            Step.RESUME,
            lambda within: host.resume(launch_id, request_id=request_id(Step.RESUME), within=within),
        )

    def _begin(self, evidence: Evidence, within: float) -> Awaitable[Session]:
        order = self.order
        return self.owner.begin(evidence, order.workload, order.grant, request_id=order.request_id, within=within)

    async def _take(self, step: Step, call: Callable[[float], Awaitable[_T]]) -> _T:
        """Take one step, repeating it where that is safe, and write down its time."""
        began = self.clock()
        waits = self.patience.waits()
        attempts = 0
        unknown: OutcomeUnknown | None = None
        while True:
            attempts += 1
            try:
                answer = await call(self._time_left(step))
            except (OutcomeUnknown, Unavailable) as error:
                if isinstance(error, OutcomeUnknown):
                    unknown = error
                wait = waits[attempts - 1] if attempts <= len(waits) else self.order.timeout
                if not _may_heal(step, error) or self.clock() + wait >= self._ends:
                    # A later "cannot be reached" does not take back that an earlier attempt may have worked.
                    self._ended(step, began, attempts, unknown or error)
                    raise (unknown or error) from error
                self.on_repeat(step, error, wait)
                await self.sleep(wait)
            except SevattestError as error:
                if unknown is not None and error.reason in SAYS_NOTHING:
                    self._ended(step, began, attempts, unknown)
                    raise unknown from error
                self._ended(step, began, attempts, error)
                raise
            else:
                self._keep(answer)
                self._ended(step, began, attempts, None)
                return answer

    def _time_left(self, step: Step) -> float:
        left = self._ends - self.clock()
        if left <= 0:
            raise Unavailable(Reason.UNREACHABLE, f"the time for the whole launch ran out before the step {step}")
        return min(left, CALL_LIMIT)

    def _keep(self, answer: object) -> None:
        match answer:
            case Evidence():
                self._outcome = replace(self._outcome, evidence=answer)
            case Session():
                self._outcome = replace(self._outcome, session=answer)
            case Measured():
                self._outcome = replace(self._outcome, measured=answer)
            case Packet():
                self._outcome = replace(self._outcome, receipt=answer.receipt)
            case _:
                pass

    def _ended(self, step: Step, began: float, attempts: int, error: SevattestError | None) -> None:
        result = StepResult(step=step, seconds=self.clock() - began, attempts=attempts, error=error)
        self._outcome = replace(self._outcome, steps=(*self._outcome.steps, result))
        self.on_step(result, self._outcome)

    async def _give_up(self, reason: Reason | None) -> None:
        """Tell both sides, at once, as well as it goes: what went wrong before is what the caller hears of."""
        session = self._outcome.session
        if session is None and not (session := await self._begun_unheard(reason)):
            return
        launch_id = session.launch_id
        telling = [self.host.abort(launch_id, request_id=step_request_id(launch_id, "abort"), within=ABORT_LIMIT)]
        if self._outcome.receipt is None:
            request_id = step_request_id(launch_id, "abandon")
            telling.append(self.owner.abandon(launch_id, reason, request_id=request_id, within=ABORT_LIMIT))
        await asyncio.gather(*telling, return_exceptions=True)

    async def _begun_unheard(self, reason: Reason | None) -> Session | None:
        """The launch that may have begun although its answer was lost: begin repeated, to learn the id to abandon."""
        evidence = self._outcome.evidence
        if evidence is None or reason not in {None, Reason.OUTCOME_UNKNOWN}:
            return None
        with contextlib.suppress(SevattestError):
            return await self._begin(evidence, ABORT_LIMIT)
        return None


def _may_heal(step: Step, error: SevattestError) -> bool:
    """Whether asking again may help. A certificate that a side turned down at first contact will not get better."""
    return "hint" not in error.fields or step not in {Step.EXPORT, Step.BEGIN}
