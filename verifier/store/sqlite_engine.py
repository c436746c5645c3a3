"""The embedded engine: one SQLite file, one connection that writes and one that reads.

Statements run on the event loop. They take microseconds, for what they need is in memory, and to hand each of them to a
thread and back, both wanting the interpreter, takes a multiple of that. What waits for the disk or for somebody else is
on the engine's own thread: commits, checkpoints, opening, closing, a file that another program has locked.

Transactions share commits (`verifier.store.together`). Reading sees what was committed and nothing else.

Whatever SQLite raises becomes `Unavailable(STORE_UNAVAILABLE)` after a rollback, and the connections are made anew for
the next call: a disk that has space again, or is writable again, needs no restart.

`on_step` is called for each transaction before and after its commit. The composition root passes nothing; the crash
tests pass a function that kills the process.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from common.errors import SevattestError, Unavailable
from verifier.store import sqlite_file
from verifier.store.engine import Row, T, Transaction, Value, done, no_step, no_store, unavailable, unknown
from verifier.store.together import Together, Write

# A commit costs as much as two launches' statements, so under load it is worth a little waiting.
COMPANY_S = 0.01
_FAULTS = (sqlite3.Error, OSError)


class SqliteTransaction:
    """A `Transaction` on one connection."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        """Take a connection, in a transaction or to be read from."""
        self._connection = connection

    def rows(self, sql: str, *values: Value) -> Awaitable[list[Row]]:
        """See `Transaction`."""
        return done(self._connection.execute(sql, values).fetchall())

    def row(self, sql: str, *values: Value) -> Awaitable[Row | None]:
        """See `Transaction`."""
        # Not the first alone: a statement that is not read to its end keeps what it sees.
        found = self._connection.execute(sql, values).fetchall()
        return done(found[0] if found else None)

    def one(self, sql: str, *values: Value) -> Awaitable[Row]:
        """See `Transaction`."""
        return done(self._connection.execute(sql, values).fetchall()[0])

    def change(self, sql: str, *values: Value) -> Awaitable[int]:
        """See `Transaction`."""
        return done(self._connection.execute(sql, values).rowcount)

    def tell(self, sql: str, *values: Value) -> None:
        """See `Transaction`."""
        self._connection.execute(sql, values)

    async def script(self, sql: str) -> None:
        """See `Transaction`."""
        # Not `executescript`, which would commit first.
        for statement in _statements(sql):
            self._connection.execute(statement)

    async def has_table(self, name: str) -> bool:
        """See `Transaction`."""
        return await self.row("SELECT 1 FROM sqlite_schema WHERE type='table' AND name=?", name) is not None


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
        self._writer: sqlite3.Connection | None = None
        self._reader: sqlite3.Connection | None = None
        self._turn = asyncio.Lock()  # whose turn it is to use the connection that writes
        self._together = Together(self._commit, company_seconds=COMPANY_S)
        self._lock: sqlite_file.FolderLock | None = None
        self._inode = (0, 0)

    async def open(self, *, make: bool) -> None:
        """Lock the folder, open the file, or create it where that is wanted. See `Engine`."""

        def start() -> None:
            if not make:
                self._require_file()
            sqlite_file.prepare_folder(self._folder)
            self._lock = sqlite_file.FolderLock(self._folder)
            sqlite_file.create(self._path)
            self._remember_file()
            try:
                self._to_write()
                self._to_read()
            except sqlite3.Error as error:
                raise sqlite_file.store_unavailable(error, "be opened") from error

        async with self._turn:
            await self._apart(start)

    async def close(self) -> None:
        """Let go of the file, the lock and the thread."""

        def stop() -> None:
            self._disconnect()
            self._inode = (0, 0)
            if self._lock is not None:
                self._lock.release()
                self._lock = None

        async with self._turn:
            await self._apart(stop)
        self._thread.shutdown(wait=True)

    async def read(self, work: Callable[[Transaction], Awaitable[T]]) -> T:
        """See `Engine`."""
        try:
            self._still_there()
            # The connection that writes knows what it has just written; the other one would have to read it again.
            return await work(SqliteTransaction(self._to_read() if self._turn.locked() else self._to_write()))
        except (sqlite3.Error, OSError) as error:
            if self._turn.locked():
                _close(self._reader)
                self._reader = None
            else:
                self._disconnect()
            raise sqlite_file.store_unavailable(error, "be read") from error

    async def write(self, name: str, work: Callable[[Transaction], Awaitable[T]]) -> T:
        """See `Engine`."""
        return await self._together.write(name, work)

    async def flush(self) -> None:
        """Empty the write-ahead log: in the file itself, what was erased is overwritten."""
        async with self._turn:
            try:
                self._still_there()
                await self._apart(lambda: sqlite_file.checkpoint(self._to_write()))
            except (sqlite3.Error, OSError) as error:
                self._disconnect()
                raise sqlite_file.store_unavailable(error, "be written") from error

    async def _apart(self, work: Callable[[], T]) -> T:
        """Run on the thread what may wait."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    # Commits.

    async def _commit(self, writes: Sequence[Write[Any]]) -> int:
        """See `Together`."""
        asked = False  # for the commit
        async with self._turn:
            try:
                self._still_there()
                connection = await self._begun()
                transaction = SqliteTransaction(connection)
                together = len(writes) > 1
                kept = [each for each in writes if await each.carry_out(transaction, _FAULTS, together=together)]
                for each in kept:
                    self._on_step(f"{each.name}:before-commit")
                if kept:
                    asked = True
                    await self._apart(partial(connection.execute, "COMMIT"))
                else:
                    connection.execute("ROLLBACK")
            except Exception as error:
                rolled_back = self._roll_back()
                self._disconnect()
                if not isinstance(error, (*_FAULTS, Unavailable)):
                    raise
                told: SevattestError = (
                    error if isinstance(error, Unavailable) else sqlite_file.store_unavailable(error, "be written")
                )
                # A disk that is full has not taken the last page, which is what makes a commit one.
                if asked and not rolled_back and getattr(error, "sqlite_errorcode", None) != sqlite3.SQLITE_FULL:
                    told = unknown(told.message)
                for each in writes:
                    each.error = told
                return 0 if len(writes) > 1 and rolled_back else len(writes)
        for each in kept:
            self._on_step(f"{each.name}:after-commit")
        return len(writes)

    async def _begun(self) -> sqlite3.Connection:
        """The connection that writes, in a transaction."""
        connection = self._writer
        if connection is None:
            connection = await self._apart(self._to_write)
        try:
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:  # another program has it locked: wait for that, as long as is set
            await self._apart(partial(sqlite_file.begin_patiently, connection))
        return connection

    def _roll_back(self) -> bool:
        """Give up a transaction; whether there was one to give up, so that it certainly was not committed."""
        if self._writer is not None and self._writer.in_transaction:
            with suppress(sqlite3.Error):
                self._writer.execute("ROLLBACK")
                return True
        return False

    # Connections.

    def _to_write(self) -> sqlite3.Connection:
        if self._writer is None:
            self._writer = sqlite_file.connect(self._path)
        return self._writer

    def _to_read(self) -> sqlite3.Connection:
        if self._reader is None:
            self._reader = sqlite_file.connect(self._path)
            self._reader.execute("PRAGMA query_only=ON")
        return self._reader

    def _disconnect(self) -> None:
        _close(self._writer)
        _close(self._reader)
        self._writer = self._reader = None

    def _require_file(self) -> None:
        """Nothing is made in an empty folder: whatever is mounted over it later must not be missed."""
        with suppress(OSError):  # what else is wrong with the folder is said by who prepares it
            try:
                self._path.stat()
            except FileNotFoundError:
                raise no_store(str(self._folder)) from None

    def _remember_file(self) -> None:
        status = self._path.stat()
        self._inode = (status.st_dev, status.st_ino)

    def _still_there(self) -> None:
        """A file that was moved away would take every later release with it: stop instead."""
        try:
            status = self._path.stat()
        except OSError as error:
            raise sqlite_file.store_unavailable(error, "find its file") from error
        if (status.st_dev, status.st_ino) != self._inode:
            raise unavailable("the store's file is not the file that was opened")


def _close(connection: sqlite3.Connection | None) -> None:
    if connection is not None:
        with suppress(sqlite3.Error):
            connection.close()
