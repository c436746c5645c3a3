"""One session with a PostgreSQL, on the event loop: statements go out together, and their results come as they come.

libpq's pipeline mode by way of psycopg's `pq`. Statements are prepared when they are first sent. What goes to the
server at once is one trip: its statements are carried out in their order, and where one of them fails, the rest of the
trip is left out. Trips of several callers are under way at the same time, and fail each for itself.

Values travel in binary form, except for numbers, whose width the server knows best.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, Generic

import psycopg
from psycopg.errors import error_from_result
from psycopg.postgres import types
from psycopg.pq import ConnStatus, ExecStatus, Format
from psycopg.pq.abc import PGresult

from verifier.store.engine import Row, T, Value

_DONE = frozenset({ExecStatus.TUPLES_OK, ExecStatus.COMMAND_OK})
_LEFT_OUT, _TRIP_ENDED = ExecStatus.PIPELINE_ABORTED, ExecStatus.PIPELINE_SYNC
_TEXT, _BINARY = Format.TEXT, Format.BINARY
# Longer than any statement may take: the server's own limits are for what it works at, and this is for a server that
# stands still, and for a commit that waits for a standby, for which it has no limit.
ANSWER_S = 12.0
# For a step of the schema, which may read all that is stored. Where it waits for a lock, the server's limit counts.
STEP_S = 3600.0


def _number(cell: bytes) -> int:
    return int.from_bytes(cell, "big", signed=True)


# What the schema's columns and the engine's questions are made of.
_READERS: dict[int, Callable[[bytes], Any]] = {
    types["text"].oid: bytes.decode,
    types["bytea"].oid: bytes,
    types["int8"].oid: _number,
    types["int4"].oid: _number,
}


class Statement:
    """A statement, and its result when it has come."""

    __slots__ = ("cells", "formats", "result", "sql")

    def __init__(self, sql: str, values: Sequence[Value] = ()) -> None:
        """Take a statement with `?` for each of its values."""
        self.sql = sql
        self.cells: list[bytes | None] = []
        self.formats: list[int] = []
        for value in values:
            if isinstance(value, str):  # in text form it would end at a NUL
                self.cells.append(value.encode())
                self.formats.append(_BINARY)
            elif isinstance(value, int):
                self.cells.append(b"%d" % value)
                self.formats.append(_TEXT)
            else:
                self.cells.append(value)
                self.formats.append(_BINARY)
        self.result: PGresult | None = None


class _Trip:
    """Statements that went to the server at once.

    Attributes:
        back: done when the server has answered all of it.
        asked: statements, and the text of what was prepared on the way; in the order of the answers that lack.
        error: the first.
    """

    __slots__ = ("asked", "back", "error")

    def __init__(self, back: asyncio.Future[None]) -> None:
        self.back = back
        self.asked: deque[Statement | str] = deque()
        self.error: psycopg.Error | None = None

    def end(self, error: psycopg.Error | None) -> None:
        """Tell whoever waits; nobody does where the caller was cancelled."""
        if self.back.done():
            return
        if error is not None:
            self.back.set_exception(error)
        else:
            self.back.set_result(None)


class Link:
    """A session."""

    def __init__(self, connection: psycopg.AsyncConnection[Row]) -> None:
        """Take a connection that is in no transaction, and let it go when the link breaks or is dropped."""
        self._connection = connection
        self._pgconn = connection.pgconn
        self._loop = asyncio.get_running_loop()
        self._socket = self._pgconn.socket
        self._names: dict[str, bytes] = {}  # of prepared statements
        self._prepared = 0
        self._trips: deque[_Trip] = deque()
        self._oldest: _Trip | None = None  # at the last look
        self._watch: asyncio.TimerHandle | None = None
        self.broken = False
        self.warnings: set[str | None] = set()
        connection.add_notice_handler(lambda notice: self.warnings.add(notice.sqlstate))
        self._pgconn.nonblocking = 1
        self._enter()

    @property
    def under_way(self) -> int:
        """How many trips."""
        return len(self._trips)

    async def ask(self, statements: Sequence[Statement]) -> None:
        """Send statements together; returns when each has its result.

        Raises:
            psycopg.Error: the first that failed, or the link did. Those after it have no result.
        """
        if self.broken:
            raise psycopg.OperationalError("the connection is closed")
        trip = _Trip(self._loop.create_future())
        self._trips.append(trip)
        if self._watch is None:
            self._watch = self._loop.call_later(ANSWER_S, self._look)
        try:
            for statement in statements:
                name = self._names.get(statement.sql) or self._prepare(statement.sql, trip)
                self._pgconn.send_query_prepared(name, statement.cells, statement.formats, _BINARY)
                trip.asked.append(statement)
            self._pgconn.pipeline_sync()
            self._flush()
        except psycopg.Error as error:
            self._break(error)
        await trip.back

    async def script(self, sql: str, *, limit: float) -> None:
        """Carry several statements out, or one that cannot be prepared. Nothing else may be under way.

        Args:
            sql: the statements.
            limit: seconds that they may take.

        Raises:
            psycopg.Error: one of them failed, or the link did.
        """
        self._loop.remove_reader(self._socket)
        self._pgconn.exit_pipeline_mode()
        try:
            async with answered_within(self._connection, limit):
                await self._connection.execute(sql.encode())
        finally:
            if self._pgconn.status == ConnStatus.OK:
                self._enter()
            else:
                self.drop()

    def drop(self) -> None:
        """Let go of the session; the server gives up what was under way."""
        self._break(psycopg.OperationalError("the connection was dropped"))

    def _enter(self) -> None:
        self._pgconn.enter_pipeline_mode()
        self._loop.add_reader(self._socket, self._read)

    def _prepare(self, sql: str, trip: _Trip) -> bytes:
        first, *rest = sql.split("?")
        numbered = first + "".join(f"${number}{part}" for number, part in enumerate(rest, 1))
        self._prepared += 1
        name = self._names[sql] = b"s%d" % self._prepared
        self._pgconn.send_prepare(name, numbered.encode())
        trip.asked.append(sql)
        return name

    def _flush(self) -> None:
        if self._pgconn.flush():
            self._loop.add_writer(self._socket, self._write)

    def _write(self) -> None:
        try:
            if not self._pgconn.flush():
                self._loop.remove_writer(self._socket)
        except psycopg.Error as error:
            self._break(error)

    def _read(self) -> None:
        try:
            self._pgconn.consume_input()
            while not self._pgconn.is_busy() and self._trips:
                result = self._pgconn.get_result()
                if result is not None:
                    self._take(result)
                elif self._pgconn.status != ConnStatus.OK:
                    break
            if self._pgconn.status != ConnStatus.OK:
                raise psycopg.OperationalError("the connection is lost")
        except psycopg.Error as error:
            self._break(error)

    def _take(self, result: PGresult) -> None:
        """Give a result to whoever it is for."""
        trip, status = self._trips[0], result.status
        if status == _TRIP_ENDED:
            self._trips.popleft()
            trip.end(trip.error)
            return
        asked = trip.asked.popleft()
        if status in _DONE:
            if isinstance(asked, Statement):
                asked.result = result
            return
        if isinstance(asked, str):
            del self._names[asked]
        if status != _LEFT_OUT and trip.error is None:
            trip.error = error_from_result(result)

    def _look(self) -> None:
        """Give the session up where the same trip is under way as at the last look; look again while there are any."""
        self._watch = None
        oldest = self._trips[0] if self._trips else None
        if oldest is not None and oldest is self._oldest:
            self._break(psycopg.OperationalError("the server does not answer"))
        self._oldest = oldest
        if self._trips:
            self._watch = self._loop.call_later(ANSWER_S, self._look)

    def _break(self, error: psycopg.Error) -> None:
        if self.broken:  # the socket's number may be another link's by now
            return
        self.broken = True
        if self._watch is not None:
            self._watch.cancel()
        with suppress(ValueError):  # a loop that was closed
            self._loop.remove_reader(self._socket)
            self._loop.remove_writer(self._socket)
        self._pgconn.finish()
        trips, self._trips = self._trips, deque()
        for trip in trips:
            trip.end(trip.error or error)


@asynccontextmanager
async def answered_within(connection: psycopg.AsyncConnection[Row], limit: float) -> AsyncIterator[None]:
    """Give a connection up where what is asked with psycopg's own means takes longer than `limit` seconds.

    To whoever waits, the server has gone. A cancellation would not do: psycopg then asks the server to cancel, and
    waits for a server that stands still once more.

    Raises:
        psycopg.OperationalError: it took longer.
    """
    late = False

    def give_up() -> None:
        nonlocal late
        late = True
        with suppress(psycopg.Error, OSError), socket.socket(fileno=os.dup(connection.pgconn.socket)) as its_end:
            its_end.shutdown(socket.SHUT_RDWR)

    watch = asyncio.get_running_loop().call_later(limit, give_up)
    try:
        yield
    except psycopg.Error:
        if late:
            raise psycopg.OperationalError("the server does not answer") from None
        raise
    finally:
        watch.cancel()


class _Answer(Generic[T]):
    """What a statement will have returned."""

    __slots__ = ("_read", "_statement", "_transaction")

    def __init__(self, transaction: PostgresTransaction, statement: Statement, read: Callable[[PGresult], T]) -> None:
        self._transaction = transaction
        self._statement = statement
        self._read = read

    def __await__(self) -> Generator[Any, None, T]:
        if self._statement.result is None:
            yield from self._transaction.settle().__await__()
        if self._statement.result is None:
            raise psycopg.errors.InFailedSqlTransaction("an earlier statement failed")
        return self._read(self._statement.result)


class PostgresTransaction:
    """A `Transaction` on one link."""

    def __init__(self, link: Link, schema: str) -> None:
        """Take a link, in a transaction or to be read from."""
        self._link = link
        self._schema = schema
        self._unsent: list[Statement] = []

    def rows(self, sql: str, *values: Value) -> _Answer[list[Row]]:
        """See `Transaction`."""
        return _Answer(self, self._queue(sql, values), _rows)

    def row(self, sql: str, *values: Value) -> _Answer[Row | None]:
        """See `Transaction`."""
        return _Answer(self, self._queue(sql, values), _row)

    def one(self, sql: str, *values: Value) -> _Answer[Row]:
        """See `Transaction`."""
        return _Answer(self, self._queue(sql, values), _one)

    def change(self, sql: str, *values: Value) -> _Answer[int]:
        """See `Transaction`."""
        return _Answer(self, self._queue(sql, values), _changed)

    def tell(self, sql: str, *values: Value) -> None:
        """See `Transaction`."""
        self._queue(sql, values)

    async def script(self, sql: str) -> None:
        """See `Transaction`."""
        await self.settle()
        await self._link.script(sql, limit=STEP_S)

    async def has_table(self, name: str) -> bool:
        """See `Transaction`."""
        found = await self.row("SELECT 1 FROM pg_tables WHERE schemaname=? AND tablename=?", self._schema, name)
        return found is not None

    async def settle(self) -> None:
        """Send what was not sent; returns when all of it was carried out."""
        if self._unsent:
            statements, self._unsent = self._unsent, []
            await self._link.ask(statements)

    def _queue(self, sql: str, values: Sequence[Value]) -> Statement:
        statement = Statement(sql, values)
        self._unsent.append(statement)
        return statement


def _rows(result: PGresult) -> list[Row]:
    readers = [_READERS[result.ftype(column)] for column in range(result.nfields)]
    return [
        tuple(
            None if (cell := result.get_value(number, column)) is None else read(cell)
            for column, read in enumerate(readers)
        )
        for number in range(result.ntuples)
    ]


def _one(result: PGresult) -> Row:
    return _rows(result)[0]


def _row(result: PGresult) -> Row | None:
    found = _rows(result)
    return found[0] if found else None


def _changed(result: PGresult) -> int:
    return result.command_tuples or 0
