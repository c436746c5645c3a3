"""The life of a launch at the agent: one table, and nothing else moves a launch.

Theory of operation
-------------------
A launch is written down before anything is done for it (STARTING). Its machine starts paused and is measured by the
firmware (PAUSED); the measurement is handed out (MEASURED); the owner's packet arrives. Two steps cannot be taken
back, and each has a state that is written down before the step and left only when its outcome is known:

* INJECTING: the packet's hash is on disk, the packet may have reached the platform. QEMU cannot tell whether it did, so
  a launch stays here until the same bytes are injected again (which is harmless: same bytes, same place) or it ends.
* RESUMING: the guest may run. `query-sev` tells: if it runs, RESUMED; if it is still paused, back to INJECTED.

The rule that the table enforces: a guest runs only after the platform took its packet. RESUMED is reached from
RESUMING and INJECTED alone, INJECTED from INJECTING (or back from RESUMING), INJECTING from MEASURED alone. A guest
that is found running in any earlier state is ended.

A machine that ends by itself (GONE) or fails (FAILED) before the guest ran takes its launch to FAILED; one that is
given up or was not resumed in time (ABORTED) to ABORTED. After the guest ran, the end of its machine is STOPPED,
however it came. These three are final.

The names are those of `GuestLaunchState` in proto/sevattest/v1/host_agent_service.proto; docs/host-agent.md shows the
diagram that `diagram` draws. Pure code: no clock, no store, no loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType

from common.errors import Reason, WrongState


class LaunchState(StrEnum):
    """Where a launch stands; each name is `GuestLaunchState`'s without its prefix."""

    STARTING = "STARTING"
    PAUSED = "PAUSED"
    MEASURED = "MEASURED"
    INJECTING = "INJECTING"
    INJECTED = "INJECTED"
    RESUMING = "RESUMING"
    RESUMED = "RESUMED"
    STOPPED = "STOPPED"
    ABORTED = "ABORTED"
    FAILED = "FAILED"


class Event(StrEnum):
    """What happened to a launch."""

    STARTED = "STARTED"  # the machine is up, paused and measured
    MEASURED = "MEASURED"  # the measurement is handed out
    INJECT_BEGUN = "INJECT_BEGUN"  # the packet's hash is written down
    INJECTED = "INJECTED"  # the platform took the packet
    RESUME_BEGUN = "RESUME_BEGUN"  # the guest is about to be resumed
    RESUMED = "RESUMED"  # the guest runs
    NOT_RESUMED = "NOT_RESUMED"  # the guest was to be resumed, and is still paused
    FAILED = "FAILED"  # the firmware or the machine failed, or the guest ran too early; the machine was ended
    GONE = "GONE"  # the machine ended by itself
    ABORTED = "ABORTED"  # given up, or out of time; the machine was ended


_S, _E = LaunchState, Event

# What ends a launch before its guest has run, from wherever it stands.
_ENDS = {_E.FAILED: _S.FAILED, _E.GONE: _S.FAILED, _E.ABORTED: _S.ABORTED}

TRANSITIONS: Mapping[LaunchState, Mapping[Event, LaunchState]] = MappingProxyType(
    {
        _S.STARTING: {_E.STARTED: _S.PAUSED, **_ENDS},
        _S.PAUSED: {_E.MEASURED: _S.MEASURED, **_ENDS},
        _S.MEASURED: {_E.INJECT_BEGUN: _S.INJECTING, **_ENDS},
        # The same packet once more, after an unknown outcome.
        _S.INJECTING: {_E.INJECT_BEGUN: _S.INJECTING, _E.INJECTED: _S.INJECTED, **_ENDS},
        # RESUMED without RESUME_BEGUN: somebody else on the host resumed a guest that is attested and has its secret.
        _S.INJECTED: {_E.RESUME_BEGUN: _S.RESUMING, _E.RESUMED: _S.RESUMED, **_ENDS},
        _S.RESUMING: {_E.RESUMED: _S.RESUMED, _E.NOT_RESUMED: _S.INJECTED, **_ENDS},
        _S.RESUMED: {_E.GONE: _S.STOPPED, _E.ABORTED: _S.STOPPED},
        _S.STOPPED: {},
        _S.ABORTED: {},
        _S.FAILED: {},
    }
)

FINAL: frozenset[LaunchState] = frozenset(state for state, events in TRANSITIONS.items() if not events)
# A guest that runs in one of these runs unattested, and is ended.
BEFORE_INJECTED: frozenset[LaunchState] = frozenset({_S.STARTING, _S.PAUSED, _S.MEASURED, _S.INJECTING})
# The platform took the packet; the same packet once more is answered from the record.
PACKET_TAKEN: frozenset[LaunchState] = frozenset({_S.INJECTED, _S.RESUMING, _S.RESUMED, _S.STOPPED})


def next_state(state: LaunchState, event: Event) -> LaunchState:
    """Where `event` takes a launch that stands in `state`.

    Raises:
        WrongState: `WRONG_STATE`; the table has no such move.
    """
    try:
        return TRANSITIONS[state][event]
    except KeyError:
        raise WrongState(Reason.WRONG_STATE, f"a launch in state {state} has no event {event}") from None


def diagram() -> str:
    """The table as a Mermaid state diagram, one line a move, in the table's order."""
    moves: dict[tuple[LaunchState, LaunchState], list[str]] = {}
    for state, events in TRANSITIONS.items():
        for event, target in events.items():
            moves.setdefault((state, target), []).append(event.value)
    lines = [f"    {state} --> {target}: {', '.join(events)}" for (state, target), events in moves.items()]
    ends = [f"    {state} --> [*]" for state in TRANSITIONS if state in FINAL]
    return "\n".join(["stateDiagram-v2", f"    [*] --> {LaunchState.STARTING}", *lines, *ends])
