"""What the store's statements ask of a database, and how a schema is brought forward in any of them.

There is one set of statements, with `?` where a value goes. None of them locks anything: a transaction is alone, in
all processes that share the database.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator, Sequence
from time import time
from types import coroutine
from typing import Any, Protocol, TypeVar

from common.errors import OutcomeUnknown, Reason, Unavailable
from verifier.store.migrations import Step

T = TypeVar("T")
Row = tuple[Any, ...]
Value = str | bytes | int | None


@coroutine
def done(result: T) -> Generator[None, None, T]:
    """A result that is there already, to be awaited or not."""
    yield from ()
    return result


class Transaction(Protocol):
    """One transaction.

    Its statements are carried out in the order in which they are called. Their results may be awaited later: those
    that are called before anything is awaited go to a server together.
    """

    def rows(self, sql: str, *values: Value) -> Awaitable[list[Row]]:
        """What a statement returns."""
        ...

    def row(self, sql: str, *values: Value) -> Awaitable[Row | None]:
        """The first row that a statement returns."""
        ...

    def one(self, sql: str, *values: Value) -> Awaitable[Row]:
        """The row that a statement returns where the schema is as it should be."""
        ...

    def change(self, sql: str, *values: Value) -> Awaitable[int]:
        """Carry a statement out; how many rows it changed."""
        ...

    def tell(self, sql: str, *values: Value) -> None:
        """Carry a statement out that nobody waits for; where it fails, the transaction fails before its commit."""
        ...

    async def script(self, sql: str) -> None:
        """Carry several statements out."""
        ...

    def has_table(self, name: str) -> Awaitable[bool]:
        """Whether the schema has a table."""
        ...


class Engine(Protocol):
    """A database.

    Whatever it raises by itself is `Unavailable(STORE_UNAVAILABLE)`, and nothing was changed; or `OutcomeUnknown`,
    where it was asked for a commit and did not answer.

    What `work` raises passes through unchanged, after a rollback. It may be run more than once: where a transaction
    was broken off before its commit was asked for, the engine may try it again, and so where it shared a commit that
    did not come about.
    """

    @property
    def dialect(self) -> str:
        """Of its schema's steps."""
        ...

    async def open(self, *, make: bool) -> None:
        """Get hold of the database; nothing is asked about its schema.

        Args:
            make: make room for a store where there is none.

        Raises:
            InvalidInput: it is not one that can be used.
            Unavailable: it cannot be reached, it is not there, or another process holds it.
        """
        ...

    async def close(self) -> None:
        """Let go of it."""
        ...

    async def read(self, work: Callable[[Transaction], Awaitable[T]]) -> T:
        """Run `work`, which changes nothing; each of its statements sees what was committed before it."""
        ...

    async def write(self, name: str, work: Callable[[Transaction], Awaitable[T]]) -> T:
        """Run `work` in one transaction, durable when this returns.

        No other one, in no process, is carried out at the same time: what it read stays as it is until its commit, and
        it sees all that was committed before.
        """
        ...

    async def flush(self) -> None:
        """Make sure, as far as the database can, that what was erased is gone from its files too."""
        ...


def no_step(_step: str) -> None:
    """Production's hook before and after each commit: nothing."""


def unknown(words: str) -> OutcomeUnknown:
    """The error for a commit that was asked for, and nobody can tell whether it came about."""
    return OutcomeUnknown(Reason.OUTCOME_UNKNOWN, words)


def unavailable(words: str) -> Unavailable:
    """The error for a store that does not answer. Callers read it too: it names no data, no path and no address."""
    return Unavailable(Reason.STORE_UNAVAILABLE, words)


def no_store(where: str) -> Unavailable:
    """The error for a place where a store should be, and none is."""
    # Not made by the way: without its ledgers, what was spent could be spent again.
    return Unavailable(
        Reason.STORE_UNAVAILABLE,
        f"there is no store in {where}",
        hint="a disk that is not mounted, another folder or database? "
        "Only where there never was one: sev-verifier init --config FILE makes it",
    )


async def bring_forward(transaction: Transaction, steps: Sequence[Step], *, make: bool) -> bool:
    """Apply the steps that a store lacks. For one transaction: a process that is killed here leaves all or nothing.

    Args:
        transaction: the transaction.
        steps: those of this version.
        make: make the store where there is none.

    Returns:
        Whether there was none.

    Raises:
        Unavailable: there is none, or a newer version made steps that this one cannot serve.
    """
    if await transaction.has_table("migration"):
        found = await transaction.rows("SELECT number, compatible_from FROM migration ORDER BY number")
    elif not make:
        raise no_store("the database: it has none of the tables")
    else:
        await transaction.script(
            "CREATE TABLE migration (number INTEGER PRIMARY KEY, name TEXT NOT NULL, "
            "compatible_from INTEGER NOT NULL, time BIGINT NOT NULL);"
        )
        found = []
    require_servable(found, steps)
    newest = found[-1][0] if found else 0
    for step in steps:
        if step.number > newest:
            await transaction.script(step.sql)
            transaction.tell(
                "INSERT INTO migration (number, name, compatible_from, time) VALUES (?, ?, ?, ?)",
                *(step.number, step.name, step.compatible_from, int(time() * 1_000_000)),
            )
    return not found


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
        raise unavailable("the store has no schema: sev-verifier init never made it")
    if newest < known:
        raise unavailable(f"the store has schema {newest}, this version reads {known}")
