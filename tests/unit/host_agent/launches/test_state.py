"""The state table: what it must say, and that the page and the contract say the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.errors import Reason, WrongState
from host_agent.launches.state import BEFORE_INJECTED, FINAL, PACKET_TAKEN, TRANSITIONS, Event, diagram, next_state
from host_agent.launches.state import LaunchState as S
from sevattest.v1 import host_agent_service_pb2 as pb

PAGE = Path(__file__).parents[4] / "docs" / "host-agent.md"


def sources(target: S) -> set[S]:
    return {state for state, events in TRANSITIONS.items() if target in events.values() and state is not target}


def test_the_states_are_those_of_the_contract() -> None:
    named = {name.removeprefix("GUEST_LAUNCH_STATE_") for name, _ in pb.GuestLaunchState.items()}
    assert {state.value for state in S} == named - {"UNSPECIFIED"}
    assert set(TRANSITIONS) == set(S)


def test_a_guest_runs_only_after_the_platform_took_its_packet() -> None:
    assert sources(S.RESUMED) == {S.INJECTED, S.RESUMING}
    assert sources(S.RESUMING) == {S.INJECTED}
    assert sources(S.INJECTED) == {S.INJECTING, S.RESUMING}
    assert sources(S.INJECTING) == {S.MEASURED}
    assert sources(S.MEASURED) == {S.PAUSED}
    assert sources(S.PAUSED) == {S.STARTING}


def test_a_state_is_before_the_injection_or_after_it_or_final() -> None:
    assert BEFORE_INJECTED.isdisjoint(PACKET_TAKEN)
    assert BEFORE_INJECTED | PACKET_TAKEN | {S.ABORTED, S.FAILED} == set(S)
    assert {S.STOPPED, S.ABORTED, S.FAILED} == set(FINAL)


def test_every_launch_that_has_not_ended_can_be_given_up() -> None:
    for state in set(S) - FINAL:
        assert next_state(state, Event.ABORTED) is (S.STOPPED if state is S.RESUMED else S.ABORTED)
        assert next_state(state, Event.GONE) is (S.STOPPED if state is S.RESUMED else S.FAILED)


@pytest.mark.parametrize("state", S)
@pytest.mark.parametrize("event", Event)
def test_what_the_table_does_not_name_is_refused(state: S, event: Event) -> None:
    if event in TRANSITIONS[state]:
        assert next_state(state, event) is TRANSITIONS[state][event]
        return
    with pytest.raises(WrongState) as refusal:
        next_state(state, event)
    assert refusal.value.reason is Reason.WRONG_STATE


def test_the_page_shows_the_diagram_that_the_table_draws() -> None:
    page = PAGE.read_text(encoding="utf-8")
    drawn = page.partition("```mermaid\n")[2].partition("\n```")[0]
    # To draw it again: python -c 'from host_agent.launches.state import diagram; print(diagram())'
    assert drawn == diagram()
