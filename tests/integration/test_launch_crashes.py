"""Killing either service, or the orchestrator, at any step: no secret twice, no guest that runs unattested.

Real processes, killed with SIGKILL and started again; the orchestrator's flow repeats the same requests.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from uuid import uuid4

import pytest

from common.errors import NotFound, OutcomeUnknown, Reason, SevattestError, Unavailable, WrongState
from common.ids import step_request_id
from orchestrator.demo.processes import Service
from orchestrator.demo.site import GUEST, HostPlay
from orchestrator.demo.stack import Stack
from orchestrator.flow import Order, Outcome, Patience, Step
from tests.support.stack import Crash, Sides, order, running_stack, sides

STEPS = list(Step)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack({GUEST: HostPlay()}) as running:
        yield running


@pytest.fixture
async def both(stack: Stack) -> AsyncIterator[Sides]:
    for service in (stack.agent, stack.verifier):
        if not service.running:
            stack.restart(service)
    stack.end_guest(GUEST)
    stack.site.serial(GUEST).unlink(missing_ok=True)
    async with sides(stack) as reached:
        yield reached


def service_of(stack: Stack, name: str) -> Service:
    return {"agent": stack.agent, "verifier": stack.verifier}[name]


def crash_and_return(stack: Stack, name: str) -> None:
    service = service_of(stack, name)
    service.kill()
    stack.restart(service)


async def check_attested_once(both: Sides, outcome: Outcome, crash: Crash) -> None:
    """The guest runs, has read the owner's secret once, and nobody gets it in another form."""
    assert outcome.error is None, outcome.error
    assert outcome.running
    assert outcome.session
    assert outcome.measured
    assert len(crash.packets) == 1
    secrets = both.secrets_read(GUEST, wait=True)
    assert [secret.data for secret in secrets] == [both.stack.site.secret.read_bytes()]
    with pytest.raises(WrongState) as refusal:
        await both.owner.release(outcome.session.launch_id, outcome.measured, request_id=uuid4(), within=20)
    assert refusal.value.reason is Reason.ALREADY_RELEASED
    assert await both.owner.state(outcome.session.launch_id, within=20) == "released"
    assert await both.host.state(outcome.session.launch_id, within=20) == "resumed"


async def launch_once(both: Sides, asked: Order, crash: Crash) -> Outcome:
    """Launch, check that the guest is attested whatever crashed, and end it."""
    outcome = await both.launch(asked, crash=crash).run()
    try:
        await check_attested_once(both, outcome, crash)
    finally:
        await both.end(outcome)
    return outcome


@pytest.mark.parametrize("name", ["agent", "verifier"])
@pytest.mark.parametrize("step", STEPS)
async def test_a_service_killed_before_a_step_and_restarted_leaves_one_attested_guest(
    both: Sides, name: str, step: Step
) -> None:
    crash = Crash(before={step: lambda: crash_and_return(both.stack, name)})
    await launch_once(both, order(GUEST), crash)


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("verifier", Step.BEGIN),
        ("agent", Step.START),
        ("agent", Step.MEASURE),
        ("verifier", Step.RELEASE),
        ("agent", Step.INJECT),
        ("agent", Step.RESUME),
    ],
)
async def test_a_service_killed_before_its_answer_arrives_answers_the_repeat_alike(
    both: Sides, name: str, step: Step
) -> None:
    crash = Crash(after={step: lambda: crash_and_return(both.stack, name)})
    outcome = await launch_once(both, order(GUEST), crash)
    assert next(result.attempts for result in outcome.steps if result.step is step) > 1


@pytest.mark.parametrize("name", ["agent", "verifier"])
@pytest.mark.parametrize("step", STEPS)
async def test_a_service_that_stays_away_ends_the_launch_without_a_guest_that_runs_unattested(
    both: Sides, name: str, step: Step
) -> None:
    service = service_of(both.stack, name)
    needed_later = name == "agent" or STEPS.index(step) <= STEPS.index(Step.RELEASE)
    crash = Crash(before={step: service.kill})
    launch = both.launch(order(GUEST), crash=crash)
    launch.patience = Patience(first=0.05, attempts=2)
    outcome = await launch.run()
    assert (outcome.error is not None) == needed_later
    if outcome.error:
        assert isinstance(outcome.error, (Unavailable, OutcomeUnknown))
        assert both.secrets_read(GUEST) == []
    both.stack.restart(service)
    # The restarted agent still knows the launch, and its orchestrator may still end it.
    async with sides(both.stack) as anew:
        await anew.end(outcome)
        if outcome.session:
            try:
                assert await anew.host.state(outcome.session.launch_id, within=20) in {"aborted", "stopped", "failed"}
            except NotFound:
                assert STEPS.index(step) <= STEPS.index(Step.START)
    assert not both.stack.machine_runs(GUEST)


@pytest.mark.parametrize("name", ["agent", "verifier"])
@pytest.mark.parametrize("after", [0.01, 0.06, 0.20, 0.28, 0.36])
async def test_a_service_killed_in_the_middle_of_whatever_it_does_breaks_no_promise(
    both: Sides, name: str, after: float
) -> None:
    # Where in the launch this falls differs from run to run; what must hold holds everywhere.
    timer = threading.Timer(after, crash_and_return, [both.stack, name])
    crash = Crash()
    timer.start()
    try:
        outcome = await both.launch(order(GUEST), crash=crash).run()
    finally:
        await asyncio.to_thread(timer.join)
    assert len(crash.packets) <= 1
    async with sides(both.stack) as anew:
        try:
            if outcome.error is None:
                await check_attested_once(anew, outcome, crash)
            else:
                assert both.secrets_read(GUEST) == []
        finally:
            await anew.end(outcome)
    assert not both.stack.machine_runs(GUEST)


@pytest.mark.parametrize("last", STEPS)
async def test_an_orchestrator_killed_after_a_step_goes_on_under_the_same_request_id(both: Sides, last: Step) -> None:
    asked = order(GUEST)
    session = await both.steps(asked, last)
    outcome = await launch_once(both, asked, Crash())
    if session:
        assert outcome.session == session


async def test_a_machine_that_dies_paused_ends_the_launch_and_releases_nothing(both: Sides) -> None:
    crash = Crash(before={Step.MEASURE: lambda: both.stack.end_guest(GUEST)})
    outcome = await both.launch(order(GUEST), crash=crash).run()
    assert outcome.error
    assert outcome.error.reason is Reason.GUEST_GONE
    assert crash.packets == set()
    assert outcome.session
    assert await both.owner.state(outcome.session.launch_id, within=20) == "abandoned"


async def test_a_machine_that_dies_with_the_packet_on_its_way_never_runs(both: Sides) -> None:
    crash = Crash(before={Step.INJECT: lambda: both.stack.end_guest(GUEST)})
    outcome = await both.launch(order(GUEST), crash=crash).run()
    assert outcome.error
    assert outcome.error.reason is Reason.GUEST_GONE
    assert both.secrets_read(GUEST) == []
    assert not both.stack.machine_runs(GUEST)


async def test_a_packet_is_of_no_use_to_a_second_launch_of_the_same_guest(both: Sides) -> None:
    first = order(GUEST)
    session = await both.steps(first, Step.MEASURE)
    assert session
    measured = await both.host.measure(session.launch_id, within=20)
    packet = await both.owner.release(
        session.launch_id, measured, request_id=step_request_id(session.launch_id, Step.RELEASE), within=20
    )
    await both.end(session)
    other = await both.steps(order(GUEST), Step.MEASURE)
    assert other
    with pytest.raises(SevattestError) as refusal:
        await both.host.inject(
            other.launch_id, packet, request_id=step_request_id(other.launch_id, Step.INJECT), within=20
        )
    assert refusal.value.reason is Reason.FIRMWARE_BAD_MEASUREMENT
    assert both.secrets_read(GUEST) == []
    await both.end(other)
