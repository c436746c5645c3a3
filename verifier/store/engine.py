"""What the store's statements ask of a database, and how a schema is brought forward in any of them.

There is one set of statements. They are written for PostgreSQL, with `?` where a value goes and with the row locks
(`FOR UPDATE`, `FOR SHARE` at the very end) that several processes need; the engine of SQLite, where one process writes
one transaction after the other, leaves the locks out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import time
from typing import Any, Protocol, TypeVar

from common.errors import Reason, Unavailable
from verifier.store.migrations import Step

T = TypeVar("T")
Row = tuple[Any, ...]
Value = str | bytes | int | None


class Transaction(Protocol):
    """One transaction, on the thread that it runs on."""

    def rows(self, sql: str, *values: Value) -> list[Row]:
        """What a statement returns."""
        ...

    def row(self, sql: str, *values: Value) -> Row | None:
        """The first row that a statement returns."""
        ...

    def change(self, sql: str, *values: Value) -> int:
        """Carry a statement out; how many rows it changed."""
        ...

    def script(self, sql: str) -> None:
        """Carry several statements out."""
        ...

    def has_table(self, name: str) -> bool:
        """Whether the schema has a table."""
        ...

    def lock(self, name: str) -> None:
        """Wait for whatever else holds this name, and hold it until the transaction ends."""
        ...


class Engine(Protocol):
    """A database. Whatever it raises by itself is `Unavailable(STORE_UNAVAILABLE)`.

    What `work` raises passes through unchanged, after a rollback. It may be run more than once: where a transaction
    was broken off before its commit was asked for, the engine may try it again.
    """

    @property
    def dialect(self) -> str:
        """Of its schema's steps."""
        ...

    async def open(self) -> None:
        """Get hold of the database; nothing is asked about its schema.

        Raises:
            InvalidInput: it is not one that can be used.
            Unavailable: it cannot be reached, or another process holds it.
        """
        ...

    async def close(self) -> None:
        """Let go of it."""
        ...

    async def read(self, work: Callable[[Transaction], T]) -> T:
        """Run `work`, which changes nothing; each of its statements sees what was committed before it."""
        ...

    async def write(self, name: str, work: Callable[[Transaction], T]) -> T:
        """Run `work` in one transaction, durable when this returns."""
        ...

    async def flush(self) -> None:
        """Make sure, as far as the database can, that what was erased is gone from its files too."""
        ...


def no_step(_step: str) -> None:
    """Production's hook before and after each commit: nothing."""


def unavailable(words: str) -> Unavailable:
    """The error for a store that does not answer. Callers read it too: it names no data, no path and no address."""
    return Unavailable(Reason.STORE_UNAVAILABLE, words)


def bring_forward(transaction: Transaction, steps: Sequence[Step]) -> None:
    """Apply the steps that a store lacks. For one transaction: a process that is killed here leaves all or nothing.

    Raises:
        Unavailable: a newer version made steps that this one cannot serve.
    """
    transaction.lock("migration")
    if transaction.has_table("migration"):
        found = transaction.rows("SELECT number, compatible_from FROM migration ORDER BY number")
    else:
        transaction.script(
            "CREATE TABLE migration (number INTEGER PRIMARY KEY, name TEXT NOT NULL, "
            "compatible_from INTEGER NOT NULL, time BIGINT NOT NULL);"
        )
        found = []
    require_servable(found, steps)
    newest = found[-1][0] if found else 0
    for step in steps:
        if step.number > newest:
            transaction.script(step.sql)
            transaction.change(
                "INSERT INTO migration (number, name, compatible_from, time) VALUES (?, ?, ?, ?)",
                *(step.number, step.name, step.compatible_from, int(time() * 1_000_000)),
            )


def require_servable(found: Sequence[Row], steps: Sequence[Step]) -> None:
    """Return if a process that knows `steps` may serve a store that has the steps `found`, which may be fewer.

    Args:
        found: number and compatible_from of each, by number.
        steps: what this process knows.

    Raises:
        Unavailable: it may not.
    """
    known = steps[-1].number
    needed = max((compatible_from for number, compatible_from in found if number > known), default=0)
    if needed > known:
        raise unavailable(f"the store has schema {found[-1][0]}, this version knows up to {known}")


def require_readable(found: Sequence[Row], steps: Sequence[Step]) -> None:
    """Return if a command that knows `steps`, and brings nothing forward, may read a store that has the steps `found`.

    Args:
        found: number and compatible_from of each, by number.
        steps: what the command knows.

    Raises:
        Unavailable: there are none, it lacks some, or a newer version made steps that this one cannot read.
    """
    require_servable(found, steps)
    newest, known = found[-1][0] if found else 0, steps[-1].number
    if not newest:
        raise unavailable("the store has no schema: no verifier has served from it yet")
    if newest < known:
        raise unavailable(f"the store has schema {newest}, this version reads {known}")
