"""Time never goes back past what was stored, and far behind it nothing is decided."""

from __future__ import annotations

from datetime import timedelta

import pytest

from common.errors import Reason, WrongState
from tests.support.desk import START
from tests.support.rpc import SettableClock
from verifier.launches.timekeeper import SKEW_MAX, Timekeeper


def test_a_new_store_takes_the_clocks_word() -> None:
    assert Timekeeper(SettableClock(START), None).now_for_decisions() == START


def test_a_small_step_back_stands_still() -> None:
    clock = SettableClock(START)
    keeper = Timekeeper(clock, START)
    clock.advance(-SKEW_MAX)
    assert keeper.now() == START
    assert keeper.now_for_decisions() == START


def test_a_large_step_back_stops_decisions_until_the_clock_has_caught_up() -> None:
    clock = SettableClock(START)
    keeper = Timekeeper(clock, None)
    keeper.stored(START)
    clock.advance(-SKEW_MAX - timedelta(seconds=1))
    assert keeper.now() == START
    with pytest.raises(WrongState) as caught:
        keeper.now_for_decisions()
    assert caught.value.reason is Reason.CLOCK_SKEW
    clock.advance(timedelta(seconds=1))
    assert keeper.now_for_decisions() == START


def test_what_was_only_read_does_not_count() -> None:
    clock = SettableClock(START + timedelta(days=400))
    keeper = Timekeeper(clock, START)
    keeper.now_for_decisions()
    clock.time = START
    assert keeper.now_for_decisions() == START
