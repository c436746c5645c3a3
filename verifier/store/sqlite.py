"""The embedded store: one SQLite file, one connection, one thread that owns it.

All work runs on the store's own thread, one transaction after the other, so a caller that is cancelled leaves no
transaction open. Whatever SQLite raises becomes `Unavailable(STORE_UNAVAILABLE)` after a rollback, and the connection
is made anew for the next call: a disk that has space again, or is writable again, needs no restart.

`on_step` is called on the store's thread before and after each commit. The composition root passes nothing; the crash
tests pass a function that kills the process.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TypeVar
from uuid import UUID

from common.errors import Reason, Unavailable
from verifier.store import sqlite_file
from verifier.store.rows import AuditRow, LaunchRow, Move, Opening, Outcome, RequestKey, RequestRow
from verifier.store.sqlite_rows import LAUNCH_COLUMNS, launch_of, stamp, time_of

_T = TypeVar("_T")


class _Decided(Exception):
    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome)
        self.outcome = outcome


def _no_step(_step: str) -> None:
    """Production's hook: nothing."""


class SqliteStore:
    """The `Store` over one SQLite file."""

    def __init__(self, folder: Path, on_step: Callable[[str], None] = _no_step) -> None:
        """Prepare a store in `folder`; nothing is opened before `open`."""
        self._folder = folder
        self._path = folder / sqlite_file.FILE_NAME
        self._on_step = on_step
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="store")
        self._connection: sqlite3.Connection | None = None
        self._lock: sqlite_file.FolderLock | None = None
        self._inode = (0, 0)

    async def open(self) -> None:
        """Lock the folder, open or create the file, bring its schema forward.

        Raises:
            InvalidInput: the folder cannot be used.
            Unavailable: another process serves from it, or it cannot be read or written.
        """

        def start() -> None:
            sqlite_file.prepare_folder(self._folder)
            self._lock = sqlite_file.FolderLock(self._folder)
            sqlite_file.create(self._path)
            self._remember_file()
            try:
                sqlite_file.migrate(self._connected())
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
            raise Unavailable(Reason.STORE_UNAVAILABLE, "the store's file is not the file that was opened")

    async def _read(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        def run() -> _T:
            try:
                self._still_there()
                return work(self._connected())
            except (sqlite3.Error, OSError) as error:
                self._disconnect()
                raise sqlite_file.store_unavailable(error, "be read") from error

        return await asyncio.get_running_loop().run_in_executor(self._thread, run)

    async def _write(self, name: str, work: Callable[[sqlite3.Connection], None]) -> Outcome:
        """Run `work` in one transaction; a `_Decided` from it rolls back and is the outcome."""

        def run() -> Outcome:
            try:
                self._still_there()
                connection = self._connected()
                connection.execute("BEGIN IMMEDIATE")
                work(connection)
                self._on_step(f"{name}:before-commit")
                connection.execute("COMMIT")
            except _Decided as decided:
                self._roll_back()
                return decided.outcome
            except (sqlite3.Error, OSError) as error:
                self._roll_back()
                self._disconnect()
                raise sqlite_file.store_unavailable(error, "be written") from error
            except BaseException:
                self._roll_back()
                raise
            self._on_step(f"{name}:after-commit")
            return Outcome.DONE

        return await asyncio.get_running_loop().run_in_executor(self._thread, run)

    def _roll_back(self) -> None:
        if self._connection is not None and self._connection.in_transaction:
            with suppress(sqlite3.Error):
                self._connection.execute("ROLLBACK")

    # Reading.

    async def last_time(self) -> datetime | None:
        """See `Store`."""
        row = await self._read(lambda c: c.execute("SELECT value FROM mark WHERE name='time'").fetchone())
        return None if row is None else time_of(row[0])

    async def request(self, key: RequestKey) -> RequestRow | None:
        """See `Store`."""
        row = await self._read(
            lambda c: c.execute(
                "SELECT content, launch_id FROM request WHERE caller=? AND method=? AND request_id=?",
                (key.caller, key.method, str(key.request_id)),
            ).fetchone()
        )
        return None if row is None else RequestRow(key=key, content=row[0], launch_id=UUID(row[1]))

    async def launch(self, launch_id: UUID) -> LaunchRow | None:
        """See `Store`."""
        row = await self._read(
            lambda c: c.execute(
                f"SELECT {LAUNCH_COLUMNS} FROM launch WHERE launch_id=?",  # noqa: S608 -- a constant list of columns
                (str(launch_id),),
            ).fetchone()
        )
        return None if row is None else launch_of(row)

    async def terms(self, terms_id: bytes) -> bytes:
        """See `Store`."""
        return await self._one("SELECT body FROM terms WHERE terms_id=?", terms_id)

    async def chain(self, platform_id: bytes) -> bytes:
        """See `Store`."""
        return await self._one("SELECT chain FROM platform WHERE platform_id=?", platform_id)

    async def _one(self, query: str, key: bytes) -> bytes:
        row = await self._read(lambda c: c.execute(query, (key,)).fetchone())
        if row is None:
            raise Unavailable(Reason.STORE_UNAVAILABLE, "the store lacks what a launch was begun with")
        value: bytes = row[0]
        return value

    async def overdue(self, time: datetime, state: str, limit: int) -> Sequence[UUID]:
        """See `Store`."""
        rows = await self._read(
            lambda c: c.execute(
                "SELECT launch_id FROM launch WHERE state=? AND expire_time<=? ORDER BY expire_time LIMIT ?",
                (state, stamp(time), limit),
            ).fetchall()
        )
        return [UUID(row[0]) for row in rows]

    async def measured_before(self, measurement: bytes, besides: UUID) -> UUID | None:
        """See `Store`."""
        row = await self._read(
            lambda c: c.execute(
                "SELECT launch_id FROM launch WHERE measurement=? AND launch_id<>? ORDER BY end_time LIMIT 1",
                (measurement, str(besides)),
            ).fetchone()
        )
        return None if row is None else UUID(row[0])

    async def sealing_keys(self) -> frozenset[bytes]:
        """See `Store`."""
        rows = await self._read(
            # The schema: keys exist in an open launch and in no other. Of those there is an index.
            lambda c: c.execute("SELECT DISTINCT key_id FROM launch WHERE state='open'").fetchall()
        )
        return frozenset(row[0] for row in rows)

    # Writing.

    async def open_launch(self, opening: Opening) -> Outcome:
        """See `Store`."""

        def work(connection: sqlite3.Connection) -> None:
            launch = opening.launch
            if launch.keys is None:
                raise ValueError("an open launch has keys")
            self._refuse_taken(connection, opening.request.key)
            count = connection.execute(
                "SELECT count(*) FROM launch WHERE caller=? AND state=? AND expire_time>?",
                (launch.caller, launch.state, stamp(launch.create_time)),
            ).fetchone()[0]
            if count >= opening.open_cap:
                raise _Decided(Outcome.CAP_REACHED)
            connection.execute("INSERT OR IGNORE INTO terms VALUES (?, ?)", (launch.terms_id, opening.terms))
            connection.execute("INSERT OR IGNORE INTO platform VALUES (?, ?)", (launch.platform_id, opening.chain))
            connection.execute(
                "INSERT INTO launch (launch_id, caller, state, workload, workload_version, terms_id, platform_id, "
                "generation, fingerprint, policy, godh, session, pdh_fingerprint, key_id, tek, tik, create_time, "
                "expire_time) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    *(str(launch.launch_id), launch.caller, launch.state, launch.workload, launch.workload_version),
                    *(launch.terms_id, launch.platform_id, launch.generation, launch.fingerprint, launch.policy),
                    *(launch.godh, launch.session, launch.pdh_fingerprint),
                    *(launch.keys.key_id, launch.keys.tek, launch.keys.tik),
                    *(stamp(launch.create_time), stamp(launch.expire_time)),
                ),
            )
            self._keep(connection, opening.request, opening.audit)

        return await self._write("open", work)

    async def move(self, move: Move) -> Outcome:
        """See `Store`."""

        def work(connection: sqlite3.Connection) -> None:
            if move.request is not None:
                self._refuse_taken(connection, move.request.key)
            now = stamp(move.time)
            packet = move.packet
            moved = connection.execute(
                "UPDATE launch SET state=?, reason=?, end_time=?, key_id=NULL, tek=NULL, tik=NULL, measurement=?, "
                "digest=?, packet_header=?, packet_payload=?, receipt=?, generated=?, audit_id=? "
                "WHERE launch_id=? AND state=? AND (? OR expire_time>?) AND (? OR expire_time<=?) RETURNING 1",
                (
                    *(move.to, move.reason, now, move.measurement, move.digest),
                    *((packet.header, packet.payload, packet.receipt) if packet else (None, None, None)),
                    *(move.generated, str(move.audit.audit_id)),
                    *(str(move.launch_id), move.expected, not move.in_time, now, not move.overdue, now),
                ),
            ).fetchall()
            if not moved:
                raise _Decided(Outcome.LOST)
            self._keep(connection, move.request, move.audit)

        return await self._write("move", work)

    async def record(self, audit: AuditRow) -> None:
        """See `Store`."""
        await self._write("record", lambda connection: self._keep(connection, None, audit))

    async def erase_packets(self, before: datetime) -> int:
        """See `Store`."""
        erased = 0

        def work(connection: sqlite3.Connection) -> None:
            nonlocal erased
            erased = connection.execute(
                "UPDATE launch SET packet_header=NULL, packet_payload=NULL WHERE packet_header IS NOT NULL "
                "AND end_time<=?",
                (stamp(before),),
            ).rowcount

        await self._write("erase", work)
        return erased

    async def flush_erased(self) -> None:
        """See `Store`."""
        await self._read(lambda c: c.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone())

    async def check(self) -> None:
        """See `Store`."""

        def work(connection: sqlite3.Connection) -> None:
            # A real commit: whether a disk takes a write shows in nothing less.
            connection.execute("INSERT INTO mark VALUES ('check', 1) ON CONFLICT (name) DO UPDATE SET value=value+1")

        await self._write("check", work)

    @staticmethod
    def _refuse_taken(connection: sqlite3.Connection, key: RequestKey) -> None:
        taken = connection.execute(
            "SELECT 1 FROM request WHERE caller=? AND method=? AND request_id=?",
            (key.caller, key.method, str(key.request_id)),
        ).fetchone()
        if taken:
            raise _Decided(Outcome.REQUEST_TAKEN)

    @staticmethod
    def _keep(connection: sqlite3.Connection, request: RequestRow | None, audit: AuditRow) -> None:
        """The part that every transaction has: the request, the record, the clock's mark."""
        if request is not None:
            connection.execute(
                "INSERT INTO request VALUES (?, ?, ?, ?, ?)",
                (
                    *(request.key.caller, request.key.method, str(request.key.request_id)),
                    *(request.content, str(request.launch_id)),
                ),
            )
        connection.execute(
            "INSERT INTO audit (audit_id, time, event, launch_id, caller, reason, body) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                *(str(audit.audit_id), stamp(audit.time), audit.event),
                *(None if audit.launch_id is None else str(audit.launch_id), audit.caller, audit.reason, audit.body),
            ),
        )
        connection.execute(
            "INSERT INTO mark VALUES ('time', ?) ON CONFLICT (name) DO UPDATE SET value=max(value, excluded.value)",
            (stamp(audit.time),),
        )


def read_audit(path: Path, launch_id: UUID | None) -> list[AuditRow]:
    """All audit records of a store, oldest first, also while a process serves from it.

    Raises:
        Unavailable: the store cannot be read.
    """
    connection = sqlite_file.connect_reader(path)
    try:
        rows = connection.execute(
            "SELECT audit_id, time, event, launch_id, caller, reason, body FROM audit "
            "WHERE ?1 IS NULL OR launch_id=?1 ORDER BY number",
            (None if launch_id is None else str(launch_id),),
        ).fetchall()
    except sqlite3.Error as error:
        raise sqlite_file.store_unavailable(error, "be read") from error
    finally:
        connection.close()
    return [
        AuditRow(
            audit_id=UUID(row[0]),
            time=time_of(row[1]),
            event=row[2],
            launch_id=None if row[3] is None else UUID(row[3]),
            caller=row[4],
            reason=row[5],
            body=row[6],
        )
        for row in rows
    ]
