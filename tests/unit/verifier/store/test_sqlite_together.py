"""Transactions that come together share a commit, and nothing else: each is kept, refused or failed by itself."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from common.errors import LimitExceeded, Reason, Unavailable
from tests.contract.test_stores import chain_verifies
from tests.support.store_rows import audit, opening, release
from verifier.store.engine import Transaction
from verifier.store.rows import LedgerRow, Opening, Outcome, Spending
from verifier.store.sqlite import SqliteStore
from verifier.store.sqlite_engine import TOGETHER_MAX, SqliteEngine

MANY = 20


class Watched:
    """A store whose connection tells what it does."""

    def __init__(self, folder: Path) -> None:
        self.steps: list[str] = []
        self.said: list[str] = []
        self.instructions = 0
        self.store = SqliteStore(folder, self.steps.append)

    @property
    def engine(self) -> SqliteEngine:
        engine = self.store._engine
        assert isinstance(engine, SqliteEngine)
        return engine

    async def listen(self) -> None:
        def count() -> None:
            self.instructions += 1

        def work(_transaction: Transaction) -> None:
            connection = self.engine._writer
            assert connection is not None
            connection.set_trace_callback(self.said.append)
            connection.set_progress_handler(count, 10)

        await self.engine.read(work)
        self.said.clear()

    def count(self, statement: str) -> int:
        return sum(each.startswith(statement) for each in self.said)


@pytest.fixture
async def watched(tmp_path: Path) -> AsyncIterator[Watched]:
    made = Watched(tmp_path / "state")
    await made.store.open()
    await made.listen()
    yield made
    await made.store.close()


async def test_what_waits_shares_a_commit_and_the_first_does_not_wait(watched: Watched) -> None:
    news = [opening(cap=MANY) for _ in range(MANY)]
    assert await asyncio.gather(*(watched.store.open_launch(new) for new in news)) == [Outcome.DONE] * MANY
    assert 1 <= watched.count("COMMIT") < MANY
    assert Counter(watched.steps)["open:before-commit"] == Counter(watched.steps)["open:after-commit"] == MANY
    assert {await watched.store.launch(new.launch.launch_id) == new.launch for new in news} == {True}
    assert await chain_verifies(watched.store) == MANY
    watched.said.clear()
    assert await watched.store.open_launch(opening(cap=MANY + 1)) is Outcome.DONE
    assert watched.count("COMMIT") == 1


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


async def test_one_that_the_schema_refuses_takes_nobody_with_it(watched: Watched) -> None:
    news: list[Opening] = [opening(cap=MANY) for _ in range(MANY)]
    news[4] = replace(news[4], launch=replace(news[4].launch, session=b"short"))
    ended = await asyncio.gather(*(watched.store.open_launch(new) for new in news), return_exceptions=True)
    assert isinstance(ended[4], Unavailable)
    assert Counter(map(str, ended))[str(Outcome.DONE)] == MANY - 1
    assert await watched.store.launch(news[4].launch.launch_id) is None
    assert await chain_verifies(watched.store) == MANY - 1


async def test_a_commit_that_fails_is_tried_with_each_alone(watched: Watched) -> None:
    """What a transaction leaves for the commit to find out: here, a row whose parent never comes."""
    await watched.engine.write(
        "schema",
        lambda transaction: transaction.script(
            "CREATE TABLE child (parent INTEGER REFERENCES checkpoint DEFERRABLE INITIALLY DEFERRED);"
        ),
    )

    def orphan(transaction: Transaction) -> int:
        return transaction.change("INSERT INTO child VALUES (42)")

    news = [opening(cap=MANY) for _ in range(MANY)]
    writes = [watched.store.open_launch(new) for new in news]
    *ended, lost = await asyncio.gather(*writes, watched.engine.write("orphan", orphan), return_exceptions=True)
    assert ended == [Outcome.DONE] * MANY
    assert isinstance(lost, Unavailable)
    assert await watched.engine.read(lambda transaction: transaction.rows("SELECT * FROM child")) == []
    assert await chain_verifies(watched.store) == MANY


async def test_what_is_read_was_committed(watched: Watched) -> None:
    new = opening()
    seen = []

    def look(transaction: Transaction) -> None:
        seen.append(len(transaction.rows("SELECT * FROM launch")))

    await asyncio.gather(
        watched.store.record(audit()),
        *(watched.engine.read(look) for _ in range(5)),
        watched.store.open_launch(new),
        *(watched.engine.read(look) for _ in range(5)),
    )
    assert set(seen) <= {0, 1}
    assert await watched.store.launch(new.launch.launch_id) == new.launch


async def test_a_launch_costs_the_same_however_many_came_before(watched: Watched) -> None:
    async def cost() -> int:
        before = watched.instructions
        for _ in range(5):
            new = opening(cap=1000)
            await watched.store.open_launch(new)
            await watched.store.move(release(new.launch.launch_id))
        return watched.instructions - before

    await cost()
    early = await cost()
    for _ in range(10):
        news = [opening(cap=1000) for _ in range(TOGETHER_MAX)]
        await asyncio.gather(*(watched.store.open_launch(new) for new in news))
        await asyncio.gather(*(watched.store.move(release(new.launch.launch_id)) for new in news))
    assert await cost() < 2 * early


async def test_a_defect_leaves_nobody_waiting(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(SqliteEngine, "_begun", None)
        with pytest.raises(TypeError):
            await watched.store.record(audit())
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
    assert await chain_verifies(watched.store) == MANY


async def test_a_store_that_was_closed_is_not_opened_again_by_whoever_still_asks(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "state")
    await store.open()
    await store.record(audit())
    await store.close()
    for call in (store.head(), store.record(audit())):
        with pytest.raises(Unavailable):
            await call
