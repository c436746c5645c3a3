"""What the store's transactions have in common: outcomes, the order of locks, the audit chain.

Every transaction takes its locks in this order, and leaves out what it does not need, so that no two can wait for each
other:

1. the documents' revision: shared by launches, exclusive for whoever changes documents;
2. the request, by its unique key: a second one of the same id waits for the first;
3. the caller (of a launch that is opened);
4. the grant's ledger;
5. terms, platform, the launch, the PDH; or the secret;
6. the audit log's head, last: it is held the shortest. After it, only the documents' seal, which the first lock guards.
"""

from __future__ import annotations

from collections.abc import Callable

from common.audit.chain import Head, record_hash
from verifier.store.engine import Engine, Row, Transaction, Value
from verifier.store.rows import AuditRow, Outcome
from verifier.store.sql_rows import AUDIT_COLUMNS, stamp


class Decided(Exception):
    """Ends a transaction that changes nothing."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome)
        self.outcome = outcome


class OverEngine:
    """A part of the store; all parts share one engine."""

    def __init__(self, engine: Engine) -> None:
        """Take the engine."""
        self._engine = engine

    async def _decide(self, name: str, work: Callable[[Transaction], None]) -> Outcome:
        """Run `work` in one transaction; a `Decided` from it rolls back and is the outcome."""
        try:
            await self._engine.write(name, work)
        except Decided as decided:
            return decided.outcome
        return Outcome.DONE

    async def _rows(self, sql: str, *values: Value) -> list[Row]:
        return await self._engine.read(lambda transaction: transaction.rows(sql, *values))

    async def _row(self, sql: str, *values: Value) -> Row | None:
        return await self._engine.read(lambda transaction: transaction.row(sql, *values))


def locked_revision(transaction: Transaction, *, change: bool) -> int:
    """The documents' revision, which nobody changes before the transaction ends.

    Args:
        transaction: the transaction.
        change: whether it will change documents; otherwise it only needs them as they are.
    """
    row = transaction.row(
        "SELECT value FROM mark WHERE name='revision' FOR UPDATE"
        if change
        else "SELECT value FROM mark WHERE name='revision' FOR SHARE"
    )
    if row is None:
        raise ValueError("the schema begins with a revision")
    revision: int = row[0]
    return revision


def append(transaction: Transaction, audit: AuditRow) -> Head:
    """Write an audit record at the end of the chain, which becomes its head. Late: others wait for the head."""
    head = transaction.row("SELECT number, hash, time FROM audit_head FOR UPDATE")
    if head is None:
        raise ValueError("the schema begins with a head")
    number, time, members = head[0] + 1, stamp(audit.time), audit.members
    digest = record_hash(head[1], number, members)
    transaction.change(
        f"INSERT INTO audit (number, hash, {AUDIT_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",  # noqa: S608 -- constants
        *(number, digest, *members.values()),
    )
    transaction.change(
        "UPDATE audit_head SET number=?, hash=?, time=?",
        number,
        digest,
        time if head[2] is None else max(head[2], time),
    )
    return Head(number=number, hash=digest)
