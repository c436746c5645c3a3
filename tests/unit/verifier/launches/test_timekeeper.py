"""Time never goes back past what was stored, and far behind it nothing is decided."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest

from common.errors import Reason, WrongState
from tests.support.desk import START
from tests.support.rpc import SettableClock
from verifier.launches.timekeeper import SKEW_MAX, Timekeeper


class Stored:
    """What the store answers; another replica may move it."""

    def __init__(self, time: datetime | None = None) -> None:
        self.time = time

    async def __call__(self) -> datetime | None:
        return self.time


async def test_a_new_store_takes_the_clocks_word() -> None:
    assert await Timekeeper(SettableClock(START), Stored()).now_for_decisions() == START


async def test_a_small_step_back_stands_still() -> None:
    clock = SettableClock(START)
    keeper = Timekeeper(clock, Stored(START))
    clock.advance(-SKEW_MAX)
    assert await keeper.now() == START
    assert await keeper.now_for_decisions() == START


async def test_a_large_step_back_stops_decisions_until_the_clock_has_caught_up() -> None:
    clock = SettableClock(START)
    keeper = Timekeeper(clock, Stored())
    keeper.stored(START)
    clock.advance(-SKEW_MAX - timedelta(seconds=1))
    assert await keeper.now() == START
    with pytest.raises(WrongState) as caught:
        await keeper.now_for_decisions()
    assert caught.value.reason is Reason.CLOCK_SKEW
    clock.advance(timedelta(seconds=1))
    assert await keeper.now_for_decisions() == START


async def test_what_another_replica_stored_counts_from_the_next_decision_on() -> None:
    clock, stored = SettableClock(START), Stored(START)
    keeper = Timekeeper(clock, stored)
    assert await keeper.now_for_decisions() == START
    stored.time = START + timedelta(minutes=5)
    assert await keeper.now_for_decisions() == START + timedelta(minutes=5)
    stored.time = START + SKEW_MAX + timedelta(seconds=1)
    with pytest.raises(WrongState):
        await keeper.now_for_decisions()


async def test_what_was_only_read_does_not_count() -> None:
    clock = SettableClock(START + timedelta(days=400))
    keeper = Timekeeper(clock, Stored(START))
    await keeper.now_for_decisions()
    clock.time = START
    assert await keeper.now_for_decisions() == START


def test_a_time_that_was_read_with_the_rest_counts_as_one_that_was_asked_for() -> None:
    clock = SettableClock(START)
    keeper = Timekeeper(clock, Stored())
    later = START + timedelta(minutes=5)
    assert keeper.for_decisions(later) == later
    # It stays known, where nothing was read anew.
    assert keeper.for_decisions(None) == later
    with pytest.raises(WrongState):
        keeper.for_decisions(START + SKEW_MAX + timedelta(seconds=1))


async def test_how_far_the_clock_is_behind_is_known_and_never_less_than_nothing() -> None:
    clock, stored = SettableClock(START), Stored(START + timedelta(minutes=5))
    keeper = Timekeeper(clock, stored)
    assert keeper.behind == timedelta()
    await keeper.now()
    assert keeper.behind == timedelta(minutes=5)
    clock.advance(timedelta(minutes=6))
    assert keeper.behind == timedelta()


async def test_a_clock_far_ahead_of_what_others_store_is_told_of_each_time_they_store() -> None:
    clock, stored = SettableClock(START + timedelta(minutes=30)), Stored(START)
    keeper = Timekeeper(clock, stored)
    for minutes in (0, 1, 2):
        stored.time = START + timedelta(minutes=minutes)
        ahead = await keeper.ahead()
        assert ahead == (timedelta(minutes=29) if minutes else None)
        clock.advance(timedelta(minutes=1))


async def test_a_clock_that_was_ahead_for_one_look_is_told_of_when_something_is_stored() -> None:
    clock, stored = SettableClock(START + timedelta(minutes=30)), Stored()
    keeper = Timekeeper(clock, stored)
    assert await keeper.ahead() is None
    clock.time = stored.time = START + timedelta(minutes=1)
    assert await keeper.ahead() == timedelta(minutes=29)
    assert await keeper.ahead() is None  # nothing was stored since
    stored.time = clock.time = START + timedelta(minutes=2)
    assert await keeper.ahead() is None


@pytest.mark.parametrize("minutes", [0, 10, 600])
async def test_a_store_in_which_nothing_happens_accuses_no_clock(minutes: int) -> None:
    """Nor does what is stored after a long rest, or by somebody whose clock is ten minutes behind."""
    clock, stored = SettableClock(START), Stored(START - timedelta(days=1))
    keeper = Timekeeper(clock, stored)
    for _ in range(3):
        assert await keeper.ahead() is None
        clock.advance(timedelta(minutes=minutes))
    stored.time = clock.time - timedelta(minutes=minutes) - SKEW_MAX
    assert await keeper.ahead() is None
