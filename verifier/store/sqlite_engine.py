"""The embedded engine: one SQLite file, one connection, one thread that owns it.

All work runs on the engine's own thread, one transaction after the other, so a caller that is cancelled leaves no
transaction open. Whatever SQLite raises becomes `Unavailable(STORE_UNAVAILABLE)` after a rollback, and the connection
is made anew for the next call: a disk that has space again, or is writable again, needs no restart.

`on_step` is called on that thread before and after each commit. The composition root passes nothing; the crash tests
pass a function that kills the process.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from verifier.store import sqlite_file
from verifier.store.engine import Row, T, Transaction, Value, no_step, unavailable


class SqliteTransaction:
    """A `Transaction` on one connection."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        """Take a connection, in a transaction or to be read from."""
        self._connection = connection

    def rows(self, sql: str, *values: Value) -> list[Row]:
        """See `Transaction`."""
        return self._connection.execute(_without_locks(sql), values).fetchall()

    def row(self, sql: str, *values: Value) -> Row | None:
        """See `Transaction`."""
        found = self.rows(sql, *values)
        return found[0] if found else None

    def change(self, sql: str, *values: Value) -> int:
        """See `Transaction`."""
        return self._connection.execute(sql, values).rowcount

    def script(self, sql: str) -> None:
        """See `Transaction`."""
        # Not `executescript`, which would commit first.
        for statement in _statements(sql):
            self._connection.execute(statement)

    def has_table(self, name: str) -> bool:
        """See `Transaction`."""
        return self.row("SELECT 1 FROM sqlite_schema WHERE type='table' AND name=?", name) is not None

    def lock(self, name: str) -> None:
        """See `Transaction`; there is no other transaction."""


@lru_cache
def _without_locks(sql: str) -> str:
    return sql.removesuffix(" FOR UPDATE").removesuffix(" FOR SHARE")


def _statements(script: str) -> Iterator[str]:
    pending = ""
    for line in script.splitlines(keepends=True):
        pending += line
        if sqlite3.complete_statement(pending):
            yield pending
            pending = ""


class SqliteEngine:
    """The `Engine` over one SQLite file."""

    dialect = "sqlite"

    def __init__(self, folder: Path, on_step: Callable[[str], None] = no_step) -> None:
        """Prepare an engine in `folder`; nothing is opened before `open`."""
        self._folder = folder
        self._path = folder / sqlite_file.FILE_NAME
        self._on_step = on_step
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="store")
        self._connection: sqlite3.Connection | None = None
        self._lock: sqlite_file.FolderLock | None = None
        self._inode = (0, 0)

    async def open(self) -> None:
        """Lock the folder, open or create the file. See `Engine`."""

        def start() -> None:
            sqlite_file.prepare_folder(self._folder)
            self._lock = sqlite_file.FolderLock(self._folder)
            sqlite_file.create(self._path)
            self._remember_file()
            try:
                self._connected()
            except sqlite3.Error as error:
                raise sqlite_file.store_unavailable(error, "be opened") from error

        await asyncio.get_running_loop().run_in_executor(self._thread, start)

    async def close(self) -> None:
        """Let go of the file, the lock and the thread."""

        def stop() -> None:
            self._disconnect()
            if self._lock is not None:
                self._lock.release()
                self._lock = None

        await asyncio.get_running_loop().run_in_executor(self._thread, stop)
        self._thread.shutdown(wait=True)

    async def read(self, work: Callable[[Transaction], T]) -> T:
        """See `Engine`."""

        def run() -> T:
            try:
                self._still_there()
                return work(SqliteTransaction(self._connected()))
            except (sqlite3.Error, OSError) as error:
                self._disconnect()
                raise sqlite_file.store_unavailable(error, "be read") from error

        return await asyncio.get_running_loop().run_in_executor(self._thread, run)

    async def write(self, name: str, work: Callable[[Transaction], T]) -> T:
        """See `Engine`."""

        def run() -> T:
            try:
                self._still_there()
                connection = self._connected()
                connection.execute("BEGIN IMMEDIATE")
                result = work(SqliteTransaction(connection))
                self._on_step(f"{name}:before-commit")
                connection.execute("COMMIT")
            except (sqlite3.Error, OSError) as error:
                self._roll_back()
                self._disconnect()
                raise sqlite_file.store_unavailable(error, "be written") from error
            except BaseException:
                self._roll_back()
                raise
            self._on_step(f"{name}:after-commit")
            return result

        return await asyncio.get_running_loop().run_in_executor(self._thread, run)

    async def flush(self) -> None:
        """Empty the write-ahead log: in the file itself, what was erased is overwritten."""
        await self.read(lambda transaction: transaction.rows("PRAGMA wal_checkpoint(TRUNCATE)"))

    # The thread's half.

    def _remember_file(self) -> None:
        status = self._path.stat()
        self._inode = (status.st_dev, status.st_ino)

    def _connected(self) -> sqlite3.Connection:
        if self._connection is None:
            self._connection = sqlite_file.connect(self._path)
        return self._connection

    def _disconnect(self) -> None:
        if self._connection is not None:
            with suppress(sqlite3.Error):
                self._connection.close()
            self._connection = None

    def _still_there(self) -> None:
        """A file that was moved away would take every later release with it: stop instead."""
        try:
            status = self._path.stat()
        except OSError as error:
            self._disconnect()
            raise sqlite_file.store_unavailable(error, "find its file") from error
        if (status.st_dev, status.st_ino) != self._inode:
            self._disconnect()
            raise unavailable("the store's file is not the file that was opened")

    def _roll_back(self) -> None:
        if self._connection is not None and self._connection.in_transaction:
            with suppress(sqlite3.Error):
                self._connection.execute("ROLLBACK")
