"""The evidence of what the verifier did, for whoever checks it: chained records, checkpoints, public keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol
from uuid import UUID

import msgspec

from common.audit.chain import canonical_json
from common.errors import Reason, known_reason
from verifier.admin.paging import Listing, Page, PageRequest, fitting
from verifier.store.rows import ChainedRecord, Checkpoint

_CHECKPOINTS = Listing("ListCheckpoints")


@dataclass(frozen=True, kw_only=True)
class ShownRecord:
    """An audit record in its place in the log.

    Attributes:
        number: from 1, without gaps.
        hash: 32 bytes.
        audit_id: its id.
        time: when it was written.
        event: what happened.
        reason: where the event is a refusal; None too for one that only a newer replica knows, which `json` names.
        json: the very text that is hashed.
    """

    number: int
    hash: bytes
    audit_id: UUID
    time: datetime
    event: str
    reason: Reason | None
    json: str


class RecordStore(Protocol):
    """What is asked of a store here."""

    async def records(self, launch_id: UUID | None, *, after: int, limit: int) -> Sequence[ChainedRecord]:
        """Audit records, oldest first."""
        ...

    async def checkpoints(self, *, after: int, limit: int) -> Sequence[Checkpoint]:
        """Checkpoints, oldest first."""
        ...


class PublicKeys(Protocol):
    """Whoever signs receipts and checkpoints; `verifier.keys.signer.Signer` is this."""

    def jwks(self) -> Mapping[str, Any]:
        """The JWK set (RFC 7517)."""
        ...


class RecordDesk:
    """Shows records, checkpoints and keys."""

    def __init__(self, store: RecordStore, keys: PublicKeys) -> None:
        """Take the store and the signer."""
        self._store = store
        self._keys = keys

    async def records(self, launch_id: UUID | None, page: PageRequest) -> Page[ShownRecord]:
        """Audit records, oldest first, of one launch or all.

        Raises:
            InvalidInput: the page token is none of this listing.
            Unavailable: the store has no answer.
        """
        listing = Listing("ListAuditRecords", None if launch_id is None else str(launch_id))
        found = await self._store.records(launch_id, after=listing.number(page.token), limit=page.size + 1)
        items = fitting(map(_shown, found[: page.size]), lambda each: (each.json,))
        return Page(items=items, next_token=listing.token(str(items[-1].number)) if len(found) > len(items) else "")

    async def checkpoints(self, page: PageRequest) -> Page[str]:
        """Checkpoints, oldest first, each a compact JWS.

        Raises:
            InvalidInput: the page token is none of this listing.
            Unavailable: the store has no answer.
        """
        found = await self._store.checkpoints(after=_CHECKPOINTS.number(page.token), limit=page.size + 1)
        items = found[: page.size]
        token = _CHECKPOINTS.token(str(items[-1].number)) if len(found) > page.size else ""
        return Page(items=[each.token for each in items], next_token=token)

    def jwks(self) -> str:
        """The public keys as the JSON text of a JWK set."""
        return msgspec.json.encode(self._keys.jwks()).decode()


def _shown(chained: ChainedRecord) -> ShownRecord:
    record = chained.record
    fields = record.members
    return ShownRecord(
        number=chained.number,
        hash=chained.hash,
        audit_id=record.audit_id,
        time=record.time,
        event=record.event,
        reason=known_reason(record.reason),
        json=canonical_json(fields).decode(),
    )
