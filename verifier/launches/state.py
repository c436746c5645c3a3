"""The life of a launch at the verifier: one table, and nothing else moves a state.

Theory of operation. A launch is `open` from begin until the first thing that ends it, and every end is final:

    open ── release ──▶ released     the measurement was accepted, the packet is written down, the keys are erased
         ── refuse ───▶ refused      the first well-formed measurement was not accepted, the keys are erased
         ── abandon ──▶ abandoned    the caller gave it up, the keys are erased
         ── expire ───▶ expired      no measurement came in time, the keys are erased

The store carries a move out as one compare-and-set on the state that this table names, together with the audit record
(`verifier.store.base.Move`); whoever loses the race reads the row again and gets that state's reason. Keys exist only
in `open`, which the store's schema enforces too.
"""

from __future__ import annotations

from enum import StrEnum

from common.errors import Reason, WrongState


class State(StrEnum):
    """Where a launch stands. The values are stored: they are for ever."""

    OPEN = "open"
    RELEASED = "released"
    REFUSED = "refused"
    ABANDONED = "abandoned"
    EXPIRED = "expired"


class Event(StrEnum):
    """What may happen to a launch."""

    RELEASE = "release"
    REFUSE = "refuse"
    ABANDON = "abandon"
    EXPIRE = "expire"


TRANSITIONS: dict[State, dict[Event, State]] = {
    State.OPEN: {
        Event.RELEASE: State.RELEASED,
        Event.REFUSE: State.REFUSED,
        Event.ABANDON: State.ABANDONED,
        Event.EXPIRE: State.EXPIRED,
    },
    State.RELEASED: {},
    State.REFUSED: {},
    State.ABANDONED: {},
    State.EXPIRED: {},
}

# Why a launch that has ended takes no further step.
ENDED: dict[State, tuple[Reason, str]] = {
    State.RELEASED: (Reason.ALREADY_RELEASED, "the launch has released its secrets"),
    State.REFUSED: (Reason.LAUNCH_REFUSED, "the launch was refused before"),
    State.ABANDONED: (Reason.LAUNCH_ABANDONED, "the launch was given up"),
    State.EXPIRED: (Reason.LAUNCH_EXPIRED, "the launch's time ran out"),
}


def after(state: State, event: Event) -> State:
    """The state that `event` leads to from `state`.

    Raises:
        WrongState: the table has no such transition; the reason says how the launch has ended.
    """
    try:
        return TRANSITIONS[state][event]
    except KeyError:
        raise ended(state) from None


def ended(state: State) -> WrongState:
    """The error for a step on a launch that has ended in `state`."""
    reason, message = ENDED[state]
    return WrongState(reason, message)
