"""What the store's transactions have in common: outcomes, the documents' revision, the audit chain.

A transaction first asks for all that it decides by, whatever of it may not be needed in the end, and then tells what
changes: so it is one way to a server and back. What it did before a decision against it is rolled back.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

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

    async def _decide(self, name: str, work: Callable[[Transaction], Awaitable[None]]) -> Outcome:
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


def the_head(transaction: Transaction) -> Awaitable[Row]:
    """Ask for the documents' revision, the first cell, and the end of the audit chain, for `append`."""
    return transaction.one(
        "SELECT mark.value, audit_head.number, audit_head.hash, audit_head.time "
        "FROM audit_head JOIN mark ON mark.name='revision'"
    )


def touch(transaction: Transaction) -> None:
    """Have the transaction write, though nothing of it changes: its commit is as durable as any.

    What it read, perhaps of a commit that no standby has yet, is so then, too.
    """
    transaction.tell("UPDATE audit_head SET number=number")


def append(transaction: Transaction, head: Row, audit: AuditRow) -> Head:
    """Write an audit record at the end of the chain, which becomes its head.

    Args:
        transaction: the transaction, which writes no other record.
        head: what `the_head` asked for.
        audit: the record.
    """
    _, before, digest_before, latest = head
    number, time, members = before + 1, stamp(audit.time), audit.members
    digest = record_hash(digest_before, number, members)
    transaction.tell(
        f"INSERT INTO audit (number, hash, {AUDIT_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",  # noqa: S608 -- constants
        *(number, digest, *members.values()),
    )
    transaction.tell(
        "UPDATE audit_head SET number=?, hash=?, time=?",
        number,
        digest,
        time if latest is None else max(latest, time),
    )
    return Head(number=number, hash=digest)
