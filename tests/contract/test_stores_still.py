"""A PostgreSQL that takes a session and then stands still: an outage in bounded time, nothing spent, and it passes."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from common.errors import OutcomeUnknown, Unavailable
from tests.contract.test_stores import chain_verifies
from tests.support.postgres import Server
from tests.support.postgres_relay import SOON_S, Relay, hasten, relay_to
from tests.support.store_rows import opening
from tests.support.stores import count_open
from verifier.store import postgres_link
from verifier.store.engine import no_step
from verifier.store.migrations import migrations
from verifier.store.postgres import PostgresStore
from verifier.store.rows import LedgerRow, Outcome, Spending

SPENDING = Spending(grant="g", change=count_open)


class Way:
    """Stores that reach their server by a relay, and wait for it as long as ever, but not when it stands still."""

    def __init__(self, relay: Relay, folder: Path, schema: str) -> None:
        self.relay = relay
        self.relay.on_still = self._hasten
        self._folder = folder
        self._schema = schema
        self._stores: list[PostgresStore] = []
        self._patience = pytest.MonkeyPatch()

    def store(self, on_step: Callable[[str], None] = no_step) -> PostgresStore:
        dsn = f"host={self._folder} port=5432 dbname=postgres user=sevattest"
        made = PostgresStore(dsn, on_step, schema=self._schema)
        self._stores.append(made)
        return made

    def _hasten(self) -> None:
        hasten(self._patience, *self._stores)

    def go_on(self) -> None:
        """Answer again whoever comes now."""
        self.relay.still = False
        self._patience.undo()


@pytest.fixture
async def way(postgres_server: Server, postgres_schema: str) -> AsyncIterator[Way]:
    folder = Path(tempfile.mkdtemp(prefix="sevattest-still-"))
    async with relay_to(postgres_server.folder, folder) as relay:
        made = Way(relay, folder, postgres_schema)
        yield made
        made.go_on()
    shutil.rmtree(folder)


async def test_a_server_that_stands_still_after_the_login_ends_a_start_and_not_the_next(way: Way) -> None:
    store = way.store()
    way.relay.stand_still()
    with pytest.raises(Unavailable, match="the store cannot be reached: the server does not answer"):
        await store.open(make=True)
    assert way.relay.logins == 1
    # Whoever stands still is not asked to cancel either: that would be waited for, too.
    assert way.relay.cancels == 0
    way.go_on()
    await store.open(make=True)
    assert await store.open_launch(opening()) is Outcome.DONE
    await store.close()


async def test_a_server_that_stands_still_under_the_store_is_an_outage_that_spends_nothing_and_passes(way: Way) -> None:
    store = way.store()
    await store.open(make=True)
    new = opening(spending=SPENDING)
    assert (await store.head())[0] == 0
    way.relay.stand_still()
    before = way.relay.logins
    for call in (store.open_launch(new), store.launch(new.launch.launch_id), store.check()):
        with pytest.raises(Unavailable, match="the store cannot be reached: the server does not answer"):
            await call
    assert way.relay.logins > before
    assert way.relay.cancels == 0
    way.go_on()
    assert await store.launch(new.launch.launch_id) is None
    assert await store.ledger("g") == LedgerRow()
    assert await store.open_launch(new) is Outcome.DONE
    assert await store.ledger("g") == LedgerRow(open=1)
    assert await chain_verifies(store) == 1
    await store.close()


async def test_many_who_wait_for_one_that_stands_still_are_all_told(way: Way) -> None:
    store = way.store()
    await store.open(make=True)
    way.relay.stand_still()
    calls = [store.open_launch(opening(cap=20)) for _ in range(10)] + [store.head() for _ in range(10)]
    ended = await asyncio.gather(*calls, return_exceptions=True)
    assert {type(each) for each in ended} == {Unavailable}
    way.go_on()
    assert await asyncio.gather(*(store.open_launch(opening(cap=20)) for _ in range(10))) == [Outcome.DONE] * 10
    assert await chain_verifies(store) == 10
    await store.close()


async def test_a_commit_at_which_the_server_stands_still_is_an_unknown_outcome_that_is_found_out(way: Way) -> None:
    steps: list[Callable[[], None]] = [lambda: None, way.relay.stand_still]

    def on_step(step: str) -> None:
        if step == "open:before-commit":
            steps.pop()()

    store = way.store(on_step)
    await store.open(make=True)
    new = opening(spending=SPENDING)
    with pytest.raises(OutcomeUnknown, match="the server does not answer"):
        await store.open_launch(new)
    way.go_on()
    # What was asked for did not come to the server.
    assert await store.ledger("g") == LedgerRow()
    assert await store.open_launch(new) is Outcome.DONE
    assert await store.ledger("g") == LedgerRow(open=1)
    await store.close()


async def test_a_step_of_the_schema_at_which_the_server_stands_still_ends_the_start_and_leaves_nothing(
    way: Way, postgres_server: Server, postgres_schema: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, *_ = steps = migrations("postgres")
    store = way.store()
    store._steps = [first]
    await store.open(make=True)
    await store.close()
    store = way.store()
    way.relay.still_at = b"CREATE TABLE document_seal"
    monkeypatch.setattr(postgres_link, "STEP_S", SOON_S)
    with pytest.raises(Unavailable, match="the server does not answer"):
        await store.open(make=True)
    assert way.relay.still
    assert way.relay.cancels == 0
    way.go_on()
    monkeypatch.undo()
    applied = f'SELECT name FROM "{postgres_schema}".migration ORDER BY number'  # noqa: S608 -- the test's
    assert postgres_server.sql(applied).splitlines() == [first.name]
    await store.open(make=True)
    assert postgres_server.sql(applied).splitlines() == [each.name for each in steps]
    await store.close()
