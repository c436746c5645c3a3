"""How far a grant is spent, and why nothing can be begun under it now."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from common.errors import NotFound, Reason
from verifier.admin.filed import Filed, filed
from verifier.appraisal.authority import reason_against
from verifier.launches import ledger
from verifier.launches.timekeeper import Timekeeper
from verifier.library.validate import DocumentLibrary
from verifier.store.rows import LedgerRow


@dataclass(frozen=True, kw_only=True)
class GrantStatus:
    """A grant's state.

    Attributes:
        document: the version in force; None where it was withdrawn.
        spent: its ledger, which outlives the document.
        reason: why it cannot be spent now; None where it can.
    """

    document: Filed | None
    spent: LedgerRow
    reason: Reason | None


class LedgerStore(Protocol):
    """What is asked of a store here."""

    async def ledger(self, grant: str, *, at: datetime | None = None) -> LedgerRow:
        """How far a grant is spent, without the open launches whose time ran out by `at`."""
        ...


class GrantDesk:
    """Says how grants stand."""

    def __init__(self, *, store: LedgerStore, library: DocumentLibrary, time: Timekeeper) -> None:
        """Take the means."""
        self._store = store
        self._library = library
        self._time = time

    async def status(self, name: str) -> GrantStatus:
        """How a grant stands now.

        Raises:
            NotFound: there is none, and none of this name was ever spent.
            Unavailable: the store has no answer.
        """
        snapshot = await self._library.current()
        now = await self._time.now()
        spent = await self._store.ledger(name, at=now)
        grant = snapshot.grant(name)
        if grant is None:
            if spent == LedgerRow():
                raise NotFound(Reason.NOT_FOUND, f"there is no Grant {name}")
            return GrantStatus(document=None, spent=spent, reason=Reason.NOT_FOUND)
        reason = reason_against(grant, now) or ledger.reason_against(spent, grant, now)
        document = filed(snapshot.versions("Grant", name)[0], snapshot)
        return GrantStatus(document=document, spent=spent, reason=reason)
