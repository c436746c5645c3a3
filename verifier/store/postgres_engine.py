"""The engine for replicas: one PostgreSQL that several processes share.

One transaction is carried out at a time, in all replicas: it begins with a lock that it holds until its commit is
durable. Whoever waits for it gets it in the order of coming, and nothing else is ever locked: there is nothing that two
could wait for each other by. Each replica takes as many transactions with it as wait (`verifier.store.together`).
Reading waits for nobody.

All of it is on the event loop: statements that need no answer of each other are one way to the server and back
(`verifier.store.postgres_link`). One session writes, the others read.

What is set in each session, and why:
    isolation READ COMMITTED   each statement sees what was committed before it, and so whoever got the lock sees all
    synchronous_commit         stays what the server has, and must be `on` or `remote_apply`: a commit that was
                               answered survives a power cut, and reaches the standby where the server names one
    statement, lock and idle timeouts, TCP keepalives
                               nothing waits for ever for a server, another replica or a network that went away; a
                               replica that stands still in a transaction loses it before others have waited too long
    target_session_attrs       a standby is passed over: a DSN may name all servers of a cluster
    sslmode=verify-full        unless the DSN says otherwise; it does not matter on a Unix socket

Where transactions are broken off before their commit was asked for (a server that was restarted), they are tried again.
Where the link breaks in the commit itself, nobody here can tell what became of it: whoever repeats finds out.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import psycopg
from psycopg.conninfo import conninfo_to_dict

from common.errors import InvalidInput, OutcomeUnknown, Reason, Unavailable
from verifier.store import postgres_link
from verifier.store.engine import Row, T, Transaction, no_step, unavailable, unknown
from verifier.store.postgres_link import Link, PostgresTransaction, Statement, answered_within
from verifier.store.together import Together, Write

CONNECT_TIMEOUT_S = 5
STATEMENT_TIMEOUT_S = 10.0
LOCK_TIMEOUT_S = 5.0
FLUSH_TIMEOUT_S = 600.0
TURN_S = 1.0  # of transactions in one commit, so that a replica that is slow does not hold the others up
SILENCE_S = 3.0  # less than LOCK_TIMEOUT_S: who waits for a replica that stands still gets its turn
CONNECTIONS = 4
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
# Serialization failure, deadlock, a statement that is not prepared because the trip that prepared it failed.
_AGAIN = frozenset({"40001", "40P01", "26000"})
_LOCKED = "55P03"
# Of a lock, of a statement: what all have waited for, each of them would wait for again.
_TIMEOUTS = frozenset({_LOCKED, "57014"})
_WARNING = "01000"  # in a commit: "canceling wait for synchronous replication"


class _Unfit(Exception):
    """The server can be reached and must not be used."""


class _Session:
    """A link that is made when it is needed, and made anew when it broke."""

    def __init__(self, connect: Callable[[], Awaitable[Link]]) -> None:
        self._connect = connect
        self._connecting: asyncio.Task[None] | None = None
        self._link: Link | None = None

    @property
    def under_way(self) -> int:
        """How many trips."""
        return 0 if self._link is None else self._link.under_way

    async def link(self) -> Link:
        """The link; raises what connecting raises."""
        while self._link is None or self._link.broken:
            if self._connecting is None:
                self._connecting = asyncio.create_task(self._make())
            # All who wait share one attempt; who is cancelled ends it for nobody.
            await asyncio.shield(self._connecting)
        return self._link

    async def _make(self) -> None:
        try:
            self._link = await self._connect()
        finally:
            self._connecting = None

    def drop(self) -> None:
        """Let go of it."""
        if self._connecting is not None:
            self._connecting.cancel()
        if self._link is not None:
            self._link.drop()


class PostgresEngine:
    """The `Engine` over a PostgreSQL, in a schema of its own."""

    dialect = "postgres"

    def __init__(
        self,
        dsn: str,
        on_step: Callable[[str], None] = no_step,
        *,
        schema: str = "sevattest",
        connections: int = CONNECTIONS,
    ) -> None:
        """Prepare an engine; nothing is connected before `open`.

        Args:
            dsn: a libpq connection string or URI. It may hold a password: no error tells anything of it.
            on_step: called before and after each commit.
            schema: the schema that holds the store's tables.
            connections: how many there are, at least 2: one writes, the others read.

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
        digest = hashlib.sha256(f"sevattest {schema}".encode()).digest()
        self._turn = int.from_bytes(digest[:8], "big", signed=True)
        self._writer = _Session(self._connected)
        self._readers = [_Session(self._connected) for _ in range(connections - 1)]
        self._together = Together(self._commit)
        self._closed = False

    def __repr__(self) -> str:
        return f"PostgresEngine({self._schema}, redacted)"

    async def open(self, *, make: bool) -> None:
        """Connect, see whether the server is fit, and make the schema where that is wanted. See `Engine`."""
        try:
            await self._writer.link()
        except _Unfit as error:
            raise InvalidInput(Reason.INVALID_CONFIGURATION, f"store: {error}") from error
        except psycopg.Error as error:
            raise _cannot("be reached", error) from None

        async def work(transaction: Transaction) -> None:
            if await transaction.row("SELECT 1 FROM pg_namespace WHERE nspname=?", self._schema) is None:
                await transaction.script(f'CREATE SCHEMA "{self._schema}"')

        if make:
            await self._together.write("schema", work)

    async def close(self) -> None:
        """Let go of the connections."""
        self._closed = True
        await self._together.ended()
        for session in (self._writer, *self._readers):
            session.drop()

    async def read(self, work: Callable[[Transaction], Awaitable[T]]) -> T:
        """See `Engine`."""

        async def attempt(link: Link) -> T:
            return await work(PostgresTransaction(link, self._schema))

        session = min(self._readers, key=lambda each: each.under_way)
        return await self._tried(session, "be read", attempt)

    async def write(self, name: str, work: Callable[[Transaction], Awaitable[T]]) -> T:
        """See `Engine`."""
        return await self._together.write(name, work)

    async def flush(self) -> None:
        """Vacuum what had something erased.

        The server's free space, write-ahead log and backups are out of reach: what is there is sealed.
        """

        async def attempt(link: Link) -> None:
            longer = f"SET statement_timeout TO {_milliseconds(FLUSH_TIMEOUT_S)}"
            await link.script(longer, limit=postgres_link.ANSWER_S)
            await link.script("VACUUM (SKIP_LOCKED, TRUNCATE FALSE) launch, secret", limit=2 * FLUSH_TIMEOUT_S)

        session = _Session(self._connected)
        try:
            await self._tried(session, "be vacuumed", attempt)
        finally:
            session.drop()

    # Commits.

    async def _commit(self, writes: Sequence[Write[Any]]) -> int:
        """See `Together`."""
        try:
            return await self._tried(self._writer, "be written", partial(self._carry_out, writes))
        except (Unavailable, OutcomeUnknown) as error:
            for each in writes:
                each.error = error
            return len(writes)

    async def _carry_out(self, writes: Sequence[Write[Any]], link: Link) -> int:
        """See `Together`; raises psycopg's errors where what failed is the fault of none, or of the one that there is.

        Whatever is raised, nothing was kept; but for `OutcomeUnknown`, which is final.
        """
        transaction, together = PostgresTransaction(link, self._schema), len(writes) > 1
        time, ends = asyncio.get_running_loop().time, float("inf")
        kept, done = [], 0
        try:
            transaction.tell("BEGIN ISOLATION LEVEL READ COMMITTED")
            transaction.tell("SELECT pg_advisory_xact_lock(?)", self._turn)
            while done < len(writes) and time() < ends:
                if await writes[done].carry_out(transaction, (psycopg.Error,), together=together):
                    kept.append(writes[done])
                done += 1
                if done == 1:  # which waited for the turn
                    ends = time() + TURN_S
            if not kept:
                await self._roll_back(link)
                return done
            await transaction.settle()
            for each in kept:
                self._on_step(f"{each.name}:before-commit")
            await self._commit_on(link)
        except psycopg.Error as error:
            await self._roll_back(link)
            if together and not link.broken and error.sqlstate not in _AGAIN | _TIMEOUTS:
                return 0
            raise
        except BaseException:
            link.drop()
            raise
        for each in kept:
            self._on_step(f"{each.name}:after-commit")
        return done

    async def _commit_on(self, link: Link) -> None:
        """Commit.

        Raises:
            psycopg.Error: the server says why it did not.
            OutcomeUnknown: nobody can tell whether it did, or it did less than it should.
        """
        link.warnings.clear()
        commit = Statement("COMMIT")
        try:
            await link.ask([commit])
        except psycopg.Error as error:
            if isinstance(error, psycopg.IntegrityError) and not link.broken:
                raise  # what was deferred
            link.drop()
            raise unknown(_cannot("tell what became of a commit", error).message) from error
        if commit.result is None or commit.result.command_status != b"COMMIT":
            raise psycopg.errors.InFailedSqlTransaction("the server did not commit")
        if _WARNING in link.warnings:
            # It is on this server's disk and perhaps nowhere else: not what a commit promises here.
            raise unknown("the store's standby did not confirm a commit")

    async def _roll_back(self, link: Link) -> None:
        with suppress(psycopg.Error):
            await link.ask([Statement("ROLLBACK")])

    # Connections.

    async def _tried(self, session: _Session, doing: str, attempt: Callable[[Link], Awaitable[T]]) -> T:
        """Run `attempt` on a session, again where it was broken off and did not commit."""
        for left in reversed(range(_ATTEMPTS)):
            if self._closed:
                raise unavailable("the store is closed")
            link = None
            try:
                link = await session.link()
                return await attempt(link)
            except _Unfit as error:
                raise unavailable(f"the store cannot {doing}: {error}") from error
            except psycopg.Error as error:
                if link is None:
                    raise _cannot("be reached", error) from None
                if left and (link.broken or error.sqlstate in _AGAIN):
                    continue
                raise _cannot(doing, error) from error
        raise AssertionError  # the last attempt returns or raises

    async def _connected(self) -> Link:
        connection = await psycopg.AsyncConnection.connect(**self._parameters, autocommit=True)  # type: ignore[arg-type]  # libpq's names
        try:
            async with answered_within(connection, postgres_link.ANSWER_S):
                await self._set_up(connection)
            return Link(connection)
        except BaseException:
            await connection.close()
            raise

    async def _set_up(self, connection: psycopg.AsyncConnection[Row]) -> None:
        answer = await connection.execute(
            "SELECT current_setting('synchronous_commit'), current_setting('fsync'), "
            "current_setting('full_page_writes'), current_setting('server_encoding')"
        )
        row = await answer.fetchone()
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
        await connection.execute(
            f'SET search_path TO "{self._schema}"; SET synchronous_commit TO {commit}; '
            # By a warning the server tells that it has given up waiting for a standby.
            "SET client_min_messages TO warning; "
            f"SET statement_timeout TO {_milliseconds(STATEMENT_TIMEOUT_S)}; "
            f"SET lock_timeout TO {_milliseconds(LOCK_TIMEOUT_S)}; "
            f"SET idle_in_transaction_session_timeout TO {_milliseconds(SILENCE_S)}".encode()
        )


def _milliseconds(seconds: float) -> int:
    return int(seconds * 1000)


def _cannot(doing: str, error: psycopg.Error) -> Unavailable:
    """The error, which callers read too: the server's sentence without the names that it quotes and its address."""
    words = error.diag.message_primary or str(error).partition("\n")[0].rpartition("failed: ")[2]
    words = _QUOTED.sub("…", words.replace("FATAL:", "")).strip()
    if error.sqlstate == _LOCKED:
        words += ": another session keeps what it waits for"
    return unavailable(f"the store cannot {doing}: {words}")
