"""Stores that fail: killed processes, full disks, servers that stop, settings that lose commits. Nothing half stays."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest

from common.errors import OutcomeUnknown, Reason, Unavailable
from tests.contract.test_stores import chain_verifies
from tests.support.eventually import until
from tests.support.postgres import Server
from tests.support.postgres_relay import hasten
from tests.support.private_disk import private_disk
from tests.support.small_disk import SIZE
from tests.support.store_rows import SEAL, admin_request, audit, document, opening, release
from tests.support.stores import Place, count_open, count_released, go
from verifier.store import postgres_engine
from verifier.store.engine import Transaction
from verifier.store.postgres import PostgresStore
from verifier.store.postgres_engine import PostgresEngine
from verifier.store.rows import LedgerRow, Opening, Outcome, Spending
from verifier.store.sql_store import SqlStore

BEGIN, RELEASED = Spending(grant="g", change=count_open), Spending(grant="g", change=count_released)


async def refused(store: SqlStore) -> Unavailable:
    """The error that the store's check ends with."""
    with pytest.raises(Unavailable) as caught:
        await store.check()
    assert caught.value.reason is Reason.STORE_UNAVAILABLE
    return caught.value


# kill -9.


@pytest.mark.slow
@pytest.mark.parametrize(("step", "kept"), [("before", False), ("after", True)])
@pytest.mark.parametrize("name", ["open", "move"])
async def test_a_process_that_is_killed_at_a_commit_leaves_all_or_nothing(
    place: Place, name: str, step: str, *, kept: bool
) -> None:
    new = opening(spending=BEGIN)
    move = release(new.launch.launch_id, spending=RELEASED)
    calls: list[tuple[str, list[object]]] = [("open_launch", [new]), ("move", [move])]
    code, outcomes = await asyncio.to_thread(go, place.process(calls, die_at=f"{name}:{step}-commit"))
    assert code == -signal.SIGKILL
    assert outcomes == ([] if name == "open" else ["DONE"])
    store = place.store()
    await store.open(make=True)
    try:
        row = await store.launch(new.launch.launch_id)
        if name == "open":
            assert (row is not None) is kept
            assert (await store.request(new.request.key) is not None) is kept
            assert await store.ledger("g") == LedgerRow(open=int(kept))
        else:
            assert row is not None
            assert (row.state == "released") is kept
            assert (row.keys is None) is kept
            assert await store.ledger("g") == (LedgerRow(released=1) if kept else LedgerRow(open=1))
        assert await chain_verifies(store) == (name == "move") + kept
        # Whoever repeats finds out.
        again = await (store.open_launch(new) if name == "open" else store.move(move))
        assert again is (Outcome.REQUEST_TAKEN if kept else Outcome.DONE)
    finally:
        await store.close()


# Disks.


def test_a_full_disk_and_a_read_only_one_are_outages_that_pass(tmp_path: Path) -> None:
    with private_disk(tmp_path / "disk", SIZE) as disk:
        command = [*disk.enter, sys.executable, "-m", "tests.support.small_disk", str(disk.folder)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == ["full", "kept", "DONE", "read-only", "DONE"], done.stderr


# PostgreSQL's own.


@pytest.fixture
async def alone(own_postgres_server: Server) -> AsyncIterator[PostgresStore]:
    """A store over a server that the test may stop."""
    made = PostgresStore(own_postgres_server.dsn)
    await made.open(make=True)
    yield made
    await made.close()


async def test_a_server_that_stops_under_the_store_is_an_outage_that_passes(
    alone: PostgresStore, own_postgres_server: Server
) -> None:
    new = opening()
    assert await alone.open_launch(new) is Outcome.DONE
    own_postgres_server.stop()
    with pytest.raises(Unavailable) as caught:
        await alone.launch(new.launch.launch_id)
    for error in (caught.value, await refused(alone)):
        # Callers at the other site read this, too.
        assert str(own_postgres_server.folder) not in error.message
        assert "sevattest" not in error.message
    own_postgres_server.start()
    # The first call after it is served, whichever thread it comes to.
    assert await asyncio.gather(*(alone.launch(new.launch.launch_id) for _ in range(8))) == [new.launch] * 8
    assert await alone.move(release(new.launch.launch_id)) is Outcome.DONE
    own_postgres_server.stop()
    own_postgres_server.start()
    # So is the first one after a restart that nobody saw.
    assert await alone.move(release(new.launch.launch_id)) is Outcome.LOST
    assert await chain_verifies(alone) == 2


async def test_a_transaction_whose_session_is_ended_is_tried_again(
    shared: Callable[..., PostgresStore], postgres_server: Server, postgres_schema: str
) -> None:
    store = shared(f"application_name={postgres_schema}")
    await store.open(make=True)
    asked = []

    def change(row: LedgerRow) -> LedgerRow:
        asked.append(row)
        if len(asked) == 1:
            end_sessions(postgres_server, postgres_schema)
        return count_open(row)

    new = opening(spending=Spending(grant="g", change=change))
    assert await store.open_launch(new) is Outcome.DONE
    assert asked == [LedgerRow(), LedgerRow()]
    assert await store.ledger("g") == LedgerRow(open=1)
    assert await chain_verifies(store) == 1
    await store.close()


async def test_a_session_that_is_ended_again_and_again_is_an_outage(
    shared: Callable[..., PostgresStore], postgres_server: Server, postgres_schema: str
) -> None:
    store = shared(f"application_name={postgres_schema}")
    await store.open(make=True)

    def change(row: LedgerRow) -> LedgerRow:
        end_sessions(postgres_server, postgres_schema)
        return count_open(row)

    new = opening(spending=Spending(grant="g", change=change))
    with pytest.raises(Unavailable):
        await store.open_launch(new)
    assert await store.launch(new.launch.launch_id) is None
    assert await store.ledger("g") == LedgerRow()
    await store.close()


async def test_a_commit_that_nobody_answers_is_an_outage_and_is_not_tried_again(
    shared: Callable[..., PostgresStore], postgres_server: Server, postgres_schema: str
) -> None:
    steps: list[str] = []

    def on_step(step: str) -> None:
        steps.append(step)
        if step == "open:before-commit" and steps.count(step) == 1:
            end_sessions(postgres_server, postgres_schema)

    store = shared(f"application_name={postgres_schema}", on_step)
    await store.open(make=True)
    new = opening()
    with pytest.raises(OutcomeUnknown, match="cannot tell what became of a commit"):
        await store.open_launch(new)
    assert steps.count("open:before-commit") == 1
    assert await store.launch(new.launch.launch_id) is None
    assert await store.open_launch(new) is Outcome.DONE
    await store.close()


def end_sessions(server: Server, name: str) -> None:
    """What an administrator, or a failover, does to the store's sessions."""
    server.sql(f"SELECT count(pg_terminate_backend(pid, 10000)) FROM pg_stat_activity WHERE application_name='{name}'")  # noqa: S608 -- the test's


async def test_a_deadlock_is_tried_again(
    shared: Callable[..., PostgresStore],
    postgres_server: Server,
    postgres_schema: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Replicas have none among themselves: here it is with somebody else at the database."""
    monkeypatch.setattr("verifier.store.postgres_engine.SILENCE_S", 60)
    store = shared("options='-c deadlock_timeout=10ms'")
    await store.open(make=True)
    tries: list[int] = []
    others: list[asyncio.Task[object]] = []

    async def work(transaction: Transaction) -> None:
        tries.append(len(tries))
        if not others:
            await transaction.rows("SELECT 1")
            ask = asyncio.to_thread(other.execute, "SELECT pg_advisory_xact_lock(%s)", [turn_of(store)])
            others.append(asyncio.create_task(ask))
            waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type='Lock' AND query LIKE '%advisory%'"
            await until(lambda: postgres_server.sql(waiting) == "1")
        await transaction.change("UPDATE mark SET value=value+1 WHERE name='revision'")

    with psycopg.connect(postgres_server.dsn) as other:
        # It is the store's session that finds the deadlock, and is the one that is broken off.
        other.execute("SET deadlock_timeout = '60s'")
        other.execute(f"SELECT 1 FROM \"{postgres_schema}\".mark WHERE name='revision' FOR UPDATE".encode())  # noqa: S608 -- the test's
        write = asyncio.create_task(store._engine.write("work", work))
        await until(lambda: others)
        await others[0]
    await write
    assert tries == [0, 1]
    assert await store.revision() == 1
    await store.close()


def turn_of(store: PostgresStore) -> int:
    """The lock by which a store's transactions are one after the other."""
    engine = store._engine
    assert isinstance(engine, PostgresEngine)
    return engine._turn


async def test_a_lock_that_somebody_keeps_is_an_outage_that_passes(
    shared: Callable[..., PostgresStore],
    postgres_server: Server,
    postgres_schema: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("verifier.store.postgres_engine.LOCK_TIMEOUT_S", 0.1)
    store = shared()
    await store.open(make=True)
    with psycopg.connect(postgres_server.dsn) as holder:
        holder.execute(f'SELECT 1 FROM "{postgres_schema}".audit_head FOR UPDATE'.encode())  # noqa: S608 -- the test's
        with pytest.raises(Unavailable, match="lock timeout"):
            await store.record(audit())
    await store.record(audit())
    assert await chain_verifies(store) == 1
    await store.close()


async def test_a_server_that_writes_nothing_is_an_outage_that_passes(
    alone: PostgresStore, own_postgres_server: Server
) -> None:
    await alone.check()
    own_postgres_server.sql("ALTER SYSTEM SET default_transaction_read_only=on", "SELECT pg_reload_conf()")
    await until_written(alone, able=False)
    assert "read-only" in (await refused(alone)).message
    own_postgres_server.sql("ALTER SYSTEM RESET default_transaction_read_only", "SELECT pg_reload_conf()")
    await until_written(alone, able=True)
    new = opening()
    assert await alone.open_launch(new) is Outcome.DONE
    assert await alone.launch(new.launch.launch_id) == new.launch


async def until_written(store: SqlStore, *, able: bool) -> None:
    """Return when all sessions took up a setting that lets the store be written, or not."""
    async with asyncio.timeout(30):
        while True:
            answers = await asyncio.gather(*(store.check() for _ in range(8)), return_exceptions=True)
            if {answer is None for answer in answers} == {able}:
                return


async def test_a_full_disk_under_the_server_is_an_outage_that_passes(own_postgres_server: Server) -> None:
    limit = 32 << 20  # above the server's own files, of which the longest has 16 MiB
    own_postgres_server.stop()
    own_postgres_server.start(file_limit=limit)
    store = PostgresStore(own_postgres_server.dsn)
    await store.open(make=True)
    small, large = opening(), opening()
    assert await store.open_launch(small) is Outcome.DONE
    with pytest.raises(Unavailable, match="extend"):
        # What cannot be compressed goes to the disk as it is.
        await store.open_launch(replace_terms(large, os.urandom(limit + (1 << 20))))
    assert await store.launch(large.launch.launch_id) is None
    assert await store.open_launch(large) is Outcome.DONE
    assert await chain_verifies(store) == 2
    await store.close()


def replace_terms(new: Opening, terms: bytes) -> Opening:
    """The same launch with other terms."""
    return replace(new, terms=terms, launch=replace(new.launch, terms_id=b"x" * 32))


@pytest.mark.parametrize("options", ["", " options='-c client_min_messages=error'"], ids=["told", "kept quiet"])
async def test_a_standby_that_does_not_confirm_is_an_outage(own_postgres_server: Server, options: str) -> None:
    store = PostgresStore(own_postgres_server.dsn + options)
    await store.open(make=True)
    old = opening()
    end = release(old.launch.launch_id)
    assert (await store.open_launch(old), await store.move(end)) == (Outcome.DONE, Outcome.DONE)
    released = (old.launch.launch_id, end.audit.audit_id)
    applied = admin_request()
    assert await store.apply_document(document(), applied, audit("document.applied"), SEAL) is Outcome.DONE
    assert await store.confirm(*released, 1) is Outcome.DONE
    own_postgres_server.stop()
    own_postgres_server.start("synchronous_standby_names=ghost")
    waiting = "FROM pg_stat_activity WHERE wait_event='SyncRep'"
    new = opening(revision=1)
    commit = asyncio.create_task(store.open_launch(new))
    await until(lambda: own_postgres_server.sql(f"SELECT count(*) {waiting}") == "1")
    # Nobody is told of a commit before the standby has it ...
    assert not commit.done()
    own_postgres_server.sql(f"SELECT pg_cancel_backend(pid) {waiting}")
    # ... and not either when the server gives up waiting.
    with pytest.raises(OutcomeUnknown, match="standby did not confirm"):
        await commit
    # It is to be seen, on this server alone: nobody is given an answer because of it.
    assert await store.launch(new.launch.launch_id) is not None
    for answer in (store.confirm(*released, 1), store.admin_request(applied.key)):
        confirming = asyncio.ensure_future(answer)
        await until(lambda: own_postgres_server.sql(f"SELECT count(*) {waiting}") == "1")
        assert not confirming.done()
        own_postgres_server.sql(f"SELECT pg_cancel_backend(pid) {waiting}")
        with pytest.raises(OutcomeUnknown):
            await confirming
    own_postgres_server.stop()
    own_postgres_server.start()
    # It was kept after all: whoever repeats finds out.
    assert await store.open_launch(new) is Outcome.REQUEST_TAKEN
    assert await store.confirm(*released, 1) is Outcome.DONE
    assert await store.admin_request(applied.key) == applied
    await store.close()


async def test_a_standby_that_stays_away_is_waited_for_so_long_and_no_longer(
    own_postgres_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_engine, "LOCK_TIMEOUT_S", 0.2)
    store = PostgresStore(own_postgres_server.dsn)
    await store.open(make=True)
    own_postgres_server.stop()
    own_postgres_server.start("synchronous_standby_names=ghost")
    commit = asyncio.create_task(store.open_launch(opening()))
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event='SyncRep'"
    await until(lambda: own_postgres_server.sql(waiting) == "1")
    with pytest.MonkeyPatch.context() as patience:
        hasten(patience, store)
        with pytest.raises(OutcomeUnknown, match="does not answer"):
            await commit
    # The session that waits keeps the turn; reading goes on.
    with pytest.raises(Unavailable, match="lock timeout"):
        await store.open_launch(opening())
    assert (await store.head())[0] == 0
    own_postgres_server.stop()
    own_postgres_server.start()
    assert await store.open_launch(opening()) is Outcome.DONE
    await store.close()


async def test_a_transaction_that_the_server_turned_into_a_rollback_is_not_taken_for_a_commit(
    shared: Callable[..., PostgresStore],
) -> None:
    store = shared()
    await store.open(make=True)

    async def swallow(transaction: Transaction) -> None:
        with pytest.raises(psycopg.Error):
            await transaction.rows("SELECT nothing FROM nowhere")

    with pytest.raises(Unavailable, match="did not commit"):
        await store._engine.write("swallow", swallow)
    await store.check()
    await store.close()


async def test_two_connections_are_enough(postgres_server: Server, postgres_schema: str) -> None:
    store = PostgresStore(
        f"{postgres_server.dsn} application_name={postgres_schema}", schema=postgres_schema, connections=2
    )
    await store.open(make=True)
    new = opening()
    outcome, *_ = await asyncio.gather(store.open_launch(new), *(store.head() for _ in range(8)), store.flush_erased())
    assert outcome is Outcome.DONE
    assert await store.launch(new.launch.launch_id) == new.launch
    sessions = f"SELECT count(*) FROM pg_stat_activity WHERE application_name='{postgres_schema}'"  # noqa: S608 -- the test's
    await until(lambda: postgres_server.sql(sessions) == "2")
    await store.close()
    await until(lambda: postgres_server.sql(sessions) == "0")
