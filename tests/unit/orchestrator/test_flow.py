"""The seven steps over fakes of both services: order, repeats, refusals, giving up."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from uuid import UUID

import pytest

from common.errors import (
    LimitExceeded,
    PlatformFailed,
    Reason,
    Refused,
    SevattestError,
    Unauthenticated,
    Unavailable,
    WrongState,
)
from common.ids import step_request_id
from orchestrator.drivers.base import Evidence
from orchestrator.flow import CALL_LIMIT, Launch, Order, Outcome, Patience, Step, StepResult
from tests.unit.orchestrator.fakes import FakeHost, FakeOwner, FakeTime, Faults, lost, many

ORDER = Order(guest="web", workload="shop", request_id=UUID("0b9c5c1e-7c43-4b0e-8a51-1c3f3c9b6c11"), timeout=60)
STEPS = list(Step)
MUTATING = [Step.BEGIN, Step.START, Step.RELEASE, Step.INJECT, Step.RESUME]
HOST_STEPS = {Step.EXPORT, Step.START, Step.MEASURE, Step.INJECT, Step.RESUME}


def unreachable() -> Unavailable:
    return Unavailable(Reason.UNREACHABLE, "cannot be reached")


@dataclass
class Stage:
    """Two fakes, a clock and what the flow told while it ran."""

    host: FakeHost = field(default_factory=FakeHost)
    owner: FakeOwner = field(default_factory=FakeOwner)
    time: FakeTime = field(default_factory=FakeTime)
    told: list[StepResult] = field(default_factory=list)
    repeats: list[tuple[Step, Reason, float]] = field(default_factory=list)

    def launch(self, order: Order = ORDER, patience: Patience | None = None) -> Launch:
        return Launch(
            host=self.host,
            owner=self.owner,
            order=order,
            patience=patience or Patience(),
            on_step=lambda result, _outcome: self.told.append(result),
            on_repeat=lambda step, error, wait: self.repeats.append((step, error.reason, wait)),
            clock=self.time.clock,
            sleep=self.time.sleep,
        )

    async def run(self, order: Order = ORDER) -> Outcome:
        return await self.launch(order).run()

    def faults(self, step: Step) -> Faults:
        return self.host.faults if step in HOST_STEPS else self.owner.faults

    @property
    def machine(self) -> str | None:
        return next(iter(self.host.machines.values()), None)

    @property
    def launch_state(self) -> str | None:
        return next(iter(self.owner.launches.values()), None)


@pytest.fixture
def stage() -> Stage:
    return Stage()


async def test_seven_steps_in_order_end_with_a_running_guest(stage: Stage) -> None:
    outcome = await stage.run()
    assert outcome.running
    assert outcome.state == "running"
    assert [result.step for result in outcome.steps] == STEPS
    assert stage.told == list(outcome.steps)
    assert stage.machine == "resumed"
    assert stage.launch_state == "released"
    assert "abort" not in stage.host.faults.calls
    assert "abandon" not in stage.owner.faults.calls


async def test_request_ids_follow_from_the_launch_id_so_that_a_restarted_orchestrator_repeats(stage: Stage) -> None:
    first = await stage.run()
    again = await stage.run()
    assert again.running
    assert first.session
    assert again.session
    assert again.session.launch_id == first.session.launch_id
    assert stage.host.spawned == 1
    assert len(stage.owner.packets) == 1
    launch_id = first.session.launch_id
    assert stage.host._seen["start", launch_id] == step_request_id(launch_id, "start")


async def test_another_request_id_begins_another_launch(stage: Stage) -> None:
    await stage.run()
    other = Order(guest="web", workload="shop", request_id=UUID("11111111-7c43-4b0e-8a51-1c3f3c9b6c11"))
    await stage.run(other)
    assert len(stage.owner.launches) == 2
    assert stage.host.spawned == 2


@pytest.mark.parametrize("step", STEPS)
async def test_a_step_that_cannot_be_reached_is_repeated_until_it_can(stage: Stage, step: Step) -> None:
    stage.faults(step).before[step] = many(unreachable, 3)
    outcome = await stage.run()
    assert outcome.running
    taken = next(result for result in outcome.steps if result.step == step)
    assert taken.attempts == 4
    assert stage.repeats == [(step, Reason.UNREACHABLE, wait) for wait in (0.25, 0.5, 1.0)]
    assert stage.host.spawned == 1
    assert len(stage.owner.packets) == 1


@pytest.mark.parametrize("step", MUTATING)
async def test_a_step_whose_answer_is_lost_is_repeated_and_happens_once(stage: Stage, step: Step) -> None:
    stage.faults(step).after[step] = [lost(), lost()]
    outcome = await stage.run()
    assert outcome.running
    assert len(stage.owner.launches) == 1
    assert len(stage.owner.packets) == 1
    assert stage.host.spawned == 1


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(
    "error",
    [
        Refused(Reason.CALLER_NOT_ALLOWED, "no"),
        WrongState(Reason.WRONG_STATE, "not now"),
        LimitExceeded(Reason.TOO_MANY_REQUESTS, "too many"),
        PlatformFailed(Reason.FIRMWARE_FAILED, "failed"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_any_other_error_stops_at_once_and_gives_up_both_sides(
    stage: Stage, step: Step, error: SevattestError
) -> None:
    stage.faults(step).before[step] = [error]
    outcome = await stage.run()
    assert outcome.error is error
    assert not outcome.running
    assert outcome.steps[-1].step == step
    assert outcome.steps[-1].error is error
    assert stage.time.slept == []
    assert stage.machine in {None, "aborted"}
    assert stage.launch_state != "open"
    if step not in {Step.EXPORT, Step.BEGIN}:
        assert "abort" in stage.host.faults.calls


async def test_a_refused_measurement_leaves_no_packet_and_no_machine(stage: Stage) -> None:
    stage.owner.expected = b"x" * 48
    outcome = await stage.run()
    assert outcome.state == "refused"
    assert outcome.error
    assert outcome.error.reason is Reason.MEASUREMENT_REFUSED
    assert outcome.error.fields["audit_id"] == "7"
    assert outcome.receipt is None
    assert stage.owner.packets == []
    assert stage.machine == "aborted"
    assert stage.launch_state == "refused"


async def test_the_first_error_counts_even_when_giving_up_fails_too(stage: Stage) -> None:
    stage.faults(Step.INJECT).before[Step.INJECT] = [PlatformFailed(Reason.FIRMWARE_FAILED, "first")]
    stage.host.faults.before["abort"] = [unreachable()]
    outcome = await stage.run()
    assert outcome.error
    assert outcome.error.message == "first"


async def test_the_verifier_hears_why_a_launch_was_given_up(stage: Stage) -> None:
    stage.faults(Step.START).before[Step.START] = [PlatformFailed(Reason.HYPERVISOR_FAILED, "no machine")]
    await stage.run()
    assert list(stage.owner.claims.values()) == [Reason.HYPERVISOR_FAILED]


async def test_patience_ends_and_the_launch_is_given_up(stage: Stage) -> None:
    stage.faults(Step.MEASURE).before[Step.MEASURE] = many(unreachable)
    outcome = await stage.run()
    assert outcome.error
    assert outcome.error.reason is Reason.UNREACHABLE
    assert outcome.steps[-1].attempts == Patience().attempts
    assert stage.time.slept == Patience().waits()
    assert stage.machine == "aborted"
    assert stage.launch_state == "abandoned"


async def test_the_overall_timeout_bounds_the_repeats(stage: Stage) -> None:
    stage.faults(Step.MEASURE).before[Step.MEASURE] = many(unreachable)
    outcome = await stage.run(Order(guest="web", workload="shop", request_id=ORDER.request_id, timeout=2))
    assert outcome.error
    assert stage.time.now < 2


async def test_no_step_is_asked_for_after_the_time_has_run_out(stage: Stage) -> None:
    class Slow(FakeHost):
        async def export_chain(self, *, within: float) -> Evidence:
            assert within <= CALL_LIMIT
            stage.time.now += 100
            return await super().export_chain(within=within)

    stage.host = Slow()
    outcome = await stage.run()
    assert outcome.error
    assert outcome.error.reason is Reason.UNREACHABLE
    assert stage.owner.faults.calls == []


async def test_an_unknown_outcome_stays_unknown_when_the_other_side_then_vanishes(stage: Stage) -> None:
    faults = stage.faults(Step.INJECT)
    faults.after[Step.INJECT] = [lost()]

    class ThenGone(FakeHost):
        async def inject(self, *args: object, **keywords: object) -> None:
            if "inject" in self.faults.calls:
                raise unreachable()
            await super().inject(*args, **keywords)  # type: ignore[arg-type]  # the same arguments

    stage.host = ThenGone(faults=faults)
    outcome = await stage.run()
    assert outcome.error
    assert outcome.error.reason is Reason.OUTCOME_UNKNOWN
    assert outcome.state == "unknown"


@pytest.mark.parametrize(
    "error",
    [
        Unauthenticated(Reason.UNAUTHENTICATED, "the certificate expired meanwhile"),
        Refused(Reason.ROLE_NOT_ALLOWED, "not this listener"),
        LimitExceeded(Reason.TOO_MANY_REQUESTS, "too many"),
        PlatformFailed(Reason.INTERNAL, "the service failed"),
    ],
    ids=lambda error: str(error.reason),
)
@pytest.mark.parametrize("step", MUTATING)
async def test_an_unknown_outcome_stays_unknown_when_the_repeat_was_not_looked_at(
    stage: Stage, step: Step, error: SevattestError
) -> None:
    faults = stage.faults(step)
    faults.after[step] = [lost()]
    faults.before[step] = []
    faults.before["abort"] = [unreachable()]

    async def then_not_looked_at(_wait: float) -> None:
        faults.before[step].append(error)

    launch = stage.launch()
    launch.sleep = then_not_looked_at
    outcome = await launch.run()
    assert outcome.error
    assert outcome.error.reason is Reason.OUTCOME_UNKNOWN
    assert outcome.error.__cause__ is error
    assert outcome.state == "unknown"


async def test_a_repeat_that_was_looked_at_says_what_became_of_an_unknown_outcome(stage: Stage) -> None:
    error = WrongState(Reason.GUEST_GONE, "the machine has ended")
    stage.host.faults.before["resume"] = [lost(), error]
    outcome = await stage.run()
    assert outcome.error is error


async def test_a_peer_that_turns_certificates_down_is_not_asked_again(stage: Stage) -> None:
    error = Unavailable(Reason.UNREACHABLE, "no handshake", hint="look at the CA")
    stage.faults(Step.EXPORT).before[Step.EXPORT] = [error]
    outcome = await stage.run()
    assert outcome.error is error
    assert stage.time.slept == []


@pytest.mark.parametrize("step", STEPS)
async def test_a_cancelled_orchestrator_gives_up_both_sides(stage: Stage, step: Step) -> None:
    faults = stage.faults(step)
    faults.hanging.add(step)
    task = asyncio.create_task(stage.launch().run())
    await asyncio.wait_for(faults.hangs.wait(), 5)
    faults.hanging.clear()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert stage.machine in {None, "aborted"}
    assert stage.launch_state != "open"


@pytest.mark.parametrize("error", [None, WrongState(Reason.GUEST_BUSY, "busy")])
async def test_a_signal_while_it_gives_up_waits_until_both_sides_were_told(
    stage: Stage, error: SevattestError | None
) -> None:
    told = asyncio.Event()

    class Slow(FakeHost):
        async def abort(self, *args: object, **keywords: object) -> None:
            self.faults.hangs.set()
            await told.wait()
            await super().abort(*args, **keywords)  # type: ignore[arg-type]  # passes on

    stage.host = Slow()
    faults = stage.host.faults
    if error is None:
        faults.hanging.add("measure")
    else:
        faults.before["measure"] = [error]
    task = asyncio.create_task(stage.launch().run())
    await asyncio.wait_for(faults.hangs.wait(), 5)
    if error is None:
        faults.hangs.clear()
        task.cancel()
        await asyncio.wait_for(faults.hangs.wait(), 5)
    task.cancel()
    asyncio.get_running_loop().call_soon(told.set)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert stage.machine == "aborted"
    assert stage.launch_state == "abandoned"


async def test_a_launch_that_may_have_begun_unheard_is_abandoned(stage: Stage) -> None:
    class Deaf(FakeOwner):
        async def begin(self, *args: object, **keywords: object) -> object:  # type: ignore[override]  # passes on
            session = await super().begin(*args, **keywords)  # type: ignore[arg-type]  # passes on
            if self.faults.calls.count("begin") <= Patience().attempts:
                raise lost()
            return session

    stage.owner = Deaf()
    outcome = await stage.run()
    assert outcome.error
    assert outcome.error.reason is Reason.OUTCOME_UNKNOWN
    assert stage.launch_state == "abandoned"


async def test_a_platform_refused_at_begin_starts_nothing(stage: Stage) -> None:
    stage.faults(Step.BEGIN).before[Step.BEGIN] = [Refused(Reason.UNTRUSTED_ROOT, "not a pinned root", audit_id="3")]
    outcome = await stage.run()
    assert outcome.state == "refused"
    assert outcome.session is None
    assert stage.host.machines == {}
    assert "abort" not in stage.host.faults.calls


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (WrongState(Reason.LAUNCH_EXPIRED, "too late"), "expired"),
        (WrongState(Reason.LAUNCH_ABANDONED, "given up"), "abandoned"),
        (WrongState(Reason.ALREADY_RELEASED, "spent"), "released"),
        (WrongState(Reason.GUEST_GONE, "gone"), "failed"),
        (PlatformFailed(Reason.INTERNAL, "defect"), "failed"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.reason,
)
async def test_the_outcome_names_the_state_that_refused(stage: Stage, error: SevattestError, state: str) -> None:
    stage.faults(Step.RELEASE).before[Step.RELEASE] = [error]
    assert (await stage.run()).state == state
