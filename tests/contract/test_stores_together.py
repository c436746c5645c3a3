"""Transactions that come together share a commit, and nothing else: each is kept, refused or failed by itself."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest

from common.errors import LimitExceeded, OutcomeUnknown, Reason, Unavailable
from tests.contract.test_stores import chain_verifies
from tests.support.eventually import until
from tests.support.postgres import Server
from tests.support.store_rows import audit, opening, release
from tests.support.stores import Place, go
from verifier.store.engine import Transaction
from verifier.store.postgres_engine import PostgresEngine
from verifier.store.postgres_link import Link, Statement
from verifier.store.rows import LedgerRow, Opening, Outcome, RequestKey, Spending
from verifier.store.sql_store import SqlStore
from verifier.store.sqlite_engine import SqliteEngine
from verifier.store.together import TOGETHER_MAX

MANY = 20


class Watched:
    """A store that tells what it says to its database.

    Attributes:
        steps: before and after commits.
        said: statements.
        trips: how many of them went to a server together.
    """

    def __init__(self, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[str] = []
        self.said: list[str] = []
        self.trips: list[int] = []
        self.on_step: Callable[[str], None] = self.steps.append
        self.store = place.store(self._step)
        ask = Link.ask

        async def listen(link: Link, statements: Sequence[Statement]) -> None:
            self.said += [each.sql for each in statements]
            self.trips.append(len(statements))
            await ask(link, statements)

        monkeypatch.setattr(Link, "ask", listen)

    def _step(self, step: str) -> None:
        self.on_step(step)

    async def open(self) -> None:
        await self.store.open(make=True)
        engine = self.store._engine
        if isinstance(engine, SqliteEngine):
            engine._to_write().set_trace_callback(self.said.append)
        self.forget()

    def forget(self) -> None:
        for each in (self.steps, self.said, self.trips):
            each.clear()

    def count(self, statement: str) -> int:
        return sum(each.startswith(statement) for each in self.said)


@pytest.fixture
async def watched(place: Place, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Watched]:
    made = Watched(place, monkeypatch)
    await made.open()
    yield made
    await made.store.close()


async def test_what_waits_shares_a_commit_and_the_first_does_not_wait(watched: Watched) -> None:
    news = [opening(cap=MANY) for _ in range(MANY)]
    assert await asyncio.gather(*(watched.store.open_launch(new) for new in news)) == [Outcome.DONE] * MANY
    assert 1 <= watched.count("COMMIT") < MANY
    assert Counter(watched.steps)["open:before-commit"] == Counter(watched.steps)["open:after-commit"] == MANY
    assert {await watched.store.launch(new.launch.launch_id) == new.launch for new in news} == {True}
    assert await chain_verifies(watched.store) == MANY
    watched.forget()
    assert await watched.store.open_launch(opening(cap=MANY + 1)) is Outcome.DONE
    assert watched.count("COMMIT") == 1
    # Who is alone needs nothing to be told apart from others by.
    assert watched.count("SAVEPOINT") == 0


async def test_no_commit_is_shared_by_more_than_so_many(watched: Watched) -> None:
    await asyncio.gather(*(watched.store.record(audit()) for _ in range(TOGETHER_MAX + 1)))
    assert watched.count("COMMIT") == 2
    assert watched.count("SAVEPOINT") == TOGETHER_MAX
    assert await chain_verifies(watched.store) == TOGETHER_MAX + 1


async def test_one_that_is_refused_takes_nobody_with_it(watched: Watched) -> None:
    def busy(_row: LedgerRow) -> LedgerRow:
        raise LimitExceeded(Reason.GRANT_BUSY, "the grant is busy")

    news = [opening(cap=MANY) for _ in range(MANY)]
    news[3] = opening(cap=MANY, spending=Spending(grant="g", change=busy))
    news[5] = replace(news[5], revision=7)
    ended = await asyncio.gather(*(watched.store.open_launch(new) for new in news), return_exceptions=True)
    refused, changed = ended[3], ended[5]
    assert isinstance(refused, LimitExceeded)
    assert changed is Outcome.DOCUMENTS_CHANGED
    assert Counter(map(str, ended))[str(Outcome.DONE)] == MANY - 2
    for new, lost in ((each, index in {3, 5}) for index, each in enumerate(news)):
        assert (await watched.store.launch(new.launch.launch_id) is None) is lost
        assert (await watched.store.request(new.request.key) is None) is lost
    assert await watched.store.ledger("g") == LedgerRow()
    assert await chain_verifies(watched.store) == MANY - 2
    assert watched.count("COMMIT") == 1


async def test_nothing_stays_of_one_that_came_too_late(watched: Watched) -> None:
    new = opening()
    await watched.store.open_launch(new)
    watched.forget()
    moves = [release(new.launch.launch_id) for _ in range(MANY)]
    ended = await asyncio.gather(*(watched.store.move(move) for move in moves))
    assert ended == [Outcome.DONE] + [Outcome.LOST] * (MANY - 1)
    kept = [move.request is not None and await watched.store.request(move.request.key) for move in moves]
    assert kept == [moves[0].request] + [None] * (MANY - 1)
    assert await chain_verifies(watched.store) == 2
    assert watched.count("COMMIT") == 1


@pytest.mark.parametrize("bad", [4, 0, MANY - 1])
async def test_one_that_the_schema_refuses_takes_nobody_with_it(watched: Watched, bad: int) -> None:
    news: list[Opening] = [opening(cap=MANY) for _ in range(MANY)]
    news[bad] = replace(news[bad], launch=replace(news[bad].launch, session=b"short"))
    ended = await asyncio.gather(*(watched.store.open_launch(new) for new in news), return_exceptions=True)
    assert isinstance(ended[bad], Unavailable)
    assert Counter(map(str, ended))[str(Outcome.DONE)] == MANY - 1
    assert await watched.store.launch(news[bad].launch.launch_id) is None
    assert await chain_verifies(watched.store) == MANY - 1


async def test_a_commit_that_fails_is_tried_with_each_alone(watched: Watched) -> None:
    """What a transaction leaves for the commit to find out: here, a row whose parent never comes."""
    await watched.store._engine.write(
        "schema",
        lambda transaction: transaction.change(
            "CREATE TABLE child (parent INTEGER REFERENCES checkpoint DEFERRABLE INITIALLY DEFERRED)"
        ),
    )

    async def orphan(transaction: Transaction) -> int:
        return await transaction.change("INSERT INTO child VALUES (42)")

    news = [opening(cap=MANY) for _ in range(MANY)]
    writes = [watched.store.open_launch(new) for new in news]
    *ended, lost = await asyncio.gather(*writes, watched.store._engine.write("orphan", orphan), return_exceptions=True)
    assert ended == [Outcome.DONE] * MANY
    assert isinstance(lost, Unavailable)
    assert await watched.store._engine.read(lambda transaction: transaction.rows("SELECT * FROM child")) == []
    assert await chain_verifies(watched.store) == MANY


async def test_what_is_read_was_committed(watched: Watched) -> None:
    new = opening()
    seen = []

    async def look(transaction: Transaction) -> None:
        seen.append(len(await transaction.rows("SELECT * FROM checkpoint")))

    await asyncio.gather(
        watched.store.record(audit()),
        *(watched.store._engine.read(look) for _ in range(5)),
        watched.store.open_launch(new),
        *(watched.store._engine.read(look) for _ in range(5)),
    )
    assert set(seen) <= {0, 1}
    assert await watched.store.launch(new.launch.launch_id) == new.launch


async def test_a_defect_leaves_nobody_waiting(watched: Watched) -> None:
    def fail(_step: str) -> None:
        raise TypeError

    watched.on_step = fail
    ended = await asyncio.gather(*(watched.store.record(audit()) for _ in range(3)), return_exceptions=True)
    assert [type(each) for each in ended] == [TypeError] * 3
    watched.on_step = watched.steps.append
    await watched.store.record(audit())
    assert await chain_verifies(watched.store) == 1


async def test_who_is_cancelled_stops_nothing(watched: Watched) -> None:
    news = [opening(cap=MANY) for _ in range(MANY)]
    tasks = [asyncio.create_task(watched.store.open_launch(new)) for new in news]
    await asyncio.sleep(0)
    for task in tasks[::2]:
        task.cancel()
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    assert ended[1::2] == [Outcome.DONE] * (MANY // 2)
    assert {type(each) for each in ended[::2]} == {asyncio.CancelledError}
    # Their transactions were on their way: each is there as a whole.
    assert await chain_verifies(watched.store) == MANY
    assert {await watched.store.launch(new.launch.launch_id) == new.launch for new in news} == {True}


async def test_who_is_cancelled_while_reading_takes_nobody_with_him(watched: Watched) -> None:
    new = opening()
    await watched.store.open_launch(new)
    tasks = [asyncio.create_task(watched.store.launch(new.launch.launch_id)) for _ in range(MANY)]
    await asyncio.sleep(0)
    for task in tasks[::2]:
        task.cancel()
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    assert ended[1::2] == [new.launch] * (MANY // 2)


async def test_a_store_that_was_closed_is_not_opened_again_by_whoever_still_asks(place: Place) -> None:
    store = place.store()
    await store.open(make=True)
    await store.record(audit())
    await store.close()
    for call in (store.head(), store.record(audit())):
        with pytest.raises(Unavailable):
            await call


@pytest.mark.slow
@pytest.mark.parametrize(("step", "kept"), [("before", 0), ("after", MANY)])
async def test_a_process_that_is_killed_at_a_shared_commit_leaves_all_or_nothing(
    place: Place, step: str, kept: int
) -> None:
    calls: list[tuple[str, list[Any]]] = [("open_launch", [opening(cap=MANY)]) for _ in range(MANY)]
    code, said = await asyncio.to_thread(go, place.process(calls, f"open:{step}-commit", at_once=True))
    assert (code, said) == (-signal.SIGKILL, [])
    store = place.store()
    await store.open(make=True)
    assert await chain_verifies(store) == kept
    assert {await store.launch(new.launch.launch_id) == new.launch for _, [new] in calls} == {kept > 0}
    # Whoever repeats finds out.
    again = Outcome.REQUEST_TAKEN if kept else Outcome.DONE
    assert {await store.open_launch(new) for _, [new] in calls} == {again}
    await store.close()


# PostgreSQL's own.

on_postgres = pytest.mark.parametrize("place", ["postgres"], indirect=True)


@on_postgres
async def test_a_launch_is_so_many_ways_to_the_server(watched: Watched) -> None:
    """A look is one; a transaction is one, and one more for what it wrote, and one for the commit of all."""
    news = [opening(cap=MANY) for _ in range(MANY)]
    watched.forget()
    await watched.store.known(news[0].request.key, news[0].launch.launch_id)
    assert watched.trips == [1]  # one statement: what it shows is of one moment
    watched.forget()
    await watched.store.open_launch(opening(cap=MANY))
    assert len(watched.trips) == 3
    assert watched.trips[-1] == 1
    watched.forget()
    await asyncio.gather(*(watched.store.open_launch(new) for new in news[1:]))
    assert len(watched.trips) == MANY - 1 + 2
    watched.forget()
    await asyncio.gather(*(watched.store.move(release(new.launch.launch_id)) for new in news[1:]))
    assert len(watched.trips) == MANY - 1 + 2
    assert len(watched.said) < MANY * 11
    assert watched.count("COMMIT") == 1


@on_postgres
async def test_a_shared_commit_that_nobody_answers_is_an_outage_for_all_and_is_not_tried_again(
    watched: Watched, postgres_server: Server
) -> None:
    def on_step(step: str) -> None:
        watched.steps.append(step)
        if watched.steps == ["open:before-commit"] * MANY:
            postgres_server.sql(
                "SELECT count(pg_terminate_backend(pid, 10000)) FROM pg_stat_activity "
                "WHERE state='idle in transaction' AND application_name='sev-verifier'"
            )

    watched.on_step = on_step
    news = [opening(cap=MANY) for _ in range(MANY)]
    ended = await asyncio.gather(*(watched.store.open_launch(new) for new in news), return_exceptions=True)
    for each in ended:
        assert isinstance(each, OutcomeUnknown)
        assert "cannot tell what became of a commit" in each.message
    assert watched.count("BEGIN") == 1
    assert await chain_verifies(watched.store) == 0
    watched.on_step = watched.steps.append
    assert {await watched.store.open_launch(new) for new in news} == {Outcome.DONE}


@on_postgres
async def test_a_batch_whose_session_is_ended_is_tried_again_as_a_whole(
    watched: Watched, postgres_server: Server
) -> None:
    asked = []

    def change(row: LedgerRow) -> LedgerRow:
        asked.append(row)
        if len(asked) == 1:
            postgres_server.sql(
                "SELECT count(pg_terminate_backend(pid, 10000)) FROM pg_stat_activity "
                "WHERE state='idle in transaction' AND application_name='sev-verifier'"
            )
        return row

    news = [opening(cap=MANY) for _ in range(MANY)]
    news[MANY // 2] = opening(cap=MANY, spending=Spending(grant="g", change=change))
    assert await asyncio.gather(*(watched.store.open_launch(new) for new in news)) == [Outcome.DONE] * MANY
    assert (len(asked), watched.count("BEGIN"), watched.count("COMMIT")) == (2, 2, 1)
    assert await chain_verifies(watched.store) == MANY


@on_postgres
async def test_a_lock_that_somebody_keeps_is_waited_for_once(
    place: Place, postgres_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("verifier.store.postgres_engine.LOCK_TIMEOUT_S", 0.1)
    watched = Watched(place, monkeypatch)
    await watched.open()
    engine = watched.store._engine
    assert isinstance(engine, PostgresEngine)
    with psycopg.connect(postgres_server.dsn) as holder:
        holder.execute("SELECT pg_advisory_xact_lock(%s)", [engine._turn])
        ended = await asyncio.gather(*(watched.store.record(audit()) for _ in range(MANY)), return_exceptions=True)
        assert ["lock timeout" in str(each) for each in ended] == [True] * MANY
        assert watched.count("BEGIN") == 1
        # Who only reads waits for nobody.
        assert (await watched.store.head())[0] == 0
    await watched.store.record(audit())
    assert await chain_verifies(watched.store) == 1
    await watched.store.close()


@on_postgres
async def test_who_waits_comes_before_who_comes_again(
    place: Place, store: SqlStore, postgres_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replica that always has more to write holds no other up for longer than one commit."""
    monkeypatch.setattr("verifier.store.postgres_engine.SILENCE_S", 60)
    busy = place.store()
    await busy.open(make=True)
    begun = asyncio.Event()

    async def slow(transaction: Transaction) -> None:
        await transaction.rows("SELECT 1")
        begun.set()
        waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type='Lock' AND query LIKE '%advisory%'"
        await until(lambda: postgres_server.sql(waiting) == "1")

    more = [asyncio.create_task(busy._engine.write("slow", slow))]
    more += [asyncio.create_task(busy.record(audit())) for _ in range(3 * TOGETHER_MAX)]
    await begun.wait()
    mine = audit()
    await store.record(mine)
    [number] = [each.number for each in await store.records(None, after=0, limit=1000) if each.record == mine]
    assert number == TOGETHER_MAX  # after the first commit, which was the slow one's and of 63 others
    await asyncio.gather(*more)
    assert await chain_verifies(store) == 3 * TOGETHER_MAX + 1
    await busy.close()


@on_postgres
async def test_a_turn_that_has_lasted_long_enough_ends_with_what_was_done(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("verifier.store.postgres_engine.TURN_S", 0.0)
    records = [audit() for _ in range(MANY)]
    await asyncio.gather(*(watched.store.record(each) for each in records))
    assert watched.count("COMMIT") == MANY
    # Nobody is left behind, and nobody is overtaken.
    assert [each.record for each in await watched.store.records(None, after=0, limit=MANY + 1)] == records


@on_postgres
@pytest.mark.slow
async def test_a_replica_that_stands_still_in_a_batch_loses_its_turn_and_nothing_else(
    place: Place, store: SqlStore
) -> None:
    """The others wait for less than they would wait for a lock; `...keeps_is_waited_for_once` is its evil twin."""
    calls: list[tuple[str, list[Any]]] = [("open_launch", [opening(cap=MANY)]) for _ in range(MANY)]
    process = place.process(calls, "open:before-commit", by=signal.SIGSTOP, at_once=True)
    try:
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.stdin.flush()
        await until(lambda: _state(process.pid) == "T")
        # Not an outage: each of these gets its turn.
        await asyncio.gather(*(store.record(audit()) for _ in range(3)))
        assert await chain_verifies(store) == 3
        process.send_signal(signal.SIGCONT)
        out, _ = await asyncio.to_thread(process.communicate, timeout=60)
    finally:
        process.kill()
        await asyncio.to_thread(process.communicate)
    # It asked for a commit in a session that was no more: whoever repeats finds out.
    assert out.split() == [b"OUTCOME_UNKNOWN"] * MANY
    assert await chain_verifies(store) == 3
    assert {await store.open_launch(new) for _, [new] in calls} == {Outcome.DONE}


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@on_postgres
async def test_reads_that_fail_take_nobody_with_them(watched: Watched) -> None:
    new = opening()
    await watched.store.open_launch(new)
    engine = watched.store._engine

    async def nonsense() -> object:
        return await engine.read(lambda transaction: transaction.rows("SELECT nothing FROM nowhere"))

    calls = [nonsense() if index % 3 == 0 else watched.store.launch(new.launch.launch_id) for index in range(MANY)]
    ended = await asyncio.gather(*calls, return_exceptions=True)
    for index, each in enumerate(ended):
        assert isinstance(each, Unavailable) if index % 3 == 0 else each == new.launch


@on_postgres
async def test_a_link_that_broke_leaves_the_next_one_alone(watched: Watched) -> None:
    """The next one gets the number of its socket."""
    engine = watched.store._engine
    assert isinstance(engine, PostgresEngine)
    first = await engine._writer.link()
    first.drop()
    await watched.store.check()
    second = await engine._writer.link()
    assert (first.broken, second.broken, second._socket) == (True, False, first._socket)
    first.drop()
    await watched.store.check()
    assert await engine._writer.link() is second


@on_postgres
async def test_a_text_with_a_nul_is_refused_and_not_cut(watched: Watched) -> None:
    key = RequestKey(caller="c\0d", method="m", request_id=opening().launch.launch_id)
    with pytest.raises(Unavailable):
        await watched.store.known(key)
    assert (await watched.store.head())[0] == 0
