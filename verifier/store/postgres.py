"""The store in a PostgreSQL that replicas share."""

from __future__ import annotations

from collections.abc import Callable

from common.errors import InvalidInput, Reason
from verifier.store.engine import Transaction, no_step, require_readable
from verifier.store.sql_store import SqlStore


class PostgresStore(SqlStore):
    """The `Store` over a PostgreSQL."""

    def __init__(
        self, dsn: str, on_step: Callable[[str], None] = no_step, *, schema: str = "sevattest", connections: int = 4
    ) -> None:
        """Prepare a store; nothing is connected before `open`.

        Args:
            dsn: a libpq connection string or URI; no error tells anything of it.
            on_step: called before and after each commit.
            schema: the schema in the database that holds the store's tables.
            connections: how many there are, at least 2: one writes, the others read.

        Raises:
            InvalidInput: the DSN cannot be read, the schema's name is not usable, or the extra is not installed.
        """
        try:
            # Whoever serves from SQLite needs no psycopg.
            from verifier.store.postgres_engine import PostgresEngine  # noqa: PLC0415 -- an extra
        except ImportError as error:
            raise InvalidInput(
                Reason.INVALID_CONFIGURATION,
                "store: needs the extra sevattest[postgres]",
                hint="pip install 'sevattest[postgres]'",
            ) from error
        super().__init__(PostgresEngine(dsn, on_step, schema=schema, connections=connections))

    async def open_to_read(self) -> None:
        """Get hold of the database as it is, in place of `open`: for a command that changes nothing.

        Raises:
            Unavailable: it cannot be reached or must not be used, or its schema is not there or another version's.
        """

        async def work(transaction: Transaction) -> None:
            made = await transaction.has_table("migration")
            query = "SELECT number, compatible_from FROM migration ORDER BY number"
            require_readable(await transaction.rows(query) if made else [], self._steps)

        await self._engine.read(work)
