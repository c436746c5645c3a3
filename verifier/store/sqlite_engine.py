"""The embedded engine: one SQLite file, one connection, one thread that owns it.

All work runs on the engine's own thread, one transaction after the other, so a caller that is cancelled leaves no
transaction open. Whatever SQLite raises becomes `Unavailable(STORE_UNAVAILABLE)` after a rollback, and the connection
is made anew for the next call: a disk that has space again, or is writable again, needs no restart.

Transactions that wait for the thread share one commit, each in a savepoint of its own: the disk is waited for once, and
nobody is answered before. Where that commit does not come about, each of them is tried alone.

`on_step` is called on that thread for each transaction before and after its commit. The composition root passes
nothing; the crash tests pass a function that kills the process.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from common.errors import Unavailable
from verifier.store import sqlite_file
from verifier.store.engine import Row, T, Transaction, Value, no_step, unavailable
from verifier.store.worker import Call, Worker, Write


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
        self._worker = Worker("store", self._write)
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

        await self._worker.do(Call(start))

    async def close(self) -> None:
        """Let go of the file, the lock and the thread."""

        def stop() -> None:
            self._disconnect()
            if self._lock is not None:
                self._lock.release()
                self._lock = None

        await self._worker.do(Call(stop))
        await self._worker.end()

    async def read(self, work: Callable[[Transaction], T]) -> T:
        """See `Engine`."""

        def run() -> T:
            try:
                self._still_there()
                return work(SqliteTransaction(self._connected()))
            except (sqlite3.Error, OSError) as error:
                self._disconnect()
                raise sqlite_file.store_unavailable(error, "be read") from error

        return await self._worker.do(Call(run))

    async def write(self, name: str, work: Callable[[Transaction], T]) -> T:
        """See `Engine`."""
        return await self._worker.do(Write(name, work))

    async def flush(self) -> None:
        """Empty the write-ahead log: in the file itself, what was erased is overwritten."""
        await self.read(lambda transaction: transaction.rows("PRAGMA wal_checkpoint(TRUNCATE)"))

    # The thread's half.

    def _write(self, writes: Sequence[Write[Any]]) -> None:
        """Carry transactions out: in one commit, or each in its own where that one does not come about."""
        if len(writes) > 1 and self._commit(writes):
            return
        for each in writes:
            each.error = None
            self._commit([each])

    def _commit(self, writes: Sequence[Write[Any]]) -> bool:
        """Carry transactions out in one commit; whether all of them have their answer with that."""
        kept = []
        try:
            self._still_there()
            connection = self._connected()
            connection.execute("BEGIN IMMEDIATE")
            for each in writes:
                connection.execute("SAVEPOINT one")
                try:
                    each.result = each.work(SqliteTransaction(connection))
                    self._on_step(f"{each.name}:before-commit")
                except (sqlite3.Error, OSError):
                    raise
                except BaseException as error:  # noqa: BLE001 -- raised where somebody waits for it
                    each.error = error
                    connection.execute("ROLLBACK TO one")
                else:
                    kept.append(each)
                connection.execute("RELEASE one")
            connection.execute("COMMIT" if kept else "ROLLBACK")
        except (sqlite3.Error, OSError, Unavailable) as error:
            rolled_back = self._roll_back()
            self._disconnect()
            for each in writes:
                each.error = (
                    error if isinstance(error, Unavailable) else sqlite_file.store_unavailable(error, "be written")
                )
            return not rolled_back
        for each in kept:
            try:
                self._on_step(f"{each.name}:after-commit")
            except BaseException as error:  # noqa: BLE001 -- the same
                each.error = error
        return True

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

    def _roll_back(self) -> bool:
        """Give up a transaction; whether there was one to give up, so that it certainly was not committed."""
        if self._connection is not None and self._connection.in_transaction:
            with suppress(sqlite3.Error):
                self._connection.execute("ROLLBACK")
                return True
        return False
