"""Identifiers: canonical UUIDs, and the request ids that a restarted caller finds again."""

from __future__ import annotations

from uuid import UUID, uuid5


def canonical_uuid(text: str) -> UUID | None:
    """The UUID that `text` spells in canonical form (lower case, hyphens, 36 characters); None for anything else."""
    try:
        value = UUID(text)
    except ValueError:
        return None
    return value if str(value) == text else None


def step_request_id(launch_id: UUID, step: str) -> UUID:
    """The request id of one step of one launch: the same after a restart, so that the step can be repeated."""
    return uuid5(launch_id, step)
