"""The chain of the audit log: each record's hash covers the record and the hash before it.

    hash(n) = SHA-256( hash(n - 1) ‖ n as u64 big endian ‖ canonical JSON of record n )      hash(0) = 32 zero bytes

Canonical JSON: the members sorted by name, no white space, UTF-8, nothing escaped that need not be (RFC 8259 has what
must be). The members, docs/audit-log.md: `audit_id`, `body`, `caller`, `event`, `launch_id`, `reason`, `time`.

Who can write to the log can compute hashes as well: only the checkpoints (`common.audit.checkpoint`) are out of reach.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from uuid import UUID

import msgspec

from common.errors import Reason, Refused

HASH_SIZE = 32
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_NUMBER_SIZE = 8
_CANONICAL = msgspec.json.Encoder(order="sorted")
_PLAIN = frozenset({str, int, type(None)})  # what members are; msgspec would find a way to write more than that


@dataclass(frozen=True, kw_only=True)
class Head:
    """Where a chain stands.

    Attributes:
        number: of its last record; 0 where it has none.
        hash: of its last record, 32 bytes.
    """

    number: int
    hash: bytes


GENESIS = Head(number=0, hash=bytes(HASH_SIZE))


@dataclass(frozen=True, kw_only=True)
class Link:
    """A record in its place in the chain, as somebody shows it.

    Attributes:
        number: the place that it claims, from 1.
        hash: the hash that it claims.
        fields: its members, as `record_fields` gives them.
    """

    number: int
    hash: bytes
    fields: Mapping[str, object]


def record_fields(
    *,
    audit_id: UUID,
    time: datetime,
    event: str,
    launch_id: UUID | None,
    caller: str | None,
    reason: str | None,
    body: str,
) -> dict[str, str | int | None]:
    """The members of a record, as they are hashed and stored.

    Args:
        audit_id: its id.
        time: with a time zone; becomes whole microseconds since 1970.
        event: what happened.
        launch_id: the launch, where there is one.
        caller: who asked, where somebody did.
        reason: why, where it is a refusal.
        body: the JSON text exactly as it is stored; hashed as text.
    """
    return {
        "audit_id": str(audit_id),
        "time": (time - _EPOCH) // _MICROSECOND,
        "event": event,
        "launch_id": None if launch_id is None else str(launch_id),
        "caller": caller,
        "reason": reason,
        "body": body,
    }


def canonical_json(fields: Mapping[str, object]) -> bytes:
    """The one way to write these members.

    Raises:
        ValueError: they hold half a surrogate pair, which no UTF-8 has, or what is neither text nor whole number nor
            null.
    """
    if not _PLAIN.issuperset(map(type, fields.values())):
        raise ValueError("a member that no record has")
    return _CANONICAL.encode(dict(fields))


def record_hash(previous: bytes, number: int, fields: Mapping[str, object]) -> bytes:
    """The hash of a record, 32 bytes.

    Args:
        previous: the hash before it, 32 bytes; `GENESIS.hash` for the first record.
        number: its place, from 1.
        fields: its members, see `record_fields`.

    Raises:
        ValueError: the hash before has another size, the number is no u64 from 1, or a text is not Unicode.
    """
    if len(previous) != HASH_SIZE or not 1 <= number < 1 << 8 * _NUMBER_SIZE:
        raise ValueError("no place in a chain")
    return hashlib.sha256(previous + number.to_bytes(_NUMBER_SIZE, "big") + canonical_json(fields)).digest()


def walk_chain(links: Iterable[Link], start: Head = GENESIS) -> Iterator[Head]:
    """Verify links one by one, in the order of their numbers, and give the head after each.

    Args:
        links: from the one after `start`; read as they are asked for, so a log of any length fits.
        start: a head that is trusted already.

    Raises:
        Refused: a link is missing, not in its place, or not what was written there (BAD_SIGNATURE, field `number`).
    """
    head = start
    for link in links:
        expected = head.number + 1
        if link.number > expected:
            raise broken(expected, "is missing")
        if link.number < expected:
            raise broken(link.number, f"stands again, or out of order, where record {expected} belongs")
        try:
            computed = record_hash(head.hash, expected, link.fields)
        except (TypeError, ValueError, RecursionError):
            computed = b""
        if computed != link.hash:
            raise broken(
                expected, "is not the one that was written: it was changed or moved, or the one before it was replaced"
            )
        head = Head(number=expected, hash=computed)
        yield head


def verify_chain(links: Iterable[Link], start: Head = GENESIS) -> Head:
    """Verify all links after `start`; the head that they lead to.

    That the log ends there, and that it is not another log, is for the checkpoints to say.

    Raises:
        Refused: see `walk_chain`.
    """
    head = start
    for head in walk_chain(links, start):  # noqa: B007 -- the last one is the answer
        pass
    return head


def broken(number: int, what: str) -> Refused:
    """The refusal of a log that does not hold at one record."""
    return Refused(Reason.BAD_SIGNATURE, f"audit log: record {number} {what}", number=str(number))
