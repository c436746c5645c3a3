"""What anybody can have logged by calling: some lines of each caller, and how many more there were."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from common.telemetry.few_lines import CALLERS_MAX, LINES, PERIOD_S, FewLines
from tests.support.recording_log import RecordingLog

ALICE, BOB = "spiffe://a/orchestrator/alice", "spiffe://a/orchestrator/bob"
NO = {"method": "Begin", "outcome": "NO"}


class Stage:
    """Few lines, over a clock that stands still, and alarms that ring when they are told to."""

    def __init__(self) -> None:
        self.log, self.now = RecordingLog(), 1000.0
        self.alarms: list[tuple[float, Callable[[], None]]] = []
        self.few = FewLines(self.log.info, clock=lambda: self.now, later=self._later)

    def _later(self, seconds: float, ring: Callable[[], None]) -> None:
        self.alarms.append((self.now + seconds, ring))

    def ring(self) -> None:
        """What is due by now."""
        due = [each for at, each in self.alarms if at <= self.now]
        self.alarms = [(at, each) for at, each in self.alarms if at > self.now]
        for each in due:
            each()

    def call(self, caller: str | None, times: int, **like: str) -> None:
        for number in range(times):
            self.few.write("rpc", caller=caller, like={**NO, **like}, number=number)

    def lines(self) -> int:
        return len(self.log.named("rpc"))

    def more(self) -> list[tuple[object, ...]]:
        names = ("caller", "method", "outcome", "more", "seconds")
        return [tuple(each.fields[name] for name in names) for each in self.log.named("rpc.more")]


@pytest.fixture
def stage() -> Stage:
    return Stage()


def test_few_lines_are_all_written_as_they_are(stage: Stage) -> None:
    stage.call(ALICE, LINES)
    assert [each.fields for each in stage.log.named("rpc")] == [
        {"caller": ALICE, **NO, "number": number} for number in range(LINES)
    ]
    stage.now += PERIOD_S
    stage.ring()
    stage.call(ALICE, LINES)
    assert stage.lines() == 2 * LINES
    assert stage.more() == []
    assert stage.alarms == []


@pytest.mark.parametrize("caller", [ALICE, None], ids=["known", "unknown"])
def test_of_a_flood_some_are_written_and_the_rest_is_counted_when_the_period_is_over(
    stage: Stage, caller: str | None
) -> None:
    stage.call(caller, LINES + 100)
    stage.call(caller, 1, outcome="NEVER")
    assert (stage.lines(), stage.more()) == (LINES, [])
    stage.now += PERIOD_S - 1
    stage.ring()
    assert stage.more() == []
    stage.now += 1
    stage.ring()
    assert stage.more() == [(caller, "Begin", "NO", 100, 60), (caller, "Begin", "NEVER", 1, 60)]
    stage.call(caller, 1)
    assert stage.lines() == LINES + 1


def test_a_flood_leaves_others_their_lines(stage: Stage) -> None:
    stage.call(ALICE, 1000)
    stage.call(None, 1000)
    stage.call(BOB, LINES)
    assert [each.fields["caller"] for each in stage.log.named("rpc")].count(BOB) == LINES


def test_callers_beyond_some_count_as_one_and_are_counted_anew_in_the_next_period(stage: Stage) -> None:
    for number in range(CALLERS_MAX + 50):
        stage.call(f"{ALICE}{number}", LINES)
    assert stage.lines() == (CALLERS_MAX + 1) * LINES
    stage.now += PERIOD_S
    stage.ring()
    assert stage.more() == [("others", "Begin", "NO", 49 * LINES, 60)]
    stage.call(f"{ALICE}{CALLERS_MAX + 1}", LINES)
    stage.call(f"{ALICE}{CALLERS_MAX + 2}", LINES)
    assert stage.lines() == (CALLERS_MAX + 3) * LINES


def test_an_alarm_that_rings_late_says_nothing_twice(stage: Stage) -> None:
    stage.call(ALICE, LINES + 1)
    stage.now += PERIOD_S
    stage.call(ALICE, 1)
    assert stage.more() == [(ALICE, "Begin", "NO", 1, 60)]
    stage.ring()
    stage.few.flush()
    assert len(stage.more()) == 1


def test_what_was_left_out_is_said_at_the_end(stage: Stage) -> None:
    stage.call(ALICE, LINES + 7)
    stage.few.flush()
    assert stage.more() == [(ALICE, "Begin", "NO", 7, 60)]


async def test_the_event_loop_rings_where_nothing_else_is_given() -> None:
    log = RecordingLog()
    times = iter([*[0.0] * (LINES + 1), PERIOD_S])  # the period is over in the moment in which something is left out
    few = FewLines(log.info, clock=lambda: next(times))
    for _ in range(LINES + 1):
        few.write("rpc", caller=None, like=NO)
    assert log.named("rpc.more") == []
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert [each.fields["more"] for each in log.named("rpc.more")] == [1]
