"""Launches in the database: how they begin, how they end, and how grants are spent with them."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from dataclasses import replace
from datetime import datetime
from functools import cache
from uuid import UUID

from common.errors import OutcomeUnknown, Unavailable
from verifier.store.engine import Engine, Row, Transaction, unavailable
from verifier.store.rows import (
    Known,
    LaunchFilter,
    LaunchRow,
    LedgerRow,
    Move,
    Opening,
    Outcome,
    PdhSighting,
    RequestKey,
    RequestRow,
    Spending,
)
from verifier.store.sql_common import Decided, OverEngine, append, the_head, touch
from verifier.store.sql_rows import (
    COLUMNS_OF_LAUNCH,
    LAUNCH_COLUMNS,
    firmware_text,
    id_of,
    key_cells,
    launch_of,
    stamp,
    time_of,
)

_SHARED_MAX = 10_000  # ids of 32 bytes that are remembered
_PLACE = "(SELECT create_time, launch_id FROM launch WHERE launch_id=?)"  # of a launch in the order of listing
_ERASED_MAX = 1000  # packets in one transaction: launches wait for it
_FOREVER = 2**63 - 1  # the latest time that can be stored
_UNSPENT = LedgerRow()
# What every decision begins with, with a launch or a grant's ledger where one is asked for: who needs none does not pay
# for it. In one statement: a request and what it did to its launch are seen together or not at all.
_KNOWN = (
    "audit_head.time, mark.value, request.content, request.launch_id",
    (
        "audit_head JOIN mark ON mark.name='revision' "
        "LEFT JOIN request ON request.caller=? AND request.method=? AND request.request_id=?"
    ),
)
_SPENT = (
    ", ledger.open, ledger.released, ledger.refused, ledger.rate_time",
    " LEFT JOIN ledger ON ledger.grant_name=?",
)
_LAUNCH = (
    f", pdh.api_major, pdh.api_minor, pdh.build, {COLUMNS_OF_LAUNCH}",
    " LEFT JOIN launch ON launch.launch_id=? LEFT JOIN pdh ON pdh.pdh_fingerprint=launch.pdh_fingerprint",
)


@cache
def _known(*, spent: bool, launch: bool) -> str:
    parts = (_KNOWN, *((_SPENT,) if spent else ()), *((_LAUNCH,) if launch else ()))
    columns, tables = ("".join(part) for part in zip(*parts, strict=True))
    return f"SELECT {columns} FROM {tables}"  # noqa: S608 -- constants


class Launches(OverEngine):
    """The part of `Store` that keeps launches, their requests, and the ledgers of grants."""

    def __init__(self, engine: Engine) -> None:
        """Take the engine."""
        super().__init__(engine)
        # Ids of terms and platforms that are in the database: they are never removed from it, and long to send again.
        self._shared: set[bytes] = set()

    async def last_time(self) -> datetime | None:
        """See `Store`."""
        row = await self._row("SELECT time FROM audit_head")
        return None if row is None or row[0] is None else time_of(row[0])

    async def known(self, key: RequestKey, launch_id: UUID | None = None, *, grant: str | None = None) -> Known:
        """See `Store`."""
        query = _known(spent=grant is not None, launch=launch_id is not None)
        values = (
            *key_cells(key),
            *(() if grant is None else (grant,)),
            *(() if launch_id is None else (str(launch_id),)),
        )
        row = await self._engine.read(lambda transaction: transaction.one(query, *values))
        (time, revision, content, opened), rest = row[:4], row[4:]
        ledger, launch = (rest[:4], rest[4:]) if grant is not None else ((), rest)
        return Known(
            time=None if time is None else time_of(time),
            revision=revision,
            request=None if content is None else RequestRow(key=key, content=content, launch_id=id_of(opened)),
            launch=launch_of(launch[3:]) if launch and launch[3] is not None else None,
            pdh_oldest=launch[:3] if launch and launch[0] is not None else None,
            ledger=_ledger_of(ledger) if ledger and ledger[0] is not None else _UNSPENT,
        )

    async def request(self, key: RequestKey) -> RequestRow | None:
        """See `Store`."""
        row = await self._row(
            "SELECT content, launch_id FROM request WHERE caller=? AND method=? AND request_id=?", *key_cells(key)
        )
        return None if row is None else RequestRow(key=key, content=row[0], launch_id=id_of(row[1]))

    async def launch(self, launch_id: UUID) -> LaunchRow | None:
        """See `Store`."""
        row = await self._row(f"SELECT {LAUNCH_COLUMNS} FROM launch WHERE launch_id=?", str(launch_id))  # noqa: S608 -- a constant list
        return None if row is None else launch_of(row)

    async def generated(self, launch_id: UUID) -> bytes | None:
        """See `Store`."""
        row = await self._row("SELECT generated FROM launch WHERE launch_id=?", str(launch_id))
        return None if row is None else row[0]

    async def terms(self, terms_id: bytes) -> bytes:
        """See `Store`."""
        return await self._frozen("SELECT body FROM terms WHERE terms_id=?", terms_id)

    async def chain(self, platform_id: bytes) -> bytes:
        """See `Store`."""
        return await self._frozen("SELECT chain FROM platform WHERE platform_id=?", platform_id)

    async def _frozen(self, query: str, key: bytes) -> bytes:
        row = await self._row(query, key)
        if row is None:
            raise unavailable("the store lacks what a launch was begun with")
        value: bytes = row[0]
        return value

    async def overdue(self, time: datetime, state: str, limit: int, *, grant: str | None = None) -> Sequence[UUID]:
        """See `Store`."""
        if grant is None:
            rows = await self._rows(
                "SELECT launch_id FROM launch WHERE state=? AND expire_time<=? ORDER BY expire_time LIMIT ?",
                *(state, stamp(time), limit),
            )
        else:
            rows = await self._rows(
                "SELECT launch_id FROM launch WHERE grant_name=? AND state=? AND expire_time<=? "
                "ORDER BY expire_time LIMIT ?",
                *(grant, state, stamp(time), limit),
            )
        return [id_of(row[0]) for row in rows]

    async def count_open(self) -> int:
        """See `Store`."""
        row = await self._row("SELECT count(*) FROM launch WHERE state='open'")
        return 0 if row is None else int(row[0])

    async def launches(
        self, which: LaunchFilter, *, before: UUID | None, limit: int, until: UUID | None = None
    ) -> Sequence[LaunchRow]:
        """See `Store`."""
        wanted = {
            "workload=?": which.workload,
            # No index by state would serve: all launches of a state, most of them released, would be sorted by age.
            "(state || '')=?": which.state,
            "caller=?": which.caller,
            "grant_name=?": which.grant,
            f"(create_time, launch_id) < {_PLACE}": None if before is None else str(before),
            f"(create_time, launch_id) >= {_PLACE}": None if until is None else str(until),
        }
        asked = {condition: value for condition, value in wanted.items() if value is not None}
        where = f"WHERE {' AND '.join(asked)}" if asked else ""
        rows = await self._rows(
            f"SELECT {LAUNCH_COLUMNS} FROM launch {where} ORDER BY create_time DESC, launch_id DESC LIMIT ?",  # noqa: S608 -- constants
            *asked.values(),
            limit,
        )
        return [launch_of(row) for row in rows]

    async def launch_behind(self, before: UUID | None, count: int) -> UUID | None:
        """See `Store`."""
        where = "" if before is None else f"WHERE (create_time, launch_id) < {_PLACE}"
        row = await self._row(
            f"SELECT launch_id FROM launch {where} ORDER BY create_time DESC, launch_id DESC LIMIT 1 OFFSET ?",  # noqa: S608 -- constants
            *(() if before is None else (str(before),)),
            count - 1,
        )
        return None if row is None else id_of(row[0])

    async def ledger(self, grant: str, *, at: datetime | None = None) -> LedgerRow:
        """See `Store`."""
        # In one statement: a launch that is ended meanwhile is left out once.
        row = await self._row(
            "SELECT open, released, refused, rate_time, "
            "(SELECT count(*) FROM launch WHERE grant_name=? AND state='open' AND expire_time<=?) "
            "FROM ledger WHERE grant_name=?",
            *(grant, -1 if at is None else stamp(at), grant),
        )
        if row is None:
            return LedgerRow()
        ledger, overdue = _ledger_of(row), int(row[4])
        # No less than nothing, where somebody else wrote to the database (`grant.unsettled`).
        return replace(ledger, open=max(ledger.open - overdue, 0))

    async def sighted(self, pdh_fingerprint: bytes) -> tuple[int, int, int] | None:
        """See `Store`."""
        row = await self._row("SELECT api_major, api_minor, build FROM pdh WHERE pdh_fingerprint=?", pdh_fingerprint)
        return None if row is None else (row[0], row[1], row[2])

    async def measured_before(self, measurement: bytes, besides: UUID) -> UUID | None:
        """See `Store`."""
        row = await self._row(
            "SELECT launch_id FROM launch WHERE measurement=? AND launch_id<>? ORDER BY end_time LIMIT 1",
            *(measurement, str(besides)),
        )
        return None if row is None else id_of(row[0])

    # Writing.

    async def open_launch(self, opening: Opening) -> Outcome:
        """See `Store`."""
        launch, spending = opening.launch, opening.spending
        if launch.keys is None:
            raise ValueError("an open launch has keys")

        async def work(transaction: Transaction) -> None:
            taken = _take_request(transaction, opening.request)
            capped = transaction.row(
                "SELECT 1 FROM launch WHERE caller=? AND state='open' AND expire_time>? LIMIT 1 OFFSET ?",
                *(launch.caller, stamp(launch.create_time), opening.open_cap - 1),
            )
            ledger = None if spending is None else the_ledger(transaction, spending)
            asked = the_head(transaction)
            if not await taken:
                raise Decided(Outcome.REQUEST_TAKEN)
            head = await asked
            if head[0] != opening.revision:
                raise Decided(Outcome.DOCUMENTS_CHANGED)
            if await capped:
                raise Decided(Outcome.CAP_REACHED)
            if spending is not None and ledger is not None:
                await spend(transaction, spending, ledger)
            _insert(transaction, opening, shared=not shared <= self._shared)
            append(transaction, head, opening.audit)

        shared = {launch.terms_id, launch.platform_id}
        try:
            outcome = await self._decide("open", work)
        except (Unavailable, OutcomeUnknown):
            self._shared.clear()  # perhaps a server took over that never had them
            raise
        if outcome is Outcome.DONE:
            if len(self._shared) > _SHARED_MAX:
                self._shared.clear()
            self._shared |= shared
        return outcome

    async def move(self, move: Move) -> Outcome:
        """See `Store`."""

        async def work(transaction: Transaction) -> None:
            taken = None if move.request is None else _take_request(transaction, move.request)
            ledger = None if move.spending is None else the_ledger(transaction, move.spending)
            ended = _end(transaction, move)
            asked = the_head(transaction)
            if taken is not None and not await taken:
                raise Decided(Outcome.REQUEST_TAKEN)
            head = await asked
            if move.revision not in {None, head[0]}:
                raise Decided(Outcome.DOCUMENTS_CHANGED)
            if not await ended:
                raise Decided(Outcome.LOST)
            if move.spending is not None and ledger is not None:
                await spend(transaction, move.spending, ledger)
            if move.sighting is not None:
                _sight(transaction, move.sighting)
            append(transaction, head, move.audit)

        return await self._decide("move", work)

    async def confirm(self, launch_id: UUID, audit_id: UUID, revision: int) -> Outcome:
        """See `Store`."""

        async def work(transaction: Transaction) -> None:
            asked = the_head(transaction)
            found = transaction.row(
                "SELECT 1 FROM launch WHERE launch_id=? AND state='released' AND audit_id=?",
                *(str(launch_id), str(audit_id)),
            )
            if (await asked)[0] != revision:
                raise Decided(Outcome.DOCUMENTS_CHANGED)
            if await found is None:
                raise Decided(Outcome.LOST)
            touch(transaction)

        return await self._decide("confirm", work)

    async def erase_packets(self, before: datetime) -> int:
        """See `Store`."""
        erased, last = 0, _ERASED_MAX
        while last == _ERASED_MAX:
            last = await self._engine.write(
                "erase",
                lambda transaction: transaction.change(
                    "UPDATE launch SET packet_header=NULL, packet_payload=NULL WHERE launch_id IN "
                    "(SELECT launch_id FROM launch WHERE packet_header IS NOT NULL AND end_time<=? LIMIT ?)",
                    *(stamp(before), _ERASED_MAX),
                ),
            )
            erased += last
        return erased


def _take_request(transaction: Transaction, request: RequestRow) -> Awaitable[int]:
    return transaction.change(
        "INSERT INTO request (caller, method, request_id, content, launch_id) VALUES (?, ?, ?, ?, ?) "
        "ON CONFLICT DO NOTHING",
        *(*key_cells(request.key), request.content, str(request.launch_id)),
    )


def the_ledger(transaction: Transaction, spending: Spending) -> Awaitable[Row | None]:
    """Ask for the ledger of a grant, for `spend`."""
    return transaction.row("SELECT open, released, refused, rate_time FROM ledger WHERE grant_name=?", spending.grant)


async def spend(transaction: Transaction, spending: Spending, ledger: Awaitable[Row | None]) -> None:
    """Do to a grant's ledger what the spending says; what that raises ends the transaction."""
    row = await ledger
    before = LedgerRow() if row is None else _ledger_of(row)
    after = spending.change(before)
    if after != before:
        transaction.tell(
            "INSERT INTO ledger (grant_name, open, released, refused, rate_time) VALUES (?, ?, ?, ?, ?) "
            "ON CONFLICT (grant_name) DO UPDATE SET open=excluded.open, released=excluded.released, "
            "refused=excluded.refused, rate_time=excluded.rate_time",
            *(spending.grant, after.open, after.released, after.refused, after.rate_time),
        )


def _ledger_of(row: Sequence[int]) -> LedgerRow:
    return LedgerRow(open=row[0], released=row[1], refused=row[2], rate_time=row[3])


def _insert(transaction: Transaction, opening: Opening, *, shared: bool) -> None:
    """Write a launch, and before it what it shares with others, unless that is known to be there."""
    launch = opening.launch
    if launch.keys is None:
        raise ValueError("an open launch has keys")
    if shared:
        transaction.tell(
            "INSERT INTO terms (terms_id, body) VALUES (?, ?) ON CONFLICT DO NOTHING", launch.terms_id, opening.terms
        )
        transaction.tell(
            "INSERT INTO platform (platform_id, chain) VALUES (?, ?) ON CONFLICT DO NOTHING",
            *(launch.platform_id, opening.chain),
        )
    transaction.tell(
        "INSERT INTO launch (launch_id, caller, state, workload, workload_version, terms_id, platform_id, generation, "
        "fingerprint, policy, godh, session, pdh_fingerprint, tek, tik, create_time, expire_time, grant_name, chip_id, "
        "oca) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        *(str(launch.launch_id), launch.caller, launch.state, launch.workload, launch.workload_version),
        *(launch.terms_id, launch.platform_id, launch.generation, launch.fingerprint, launch.policy),
        *(launch.godh, launch.session, launch.pdh_fingerprint, launch.keys.tek, launch.keys.tik),
        *(stamp(launch.create_time), stamp(launch.expire_time), launch.grant, launch.chip_id, launch.oca),
    )


def _end(transaction: Transaction, move: Move) -> Awaitable[int]:
    """The compare-and-set; 1 where the launch was as expected."""
    now, packet = stamp(move.time), move.packet
    return transaction.change(
        "UPDATE launch SET state=?, reason=?, end_time=?, tek=NULL, tik=NULL, measurement=?, digest=?, "
        "packet_header=?, packet_payload=?, receipt=?, generated=?, audit_id=?, firmware=? "
        "WHERE launch_id=? AND state=? AND expire_time>? AND expire_time<=?",
        *(move.to, move.reason, now, move.measurement, move.digest),
        *((packet.header, packet.payload, packet.receipt) if packet else (None, None, None)),
        *(move.generated, str(move.audit.audit_id), firmware_text(move.firmware)),
        *(str(move.launch_id), move.expected),
        *(now if move.in_time else -1, now if move.overdue else _FOREVER),
    )


def _sight(transaction: Transaction, sighting: PdhSighting) -> None:
    transaction.tell(
        "INSERT INTO pdh (pdh_fingerprint, api_major, api_minor, build) VALUES (?, ?, ?, ?) "
        "ON CONFLICT (pdh_fingerprint) DO UPDATE "
        "SET api_major=excluded.api_major, api_minor=excluded.api_minor, build=excluded.build "
        "WHERE (excluded.api_major, excluded.api_minor, excluded.build) < (pdh.api_major, pdh.api_minor, pdh.build)",
        *(sighting.pdh_fingerprint, *sighting.firmware),
    )
