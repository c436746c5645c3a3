"""Identifiers: canonical UUIDs, those that stand in order, and the request ids that a restarted caller finds again."""

from __future__ import annotations

from uuid import UUID, uuid5

_MILLISECOND = 1_000_000  # nanoseconds
_RANDOM_BITS = 62


def canonical_uuid(text: str) -> UUID | None:
    """The UUID that `text` spells in canonical form (lower case, hyphens, 36 characters); None for anything else."""
    try:
        value = UUID(text)
    except ValueError:
        return None
    return value if str(value) == text else None


def ordered_uuid(time_ns: int, random: bytes) -> UUID:
    """A UUID of version 7: rows under such ids are written side by side, where random ones dirty a page each.

    Source: RFC 9562 sections 5.7 and 6.2, method 3: 48 bits of milliseconds, 12 bits of the millisecond's fraction,
    62 random bits. Nothing may rest on the order: clocks step back.

    Args:
        time_ns: since 1970, nanoseconds.
        random: 8 random bytes.
    """
    milliseconds, rest = divmod(time_ns, _MILLISECOND)
    noise = int.from_bytes(random, "big") & ((1 << _RANDOM_BITS) - 1)
    high = milliseconds << 16 | 7 << 12 | (rest << 12) // _MILLISECOND
    return UUID(int=high << 64 | 0b10 << _RANDOM_BITS | noise)


def step_request_id(launch_id: UUID, step: str) -> UUID:
    """The request id of one step of one launch: the same after a restart, so that the step can be repeated."""
    return uuid5(launch_id, step)
