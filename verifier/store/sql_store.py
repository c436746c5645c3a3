"""The store over an engine: its parts put together, the audit log, and the schema's steps at the start."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

from verifier.store.engine import Engine, Transaction, bring_forward
from verifier.store.migrations import Step, migrations
from verifier.store.rows import AuditRow, ChainedRecord, Checkpoint, Spending
from verifier.store.sql_common import OverEngine, append, the_head
from verifier.store.sql_launches import Launches, spend, the_ledger
from verifier.store.sql_owner import Documents, Secrets
from verifier.store.sql_rows import AUDIT_COLUMNS, chained_of, time_of


class AuditLog(OverEngine):
    """The part of `Store` that keeps the audit log."""

    async def record(self, audit: AuditRow, spending: Spending | None = None) -> None:
        """See `Store`."""

        async def work(transaction: Transaction) -> None:
            ledger = None if spending is None else the_ledger(transaction, spending)
            head = the_head(transaction)
            if spending is not None and ledger is not None:
                await spend(transaction, spending, ledger)
            append(transaction, await head, audit)

        await self._engine.write("record", work)

    async def records(self, launch_id: UUID | None, *, after: int, limit: int) -> Sequence[ChainedRecord]:
        """See `Store`."""
        one, values = ("", ()) if launch_id is None else ("launch_id=? AND", (str(launch_id),))
        rows = await self._rows(
            f"SELECT number, hash, {AUDIT_COLUMNS} FROM audit WHERE {one} number>? ORDER BY number LIMIT ?",  # noqa: S608 -- constants
            *(*values, after, limit),
        )
        return [chained_of(row) for row in rows]

    async def head(self) -> tuple[int, bytes, datetime | None]:
        """See `Store`."""
        rows = await self._rows("SELECT number, hash, time FROM audit_head")
        number, digest, time = rows[0]
        return number, digest, None if time is None else time_of(time)

    async def keep_checkpoint(self, checkpoint: Checkpoint) -> bool:
        """See `Store`."""
        return bool(
            await self._engine.write(
                "checkpoint",
                lambda transaction: transaction.change(
                    "INSERT INTO checkpoint (number, token) VALUES (?, ?) ON CONFLICT DO NOTHING",
                    *(checkpoint.number, checkpoint.token),
                ),
            )
        )

    async def checkpoints(self, *, after: int, limit: int) -> Sequence[Checkpoint]:
        """See `Store`."""
        rows = await self._rows(
            "SELECT number, token FROM checkpoint WHERE number>? ORDER BY number LIMIT ?", after, limit
        )
        return [Checkpoint(number=row[0], token=row[1]) for row in rows]


class SqlStore(Launches, Documents, Secrets, AuditLog):
    """The `Store` over an engine."""

    def __init__(self, engine: Engine, steps: Sequence[Step] | None = None) -> None:
        """Prepare a store; nothing is opened before `open`.

        Args:
            engine: the database.
            steps: the schema's; None for this version's.
        """
        super().__init__(engine)
        self._steps = migrations(engine.dialect) if steps is None else steps

    async def open(self, *, make: bool = False) -> bool:
        """Get hold of the database, and bring its schema forward.

        Args:
            make: make the store where there is none.

        Returns:
            Whether it was made.

        Raises:
            InvalidInput: it is not one that can be used.
            Unavailable: it cannot be reached, read or written, there is no store in it, another process holds it, or
                its schema is too new.
        """
        await self._engine.open(make=make)
        return await self._engine.write(
            "migrate", lambda transaction: bring_forward(transaction, self._steps, make=make)
        )

    async def close(self) -> None:
        """See `Store`."""
        await self._engine.close()

    async def flush_erased(self) -> None:
        """See `Store`."""
        await self._engine.flush()

    async def check(self) -> None:
        """See `Store`."""
        # A real commit: whether a disk takes a write shows in nothing less.
        await self._engine.write(
            "check",
            lambda transaction: transaction.change(
                "INSERT INTO mark (name, value) VALUES ('check', 1) ON CONFLICT (name) DO UPDATE SET value=mark.value+1"
            ),
        )
