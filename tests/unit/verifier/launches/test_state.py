"""The one transition table: states only move forward, and an end says how it came."""

from __future__ import annotations

import pytest

from common.errors import Reason, WrongState
from verifier.launches.state import TRANSITIONS, Event, State, after, ended
from verifier.store.migrations import migrations

FINAL = [State.RELEASED, State.REFUSED, State.ABANDONED, State.EXPIRED]


def test_every_state_has_a_row_and_every_event_a_meaning_in_open() -> None:
    assert set(TRANSITIONS) == set(State)
    assert set(TRANSITIONS[State.OPEN]) == set(Event)
    assert {after(State.OPEN, event) for event in Event} == set(FINAL)


@pytest.mark.parametrize("state", FINAL)
@pytest.mark.parametrize("event", Event)
def test_an_end_is_final_and_names_itself(state: State, event: Event) -> None:
    with pytest.raises(WrongState) as caught:
        after(state, event)
    assert caught.value.reason is ended(state).reason


def test_each_end_has_a_reason_of_its_own() -> None:
    assert {state: ended(state).reason for state in FINAL} == {
        State.RELEASED: Reason.ALREADY_RELEASED,
        State.REFUSED: Reason.LAUNCH_REFUSED,
        State.ABANDONED: Reason.LAUNCH_ABANDONED,
        State.EXPIRED: Reason.LAUNCH_EXPIRED,
    }


def test_the_stores_schema_knows_the_same_states() -> None:
    schema = migrations()[0][2]
    assert f"IN ({', '.join(repr(state.value) for state in State)})" in schema
