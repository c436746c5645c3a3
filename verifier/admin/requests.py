"""The owner's requests that change something: repeated under the same id, they are answered as before.

A request id is scoped to the owner and the method. The same id with the same content gets the stored answer and changes
nothing; with other content it is refused (REQUEST_ID_REUSED). The store keeps the request in the transaction of what
it changed, so that there is no moment at which one of the two is there alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, Protocol
from uuid import UUID

import msgspec

from common.errors import Reason, Unavailable
from verifier.launches.launch import content_hash
from verifier.launches.records import AuditEvent, Recorder
from verifier.launches.steps import reused
from verifier.launches.timekeeper import Timekeeper
from verifier.store.rows import AdminRequest, AuditRow, RequestKey


class AdminMethod(StrEnum):
    """Scopes of request ids. The values are stored: they are for ever."""

    APPLY = "ApplyDocument"
    DELETE = "DeleteDocument"
    PUT_SECRET = "PutSecret"  # noqa: S105 -- a method's name
    DELETE_SECRET = "DeleteSecret"  # noqa: S105 -- a method's name


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Who asks, and under which id.

    Attributes:
        caller: SPIFFE id of the owner.
        request_id: the owner's id of the request.
    """

    caller: str
    request_id: UUID


class KeptRequests(Protocol):
    """What is asked of a store here."""

    async def admin_request(self, key: RequestKey) -> AdminRequest | None:
        """The owner's request that was kept under `key`."""
        ...


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A request that is about to change something.

    Attributes:
        asked: who, under which id.
        method: what.
        content: SHA-256 of what is asked, 32 bytes.
    """

    asked: Asked
    method: AdminMethod
    content: bytes

    @property
    def key(self) -> RequestKey:
        """What the store keeps the request under."""
        return RequestKey(caller=self.asked.caller, method=self.method.value, request_id=self.asked.request_id)

    def answering(self, **answer: Any) -> AdminRequest:
        """The row for the store, with what is answered."""
        return AdminRequest(key=self.key, content=self.content, answer=msgspec.json.encode(answer).decode())


class Journal:
    """Finds earlier answers, makes the records of changes, and notes what was stored."""

    def __init__(self, *, store: KeptRequests, time: Timekeeper, records: Recorder) -> None:
        """Take the means."""
        self._store = store
        self._time = time
        self._records = records

    async def now(self) -> datetime:
        """The time for a transaction."""
        return await self._time.now()

    @staticmethod
    def draft(asked: Asked, method: AdminMethod, *content: bytes) -> Draft:
        """A request whose content is these parts."""
        return Draft(asked=asked, method=method, content=content_hash(*content))

    async def answered(self, draft: Draft) -> Mapping[str, Any] | None:
        """What this very request was answered before; None where it is new.

        Raises:
            InvalidInput: the id was used with other content (REQUEST_ID_REUSED).
            Unavailable: the store has no answer.
        """
        earlier = await self._store.admin_request(draft.key)
        if earlier is None:
            return None
        if earlier.content != draft.content:
            raise reused()
        answer: dict[str, Any] = msgspec.json.decode(earlier.answer)
        return answer

    async def answered_meanwhile(self, draft: Draft) -> Mapping[str, Any]:
        """What the same request was answered that came at the same time and was first.

        Raises:
            InvalidInput: it had other content.
            Unavailable: the store has no answer, or lost it again.
        """
        answer = await self.answered(draft)
        if answer is None:
            raise Unavailable(Reason.STORE_UNAVAILABLE, "the store has no answer to a request that it has kept")
        return answer

    def row(self, event: AuditEvent, asked: Asked, now: datetime, **body: Any) -> AuditRow:
        """The record of a change; its line in the log follows with `stored`."""
        return self._records.row(event, time=now, caller=asked.caller, **body)

    def stored(self, row: AuditRow) -> None:
        """Take note of a row that was stored, and write its line."""
        self._time.stored(row.time)
        self._records.log(row)
