"""The engine for replicas: one PostgreSQL that several processes share.

A process has one thread that writes and a few that read, with a connection each. More writers would only wait for each
other: every transaction ends with a record in the one audit log, and the log's head is locked until the commit.

What is set in each session, and why:
    isolation READ COMMITTED   each statement sees what was committed before it; what must not move is locked by rows
    synchronous_commit         stays what the server has, and must be `on` or `remote_apply`: a commit that was
                               answered survives a power cut, and reaches the standby where the server names one
    statement, lock and idle timeouts, TCP keepalives
                               nothing waits for ever for a server, another replica or a network that went away
    target_session_attrs       a standby is passed over: a DSN may name all servers of a cluster
    sslmode=verify-full        unless the DSN says otherwise; it does not matter on a Unix socket

Where a transaction is broken off before its commit was asked for (a deadlock, a server that was restarted), it is tried
again. Where the link breaks in the commit itself, nobody here can tell what became of it: whoever repeats finds out.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache

import psycopg
from psycopg.conninfo import conninfo_to_dict

from common.errors import InvalidInput, Reason, Unavailable
from verifier.store.engine import Row, T, Transaction, Value, no_step, unavailable

CONNECT_TIMEOUT_S = 5
STATEMENT_TIMEOUT_S = 10.0
LOCK_TIMEOUT_S = 5.0
FLUSH_TIMEOUT_S = 600.0
THREADS = 4
OLDEST_SERVER = 130000
_ATTEMPTS = 3

_DEFAULTS: dict[str, str | int] = {
    "application_name": "sev-verifier",
    "client_encoding": "UTF8",
    "connect_timeout": CONNECT_TIMEOUT_S,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,
    "target_session_attrs": "read-write",
    "sslmode": "verify-full",
}
_SCHEMA = re.compile(r"[a-z_][a-z0-9_]{0,62}")
_QUOTED = re.compile(r"\"[^\"]*\"|'[^']*'")
_AGAIN = frozenset({"40001", "40P01"})  # serialization failure, deadlock
_WARNING = "01000"  # in a commit: "canceling wait for synchronous replication"


class _Unfit(Exception):
    """The server can be reached and must not be used."""


class PostgresTransaction:
    """A `Transaction` on one connection."""

    def __init__(self, connection: psycopg.Connection[Row], schema: str) -> None:
        """Take a connection, in a transaction or to be read from."""
        self._connection = connection
        self._schema = schema

    def rows(self, sql: str, *values: Value) -> list[Row]:
        """See `Transaction`."""
        return self._connection.execute(_placeholders(sql), values).fetchall()

    def row(self, sql: str, *values: Value) -> Row | None:
        """See `Transaction`."""
        return self._connection.execute(_placeholders(sql), values).fetchone()

    def change(self, sql: str, *values: Value) -> int:
        """See `Transaction`."""
        return self._connection.execute(_placeholders(sql), values).rowcount

    def script(self, sql: str) -> None:
        """See `Transaction`."""
        self._connection.execute(sql.encode())

    def has_table(self, name: str) -> bool:
        """See `Transaction`."""
        found = self.row("SELECT 1 FROM pg_tables WHERE schemaname=? AND tablename=?", self._schema, name)
        return found is not None

    def lock(self, name: str) -> None:
        """See `Transaction`: an advisory lock, by a hash of the schema and the name."""
        digest = hashlib.sha256(f"{self._schema}\0{name}".encode()).digest()
        self.rows("SELECT pg_advisory_xact_lock(?)", int.from_bytes(digest[:8], "big", signed=True))


@lru_cache
def _placeholders(sql: str) -> bytes:
    return sql.replace("?", "%s").encode()


class PostgresEngine:
    """The `Engine` over a PostgreSQL, in a schema of its own."""

    dialect = "postgres"

    def __init__(
        self, dsn: str, on_step: Callable[[str], None] = no_step, *, schema: str = "sevattest", threads: int = THREADS
    ) -> None:
        """Prepare an engine; nothing is connected before `open`.

        Args:
            dsn: a libpq connection string or URI. It may hold a password: no error tells anything of it.
            on_step: called before and after each commit, on the thread of the transaction.
            schema: the schema that holds the store's tables.
            threads: how many there are, with a connection each: one writes, the others read; a single one does both.

        Raises:
            InvalidInput: the DSN cannot be read, or the schema's name is not usable as it is.
        """
        if not _SCHEMA.fullmatch(schema):
            raise InvalidInput(Reason.INVALID_CONFIGURATION, "store: the schema's name must be a lower-case word")
        try:
            self._parameters = {**_DEFAULTS, **conninfo_to_dict(dsn)}
        except psycopg.Error:
            # Its words quote the DSN.
            raise InvalidInput(Reason.INVALID_CONFIGURATION, "store: not a PostgreSQL connection string") from None
        self._on_step = on_step
        self._schema = schema
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="store-writer")
        self._readers = (
            ThreadPoolExecutor(max_workers=threads - 1, thread_name_prefix="store-reader")
            if threads > 1
            else self._writer
        )
        self._own = threading.local()
        self._guard = threading.Lock()
        self._connections: set[psycopg.Connection[Row]] = set()

    def __repr__(self) -> str:
        return f"PostgresEngine({self._schema}, redacted)"

    async def open(self) -> None:
        """Connect, see whether the server is fit, and make the schema. See `Engine`."""

        def start() -> None:
            try:
                connection = self._connected()
            except _Unfit as error:
                raise InvalidInput(Reason.INVALID_CONFIGURATION, f"store: {error}") from error
            except psycopg.Error as error:
                raise _cannot("be reached", error) from None
            self._make_schema(connection)

        await asyncio.get_running_loop().run_in_executor(self._writer, start)

    async def close(self) -> None:
        """Let go of the connections and the threads."""

        def stop() -> None:
            self._writer.shutdown(wait=True)
            self._readers.shutdown(wait=True)
            for connection in tuple(self._connections):
                self._drop(connection)

        await asyncio.to_thread(stop)

    async def read(self, work: Callable[[Transaction], T]) -> T:
        """See `Engine`."""

        def attempt(connection: psycopg.Connection[Row]) -> T:
            return work(PostgresTransaction(connection, self._schema))

        return await self._run(self._readers, "be read", attempt)

    async def write(self, name: str, work: Callable[[Transaction], T]) -> T:
        """See `Engine`."""

        def attempt(connection: psycopg.Connection[Row]) -> T:
            try:
                connection.execute("BEGIN ISOLATION LEVEL READ COMMITTED", prepare=False)
                result = work(PostgresTransaction(connection, self._schema))
                self._on_step(f"{name}:before-commit")
            except BaseException:
                self._roll_back(connection)
                raise
            self._commit(connection)
            self._on_step(f"{name}:after-commit")
            return result

        return await self._run(self._writer, "be written", attempt)

    async def flush(self) -> None:
        """Vacuum what had something erased.

        The server's free space, write-ahead log and backups are out of reach: what is there is sealed.
        """

        def attempt(connection: psycopg.Connection[Row]) -> None:
            connection.execute(f"SET statement_timeout = {_milliseconds(FLUSH_TIMEOUT_S)}".encode())
            try:
                connection.execute("VACUUM (SKIP_LOCKED, TRUNCATE FALSE) launch, secret")
            finally:
                if not connection.closed:
                    connection.execute(f"SET statement_timeout = {_milliseconds(STATEMENT_TIMEOUT_S)}".encode())

        await self._run(self._readers, "be vacuumed", attempt)

    # The threads' half.

    async def _run(self, threads: ThreadPoolExecutor, doing: str, attempt: Callable[[psycopg.Connection[Row]], T]) -> T:
        """Run `attempt` on one of some threads, again where it was broken off and did not commit."""

        def run() -> T:
            for left in reversed(range(_ATTEMPTS)):
                connection = None
                try:
                    connection = self._connected()
                    return attempt(connection)
                except _Unfit as error:
                    raise unavailable(f"the store cannot {doing}: {error}") from error
                except psycopg.Error as error:
                    if connection is None:
                        raise _cannot("be reached", error) from None
                    broken = connection.closed
                    if broken:
                        self._drop(connection)
                    if left and (broken or error.sqlstate in _AGAIN):
                        continue
                    raise _cannot(doing, error) from error
            raise AssertionError  # the last attempt returns or raises

        return await asyncio.get_running_loop().run_in_executor(threads, run)

    def _connected(self) -> psycopg.Connection[Row]:
        connection: psycopg.Connection[Row] | None = getattr(self._own, "connection", None)
        if connection is None or connection.closed:
            connection = psycopg.connect(**self._parameters, autocommit=True)  # type: ignore[arg-type]  # libpq's names
            with self._guard:
                self._connections.add(connection)
            try:
                self._set_up(connection)
            except BaseException:
                self._drop(connection)
                raise
            self._own.connection = connection
            self._own.warnings = []
            warnings = self._own.warnings
            connection.add_notice_handler(lambda notice: warnings.append(notice.sqlstate))
        return connection

    def _set_up(self, connection: psycopg.Connection[Row]) -> None:
        row = connection.execute(
            "SELECT current_setting('synchronous_commit'), current_setting('fsync'), "
            "current_setting('full_page_writes'), current_setting('server_encoding')"
        ).fetchone()
        if row is None:
            raise _Unfit("the server does not tell its settings")
        commit, fsync, pages, encoding = row
        if commit not in {"on", "remote_apply"}:
            raise _Unfit(f"the server's synchronous_commit is {commit}, and must be on")
        if (fsync, pages) != ("on", "on"):
            raise _Unfit("the server's fsync and full_page_writes must be on")
        if encoding != "UTF8":
            raise _Unfit(f"the database's encoding is {encoding}, and must be UTF8")
        if connection.info.server_version < OLDEST_SERVER:
            raise _Unfit(f"the server is older than PostgreSQL {OLDEST_SERVER // 10000}")
        # The commit's setting is pinned: a server that is reconfigured does not change it under this session.
        connection.execute(
            f'SET search_path TO "{self._schema}"; SET synchronous_commit TO {commit}; '
            f"SET statement_timeout TO {_milliseconds(STATEMENT_TIMEOUT_S)}; "
            f"SET lock_timeout TO {_milliseconds(LOCK_TIMEOUT_S)}; "
            f"SET idle_in_transaction_session_timeout TO {_milliseconds(STATEMENT_TIMEOUT_S * 3)}".encode()
        )

    def _make_schema(self, connection: psycopg.Connection[Row]) -> None:
        try:
            with connection.transaction():
                transaction = PostgresTransaction(connection, self._schema)
                transaction.lock("migration")
                if transaction.row("SELECT 1 FROM pg_namespace WHERE nspname=?", self._schema) is None:
                    transaction.script(f'CREATE SCHEMA "{self._schema}"')
        except psycopg.Error as error:
            raise _cannot("make its schema", error) from error

    def _commit(self, connection: psycopg.Connection[Row]) -> None:
        self._own.warnings.clear()
        try:
            done = connection.execute("COMMIT", prepare=False).statusmessage
        except psycopg.Error as error:
            self._drop(connection)
            raise _cannot("tell what became of a commit", error) from error
        if done != "COMMIT":
            raise unavailable("the store did not commit")
        if _WARNING in self._own.warnings:
            # It is on this server's disk and perhaps nowhere else: not what a commit promises here.
            raise unavailable("the store's standby did not confirm a commit")

    def _roll_back(self, connection: psycopg.Connection[Row]) -> None:
        try:
            connection.execute("ROLLBACK", prepare=False)
        except psycopg.Error:
            self._drop(connection)

    def _drop(self, connection: psycopg.Connection[Row]) -> None:
        with self._guard:
            self._connections.discard(connection)
        with suppress(psycopg.Error):
            connection.close()


def _milliseconds(seconds: float) -> int:
    return int(seconds * 1000)


def _cannot(doing: str, error: psycopg.Error) -> Unavailable:
    """The error, which callers read too: the server's sentence without the names that it quotes and its address."""
    words = error.diag.message_primary or str(error).partition("\n")[0].rpartition("failed: ")[2]
    words = _QUOTED.sub("…", words.replace("FATAL:", "")).strip()
    return unavailable(f"the store cannot {doing}: {words}")
