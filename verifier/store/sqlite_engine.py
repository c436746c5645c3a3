"""The embedded engine: one SQLite file, one connection that writes and one that reads.

Statements run on the event loop. They take microseconds, for what they need is in memory, and to hand each of them to a
thread and back, both wanting the interpreter, takes a multiple of that. What waits for the disk or for somebody else is
on the engine's own thread: commits, checkpoints, opening, closing, a file that another program has locked.

Transactions that come while a commit is under way share the next one, each in a savepoint of its own: the disk is
waited for once, and nobody is answered before. As long as they come like that, each commit waits some milliseconds for
more. Where a common commit does not come about, each of them is tried alone. A caller that is cancelled leaves no
transaction open. Reading sees what was committed and nothing else.

Whatever SQLite raises becomes `Unavailable(STORE_UNAVAILABLE)` after a rollback, and the connections are made anew for
the next call: a disk that has space again, or is writable again, needs no restart.

`on_step` is called for each transaction before and after its commit. The composition root passes nothing; the crash
tests pass a function that kills the process.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Generic, cast

from common.errors import Unavailable
from verifier.store import sqlite_file
from verifier.store.engine import Row, T, Transaction, Value, no_step, unavailable

TOGETHER_MAX = 64  # transactions in one commit, so that the first does not wait long for the last
# A commit costs as much as two launches' statements, so under load it is worth a little waiting; a caller that is alone
# never waits.
COMPANY_S = 0.01


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


class _Write(Generic[T]):
    """A transaction that waits for its commit, and what became of it.

    Attributes:
        name: of its steps.
        work: what it does.
        result: what `work` returned; counts while there is no `error`.
        error: what it raised, or why it was not committed.
        answered: for whoever waits.
    """

    def __init__(self, name: str, work: Callable[[Transaction], T]) -> None:
        self.name = name
        self.work = work
        self.result: T | None = None
        self.error: BaseException | None = None
        self.answered: asyncio.Future[T] = asyncio.get_running_loop().create_future()

    def answer(self) -> None:
        """Tell whoever waits; nobody does where the caller was cancelled."""
        if self.answered.done():
            return
        if self.error is not None:
            self.answered.set_exception(self.error)
        else:
            self.answered.set_result(cast("T", self.result))


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
        self._waiting: list[_Write[Any]] = []
        self._committing: asyncio.Task[None] | None = None
        self._company = False  # whether the last commit was shared, or somebody waited for its end
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

    async def read(self, work: Callable[[Transaction], T]) -> T:
        """See `Engine`."""
        try:
            self._still_there()
            # The connection that writes knows what it has just written; the other one would have to read it again.
            return work(SqliteTransaction(self._to_read() if self._turn.locked() else self._to_write()))
        except (sqlite3.Error, OSError) as error:
            if self._turn.locked():
                _close(self._reader)
                self._reader = None
            else:
                self._disconnect()
            raise sqlite_file.store_unavailable(error, "be read") from error

    async def write(self, name: str, work: Callable[[Transaction], T]) -> T:
        """See `Engine`."""
        write = _Write(name, work)
        self._waiting.append(write)
        if self._committing is None:
            self._committing = asyncio.create_task(self._commit_waiting())
        return await write.answered

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

    async def _commit_waiting(self) -> None:
        """Carry out all transactions that wait, and those that come meanwhile: in one commit, or else each alone."""
        while self._waiting:
            if self._company and len(self._waiting) < TOGETHER_MAX:
                await asyncio.sleep(COMPANY_S)
            writes, self._waiting = self._waiting[:TOGETHER_MAX], self._waiting[TOGETHER_MAX:]
            try:
                async with self._turn:
                    if not await self._commit(writes):
                        for each in writes:
                            each.error = None
                            await self._commit([each])
            except BaseException as error:  # noqa: BLE001 -- a defect is no reason to leave anybody waiting
                for each in writes:
                    each.error = error
            for each in writes:
                each.answer()
            self._company = len(writes) + len(self._waiting) > 1
        self._committing = None

    async def _commit(self, writes: Sequence[_Write[Any]]) -> bool:
        """Carry transactions out in one commit.

        Returns:
            Whether each has its answer with that; otherwise certainly nothing was kept, for the fault of one of them.
        """
        try:
            self._still_there()
            connection = await self._begun()
            kept = [each for each in writes if self._carry_out(each, connection)]
            if kept:
                await self._apart(partial(connection.execute, "COMMIT"))
            else:
                connection.execute("ROLLBACK")
        except (sqlite3.Error, OSError, Unavailable) as error:
            rolled_back = self._roll_back()
            self._disconnect()
            for each in writes:
                each.error = (
                    error if isinstance(error, Unavailable) else sqlite_file.store_unavailable(error, "be written")
                )
            return len(writes) == 1 or not rolled_back
        for each in kept:
            try:
                self._on_step(f"{each.name}:after-commit")
            except BaseException as error:  # noqa: BLE001 -- raised where somebody waits for it
                each.error = error
        return True

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

    def _carry_out(self, write: _Write[Any], connection: sqlite3.Connection) -> bool:
        """Do what one transaction does; whether it is to be kept."""
        connection.execute("SAVEPOINT one")
        try:
            write.result = write.work(SqliteTransaction(connection))
            self._on_step(f"{write.name}:before-commit")
        except (sqlite3.Error, OSError):
            raise
        except BaseException as error:  # noqa: BLE001 -- raised where somebody waits for it
            write.error = error
            connection.execute("ROLLBACK TO one")
        connection.execute("RELEASE one")
        return write.error is None

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
