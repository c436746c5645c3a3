"""Races over every store: what several ask for at once is done once, and the audit log stays one chain.

Over PostgreSQL the racers are replicas and processes; over SQLite there is one process, so they are its callers.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from datetime import timedelta

import pytest

from common.errors import LimitExceeded, Reason, SevattestError
from tests.contract.test_stores import chain_verifies
from tests.support.eventually import until
from tests.support.postgres import Server
from tests.support.store_rows import (
    KEY_ID,
    NOW,
    SEAL,
    admin_request,
    audit,
    document,
    expiry,
    opening,
    release,
    sealed,
)
from tests.support.stores import Place, count_open, count_released, go
from verifier.store.rows import Checkpoint, LedgerRow, Opening, Outcome, Spending
from verifier.store.sql_store import SqlStore

RACERS = 32
AT_ONCE = 5


@pytest.fixture
async def replicas(place: Place) -> AsyncIterator[Sequence[SqlStore]]:
    """Three stores over one PostgreSQL, or the one that SQLite allows."""
    made = [place.store() for _ in range(1 if place.kind == "sqlite" else 3)]
    # At once, also over an empty database: they bring the schema forward together.
    await asyncio.gather(*(each.open(make=True) for each in made))
    yield made
    await asyncio.gather(*(each.close() for each in made))


def busy(row: LedgerRow) -> LedgerRow:
    """Five launches at once and no more."""
    if row.open >= AT_ONCE:
        raise LimitExceeded(Reason.GRANT_BUSY, "so many launches are open already")
    return count_open(row)


async def begun(store: SqlStore, new: Opening) -> str:
    try:
        return (await store.open_launch(new)).name
    except SevattestError as error:
        return error.reason.name


async def test_a_grant_that_many_spend_at_once_is_spent_as_far_as_it_goes(replicas: Sequence[SqlStore]) -> None:
    spending = Spending(grant="g", change=busy)
    new = [opening(caller=f"c{index % 4}", cap=RACERS, spending=spending) for index in range(RACERS)]
    outcomes = await asyncio.gather(*(begun(replicas[i % len(replicas)], each) for i, each in enumerate(new)))
    assert Counter(outcomes) == {"DONE": AT_ONCE, "GRANT_BUSY": RACERS - AT_ONCE}
    assert await replicas[0].ledger("g") == LedgerRow(open=AT_ONCE)
    assert await chain_verifies(replicas[-1]) == AT_ONCE


async def test_a_cap_holds_against_many_openers_of_one_caller(replicas: Sequence[SqlStore]) -> None:
    new = [opening(cap=3) for _ in range(RACERS)]
    outcomes = await asyncio.gather(*(begun(replicas[i % len(replicas)], each) for i, each in enumerate(new)))
    assert Counter(outcomes) == {"DONE": 3, "CAP_REACHED": RACERS - 3}


async def test_one_request_that_is_sent_many_times_at_once_opens_one_launch(replicas: Sequence[SqlStore]) -> None:
    first = opening(cap=RACERS)
    new = []
    for _ in range(RACERS):
        other = opening(cap=RACERS)
        new.append(replace(other, request=replace(other.request, key=first.request.key)))
    outcomes = await asyncio.gather(*(begun(replicas[i % len(replicas)], each) for i, each in enumerate(new)))
    assert Counter(outcomes) == {"DONE": 1, "REQUEST_TAKEN": RACERS - 1}
    kept = await replicas[0].request(first.request.key)
    assert kept is not None
    assert await replicas[0].launch(kept.launch_id) is not None


async def test_many_movers_of_one_launch_are_one_move(replicas: Sequence[SqlStore]) -> None:
    new = opening(spending=Spending(grant="g", change=count_open))
    await replicas[0].open_launch(new)
    launch_id, spending = new.launch.launch_id, Spending(grant="g", change=count_released)
    late = NOW + timedelta(hours=1)
    moves = [
        release(launch_id, spending=spending) if index % 2 else expiry(launch_id, time=late, spending=spending)
        for index in range(RACERS)
    ]
    outcomes = await asyncio.gather(*(replicas[i % len(replicas)].move(each) for i, each in enumerate(moves)))
    assert Counter(outcomes) == {Outcome.DONE: 1, Outcome.LOST: RACERS - 1}
    assert await replicas[0].ledger("g") == LedgerRow(released=1)
    assert await chain_verifies(replicas[0]) == 2


async def test_whatever_happens_at_once_is_one_chain_and_nobody_waits_for_ever(replicas: Sequence[SqlStore]) -> None:
    """All kinds of transactions against the same few rows: what would deadlock is found here."""
    begin, end = Spending(grant="g", change=count_open), Spending(grant="g", change=count_released)
    written = 0

    async def launch(store: SqlStore) -> int:
        for attempt in range(100):
            new = opening(cap=1000, revision=await store.revision(), spending=begin)
            if await store.open_launch(new) is Outcome.DONE:
                break
            assert attempt < 99
        while True:
            revision = await store.revision()
            if await store.move(release(new.launch.launch_id, revision=revision, spending=end)) is Outcome.DONE:
                return 2

    async def own(store: SqlStore, index: int) -> int:
        assert (
            await store.apply_document(
                document(f"d{index % 3}", str(index)), admin_request(), audit("document.applied"), SEAL
            )
            is Outcome.DONE
        )
        await store.put_secret("disk", lambda _version: sealed(b""), 1, admin_request(), audit())
        deleted, _ = await store.delete_secret("disk", admin_request(), audit(), SEAL)
        return 2 + (deleted is Outcome.DONE)

    jobs = []
    for index in range(24):
        store = replicas[index % len(replicas)]
        jobs.append(own(store, index) if index % 4 == 0 else launch(store))
    written = sum(await asyncio.gather(*jobs))
    assert await chain_verifies(replicas[0]) == written
    assert await replicas[0].ledger("g") == LedgerRow(released=18)
    erased = written - 18 * 2 - 6 * 2
    assert await replicas[0].revision() == 6 + erased


async def test_no_version_of_a_secret_is_given_twice(replicas: Sequence[SqlStore]) -> None:
    given = await asyncio.gather(
        *(
            replicas[index % len(replicas)].put_secret(
                "disk", lambda version: sealed(b"%d" % version), 1, admin_request(), audit()
            )
            for index in range(RACERS)
        )
    )
    assert sorted(version for _, version in given) == list(range(1, RACERS + 1))
    for version in range(1, RACERS + 1):
        kept = await replicas[0].secret("disk", version)
        assert kept is not None
        assert kept.sealed == sealed(b"%d" % version)


async def test_all_replicas_get_the_same_identity_and_one_checkpoint(replicas: Sequence[SqlStore]) -> None:
    kept = await asyncio.gather(
        *(replicas[i % len(replicas)].keep_identity("signing", sealed(b"%d" % i)) for i in range(RACERS))
    )
    assert len(set(kept)) == 1
    said = await asyncio.gather(
        *(replicas[i % len(replicas)].keep_checkpoint(Checkpoint(number=1, token=f"{i}")) for i in range(RACERS))
    )
    assert Counter(said) == {True: 1, False: RACERS - 1}


async def test_a_document_that_many_apply_is_one_document(replicas: Sequence[SqlStore]) -> None:
    outcomes = await asyncio.gather(
        *(
            replicas[index % len(replicas)].apply_document(
                document(text=b"odd" if index % 2 else b"even"), admin_request(), audit("document.applied"), SEAL
            )
            for index in range(RACERS)
        )
    )
    assert Counter(outcomes) == {
        Outcome.DONE: 1,
        Outcome.UNCHANGED: RACERS // 2 - 1,
        Outcome.CONFLICT: RACERS // 2,
    }
    assert await replicas[0].revision() == 1


@pytest.mark.parametrize("place", ["postgres"], indirect=True)
async def test_documents_do_not_change_between_a_judgement_and_its_commit(
    place: Place, store: SqlStore, postgres_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill switch that was answered is in force: no launch that was judged before it is committed after it."""
    monkeypatch.setattr("verifier.store.postgres_engine.SILENCE_S", 60)
    reached, go_on = threading.Event(), threading.Event()

    def on_step(step: str) -> None:
        if step in {"open:before-commit", "move:before-commit"}:
            reached.set()
            assert go_on.wait(timeout=30)

    async def slowly(work: Callable[[SqlStore], Awaitable[Outcome]]) -> Outcome:
        slow = place.store(on_step)
        await slow.open(make=True)
        outcome = await work(slow)
        await slow.close()
        return outcome

    new = opening()
    works: list[Callable[[SqlStore], Awaitable[Outcome]]] = [
        lambda slow: slow.open_launch(new),
        lambda slow: slow.move(release(new.launch.launch_id, revision=1)),
    ]
    for revision, work in enumerate(works):
        reached.clear()
        go_on.clear()
        judged = asyncio.create_task(asyncio.to_thread(asyncio.run, slowly(work)))
        assert await asyncio.to_thread(reached.wait, 30)
        applied = document(version=str(revision)), admin_request(), audit("document.applied"), SEAL
        switch = asyncio.create_task(store.apply_document(*applied))
        waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type='Lock' AND query LIKE '%advisory%'"
        await until(lambda: switch.done() or postgres_server.sql(waiting) == "1")  # noqa: B023 -- awaited here
        assert not switch.done()
        go_on.set()
        assert await judged is Outcome.DONE
        assert await switch is Outcome.DONE


@pytest.mark.slow
@pytest.mark.parametrize("place", ["postgres"], indirect=True)
async def test_eight_processes_that_race_for_one_release_are_one_release(place: Place, store: SqlStore) -> None:
    new = opening(spending=Spending(grant="g", change=count_open))
    await store.open_launch(new)
    spending = Spending(grant="g", change=count_released)
    racers = [place.process([("move", [release(new.launch.launch_id, spending=spending)])]) for _ in range(8)]
    ended = await asyncio.gather(*(asyncio.to_thread(go, each) for each in racers))
    assert [code for code, _ in ended] == [0] * 8
    assert Counter(outcome for _, outcomes in ended for outcome in outcomes) == {"DONE": 1, "LOST": 7}
    assert await store.ledger("g") == LedgerRow(released=1)
    assert await store.sealing_keys() == {KEY_ID}
    assert await chain_verifies(store) == 2
