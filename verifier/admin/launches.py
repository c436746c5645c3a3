"""Launches of all callers as their owner sees them: with the findings, the explanation and the firmware."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from uuid import UUID

import msgspec

from common.sev.measurement import FirmwareVersion
from verifier.admin.paging import Listing, Page, PageRequest, fitting, unusable_token
from verifier.launches.launch import Launch, view
from verifier.launches.state import State
from verifier.launches.steps import unknown_launch
from verifier.store.rows import AuditRow, ChainedRecord, LaunchFilter, LaunchRow

# Launches that one page looks at, so that a filter that fits none holds nobody up: some milliseconds of a database.
_LOOKED_AT = 1000
_RECORDS = 100  # read at once while one launch's record is looked for


@dataclass(frozen=True, kw_only=True)
class Found:
    """One thing that an appraisal or a revocation says of a launch.

    Attributes:
        rule: its dotted id.
        message: a sentence.
    """

    rule: str
    message: str


@dataclass(frozen=True, kw_only=True)
class OwnedLaunch:
    """A launch, as its owner may see it.

    Attributes:
        launch: what its caller sees.
        caller: a SPIFFE id.
        chip: the pseudonym of the platform's chip, by which records and receipts know it.
        grant: that it spends; None for none.
        findings: why it ended, in full.
        firmware: proven for a released launch, the host's word for a refused one; None before.
        audit_id: of the record of how it ended; None before.
        explanation: why the measurement did not match; None where no search was made.
    """

    launch: Launch
    caller: str
    chip: str
    grant: str | None
    findings: tuple[Found, ...] = ()
    firmware: FirmwareVersion | None = None
    audit_id: UUID | None = None
    explanation: str | None = None

    @property
    def texts(self) -> tuple[str, ...]:
        """What may be long."""
        return (*(each.message for each in self.findings), self.explanation or "")


class LaunchStore(Protocol):
    """What is asked of a store here."""

    async def launch(self, launch_id: UUID) -> LaunchRow | None:
        """One launch."""
        ...

    async def launches(
        self, which: LaunchFilter, *, before: UUID | None, limit: int, until: UUID | None = None
    ) -> Sequence[LaunchRow]:
        """Launches, newest first."""
        ...

    async def launch_behind(self, before: UUID | None, count: int) -> UUID | None:
        """The launch that is number `count` after another."""
        ...

    async def records(self, launch_id: UUID | None, *, after: int, limit: int) -> Sequence[ChainedRecord]:
        """Audit records, oldest first."""
        ...


class LaunchDesk:
    """Shows launches."""

    def __init__(self, store: LaunchStore, *, pseudonym: Callable[[str], str]) -> None:
        """Take the store, and what makes a chip's fingerprint its pseudonym."""
        self._store = store
        self._pseudonym = pseudonym

    async def get(self, launch_id: UUID) -> OwnedLaunch:
        """One launch.

        Raises:
            NotFound: there is none of this id.
            Unavailable: the store has no answer.
        """
        row = await self._store.launch(launch_id)
        if row is None:
            raise unknown_launch()
        return await self._owned(row)

    async def list(self, which: LaunchFilter, page: PageRequest) -> Page[OwnedLaunch]:
        """Launches, newest first; a page may be empty and not the last.

        Raises:
            InvalidInput: the page token is none of this listing.
            Unavailable: the store has no answer.
        """
        listing = Listing("ListLaunches", which.workload, which.state, which.caller, which.grant)
        rows, last = await page_of_rows(self._store, which, listing.uuid(page.token), page.size)
        items = fitting([await self._owned(row) for row in rows], lambda each: each.texts)
        if len(items) < len(rows):
            last = items[-1].launch.launch_id
        return Page(items=items, next_token="" if last is None else listing.token(str(last)))

    async def _owned(self, row: LaunchRow) -> OwnedLaunch:
        # The others' records say nothing that the row does not.
        record = await self._record(row) if row.state == State.REFUSED else None
        body = {} if record is None else msgspec.json.decode(record.body)
        return owned(row, body, chip=self._pseudonym(row.fingerprint))

    async def _record(self, row: LaunchRow) -> AuditRow | None:
        """The record of how a launch ended."""
        after = 0
        while records := await self._store.records(row.launch_id, after=after, limit=_RECORDS):
            for each in records:
                if each.record.audit_id == row.audit_id:
                    return each.record
            after = records[-1].number
        return None


def owned(row: LaunchRow, body: dict[str, Any], findings: Sequence[Found] | None = None, *, chip: str) -> OwnedLaunch:
    """A launch's row with its chip's pseudonym and what its audit record's body says; other findings where given."""
    account = body.get("explanation")
    recorded = (Found(rule=each["rule"], message=each["message"]) for each in body.get("findings", ()))
    return OwnedLaunch(
        launch=view(row),
        caller=row.caller,
        chip=chip,
        grant=row.grant,
        findings=tuple(recorded if findings is None else findings),
        firmware=None if row.firmware is None else FirmwareVersion(*row.firmware),
        audit_id=row.audit_id,
        explanation=None if account is None else account["sentence"],
    )


async def page_of_rows(
    store: LaunchStore, which: LaunchFilter, before: UUID | None, limit: int
) -> tuple[Sequence[LaunchRow], UUID | None]:
    """Launches after the launch `before`, and the last that was looked at; None where nothing is behind it.

    Raises:
        InvalidInput: `before` is no launch.
    """
    if before is not None and await store.launch(before) is None:
        raise unusable_token()
    until = await store.launch_behind(before, _LOOKED_AT)
    rows = await store.launches(which, before=before, until=until, limit=limit + 1)
    return (rows[:limit], rows[limit - 1].launch_id) if len(rows) > limit else (rows, until)
