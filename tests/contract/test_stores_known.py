"""What a decision begins with is one look at the store, and the same as many looks."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from functools import partial
from uuid import uuid4

from tests.support.store_rows import NOW, SEAL, admin_request, audit, document, opening, release
from verifier.store.rows import Known, LedgerRow, Outcome, PdhSighting, RequestKey, Spending
from verifier.store.sql_store import SqlStore


async def test_a_new_store_knows_nothing(store: SqlStore) -> None:
    key = RequestKey(caller="c", method="m", request_id=uuid4())
    assert await store.known(key) == Known(time=None, revision=0, request=None)
    assert await store.known(key, uuid4()) == Known(time=None, revision=0, request=None)


async def test_a_request_is_known_by_its_caller_method_and_id(store: SqlStore) -> None:
    new = opening()
    assert await store.open_launch(new) is Outcome.DONE
    key = new.request.key
    assert await store.known(key) == Known(time=NOW, revision=0, request=new.request)
    for other in (replace(key, caller="d"), replace(key, method="m"), replace(key, request_id=uuid4())):
        assert await store.known(other) == Known(time=NOW, revision=0, request=None)


async def test_a_launch_is_known_with_its_pdh_and_nobody_elses(store: SqlStore) -> None:
    new, other = opening(), opening()
    other = replace(other, launch=replace(other.launch, pdh_fingerprint=b"i" * 32))
    for each in (new, other):
        assert await store.open_launch(each) is Outcome.DONE
    launch_id, key = new.launch.launch_id, RequestKey(caller="c", method="m", request_id=uuid4())
    assert await store.known(key, launch_id) == Known(time=NOW, revision=0, request=None, launch=new.launch)
    sighting = PdhSighting(pdh_fingerprint=new.launch.pdh_fingerprint, firmware=(1, 55, 24))
    move = replace(release(launch_id), sighting=sighting)
    assert await store.move(move) is Outcome.DONE
    assert move.request is not None
    known = await store.known(move.request.key, launch_id)
    assert known == Known(
        time=await store.last_time(),
        revision=0,
        request=move.request,
        launch=await store.launch(launch_id),
        pdh_oldest=(1, 55, 24),
    )
    assert (await store.known(key, other.launch.launch_id)).pdh_oldest is None


async def test_the_time_and_the_revision_are_the_newest(store: SqlStore) -> None:
    key = RequestKey(caller="c", method="m", request_id=uuid4())
    await store.record(audit(time=NOW + timedelta(hours=1)))
    await store.record(audit(time=NOW))
    assert await store.apply_document(document(), admin_request(), audit("document.applied"), SEAL) is Outcome.DONE
    assert await store.known(key) == Known(time=NOW + timedelta(hours=1), revision=1, request=None)


def _put(row: LedgerRow, _before: LedgerRow) -> LedgerRow:
    return row


async def test_a_grants_ledger_is_known_and_no_other_ones(store: SqlStore) -> None:
    rows = {"g": LedgerRow(open=1, released=2, refused=3, rate_time=4), "h": LedgerRow(released=9)}
    for name, row in rows.items():
        await store.record(audit(), Spending(grant=name, change=partial(_put, row)))
    new = opening()
    assert await store.open_launch(new) is Outcome.DONE
    key, launch_id = RequestKey(caller="c", method="m", request_id=uuid4()), new.launch.launch_id
    for name, row in rows.items():
        assert await store.known(key, grant=name) == Known(time=NOW, revision=0, request=None, ledger=row)
        assert (await store.known(new.request.key, launch_id, grant=name)) == Known(
            time=NOW, revision=0, request=new.request, launch=new.launch, ledger=row
        )
    for nothing in (None, "", "gh"):
        assert (await store.known(key, grant=nothing)).ledger == LedgerRow()
