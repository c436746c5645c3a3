"""The store in one SQLite file, and its audit log for whoever reads it beside the process that serves from it."""

from __future__ import annotations

import sqlite3
from collections.abc import Awaitable, Callable
from pathlib import Path
from uuid import UUID

from verifier.store import sqlite_file
from verifier.store.engine import T, Transaction, no_step
from verifier.store.rows import AuditRow
from verifier.store.sql_rows import AUDIT_COLUMNS, audit_of
from verifier.store.sql_store import SqlStore
from verifier.store.sqlite_engine import SqliteEngine, SqliteTransaction


class SqliteStore(SqlStore):
    """The `Store` over one SQLite file."""

    def __init__(self, folder: Path, on_step: Callable[[str], None] = no_step) -> None:
        """Prepare a store in `folder`; nothing is opened before `open`."""
        super().__init__(SqliteEngine(folder, on_step))


class SqliteReading:
    """The `Engine` for what a command reads beside the process that serves: the file is opened for each question."""

    dialect = "sqlite"

    def __init__(self, folder: Path) -> None:
        """Remember where the file is."""
        self._path = folder / sqlite_file.FILE_NAME

    async def open(self, *, make: bool) -> None:
        """See `Engine`; nothing is made."""

    async def close(self) -> None:
        """See `Engine`."""

    async def read(self, work: Callable[[Transaction], Awaitable[T]]) -> T:
        """See `Engine`."""
        connection = sqlite_file.connect_reader(self._path)
        try:
            return await work(SqliteTransaction(connection))
        except sqlite3.Error as error:
            raise sqlite_file.store_unavailable(error, "be read") from error
        finally:
            connection.close()

    async def write(self, name: str, work: Callable[[Transaction], Awaitable[T]]) -> T:
        """Nothing is written beside that process."""
        raise NotImplementedError

    async def flush(self) -> None:
        """Nothing was erased."""


def read_audit(path: Path, launch_id: UUID | None) -> list[AuditRow]:
    """All audit records of a store, oldest first, also while a process serves from it.

    Raises:
        Unavailable: the store cannot be read.
    """
    connection = sqlite_file.connect_reader(path)
    try:
        rows = connection.execute(
            f"SELECT {AUDIT_COLUMNS} FROM audit WHERE ?1 IS NULL OR launch_id=?1 ORDER BY number",  # noqa: S608 -- constants
            (None if launch_id is None else str(launch_id),),
        ).fetchall()
    except sqlite3.Error as error:
        raise sqlite_file.store_unavailable(error, "be read") from error
    finally:
        connection.close()
    return [audit_of(row) for row in rows]
