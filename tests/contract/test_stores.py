"""What every store does with launches, requests, ledgers and records: the same over SQLite and over PostgreSQL."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import timedelta
from uuid import uuid4

import pytest

from common.audit.chain import record_fields, record_hash
from common.errors import Reason, Refused, Unavailable
from tests.support.store_rows import GENERATED, KEY_ID, NOW, SEAL, audit, expiry, opening, release
from tests.support.stores import Place, count_open, count_released
from verifier.store.engine import Transaction
from verifier.store.rows import (
    Checkpoint,
    LaunchFilter,
    LaunchRow,
    LedgerRow,
    Outcome,
    PdhSighting,
    RequestKey,
    Spending,
)
from verifier.store.sql_store import SqlStore

BEGIN, RELEASED = Spending(grant="g", change=count_open), Spending(grant="g", change=count_released)


async def chain_verifies(store: SqlStore) -> int:
    """How many records there are; fails where they are no chain."""
    number, digest = 0, bytes(32)
    for each in await store.records(None, after=0, limit=100_000):
        row = each.record
        fields = record_fields(
            audit_id=row.audit_id,
            time=row.time,
            event=row.event,
            launch_id=row.launch_id,
            caller=row.caller,
            reason=row.reason,
            body=row.body,
        )
        number, digest = number + 1, record_hash(digest, number + 1, fields)
        assert (each.number, each.hash) == (number, digest)
    assert await store.head() == (number, digest, await store.last_time())
    return number


# Launches.


async def test_a_launch_comes_back_as_it_was_written(store: SqlStore) -> None:
    new = opening(spending=BEGIN)
    assert await store.open_launch(new) is Outcome.DONE
    assert await store.launch(new.launch.launch_id) == new.launch
    assert await store.request(new.request.key) == new.request
    assert await store.terms(b"t" * 32) == b"{}"
    assert await store.chain(b"p" * 32) == b"c" * 8336
    assert await store.last_time() == NOW
    assert await store.sealing_keys() == {KEY_ID}


async def test_what_is_not_there_is_none_and_lost_terms_are_an_outage(store: SqlStore) -> None:
    assert await store.launch(uuid4()) is None
    assert await store.request(RequestKey(caller="c", method="m", request_id=uuid4())) is None
    assert await store.last_time() is None
    assert await store.generated(uuid4()) is None
    assert await store.sighted(b"h" * 32) is None
    assert await store.head() == (0, bytes(32), None)
    assert await store.sealing_keys() == frozenset()
    for lost in (store.terms(b"x" * 32), store.chain(b"x" * 32)):
        with pytest.raises(Unavailable):
            await lost


async def test_a_release_moves_once_and_erases_the_keys(store: SqlStore) -> None:
    new = opening()
    await store.open_launch(new)
    move = release(new.launch.launch_id)
    assert await store.move(move) is Outcome.DONE
    assert await store.move(release(new.launch.launch_id)) is Outcome.LOST
    row = await store.launch(new.launch.launch_id)
    assert row is not None
    assert (row.state, row.keys, row.packet, row.end_time) == ("released", None, move.packet, NOW)
    assert (row.measurement, row.digest, row.audit_id) == (b"m" * 48, b"d" * 32, move.audit.audit_id)
    assert row.firmware == (1, 55, 24)
    assert await store.generated(new.launch.launch_id) == GENERATED
    records = await store.records(new.launch.launch_id, after=0, limit=10)
    assert [each.record for each in records] == [new.audit, move.audit]


async def test_a_lost_move_leaves_nothing_behind(store: SqlStore) -> None:
    new = opening(spending=BEGIN)
    await store.open_launch(new)
    await store.move(release(new.launch.launch_id, spending=RELEASED))
    late = release(
        new.launch.launch_id,
        spending=RELEASED,
        time=NOW + timedelta(seconds=1),
        sighting=PdhSighting(pdh_fingerprint=b"h" * 32, firmware=(1, 0, 0)),
    )
    assert late.request is not None
    assert await store.move(late) is Outcome.LOST
    assert await store.request(late.request.key) is None
    assert await store.sighted(b"h" * 32) is None
    assert await store.ledger("g") == LedgerRow(open=0, released=1)
    assert await store.last_time() == NOW
    assert await chain_verifies(store) == 2


async def test_a_move_of_no_launch_is_lost(store: SqlStore) -> None:
    gone = release(uuid4(), spending=RELEASED)
    assert await store.move(gone) is Outcome.LOST
    assert await store.ledger("g") == LedgerRow()
    assert await chain_verifies(store) == 0


async def test_time_is_part_of_the_compare_and_set(store: SqlStore) -> None:
    new = opening(expire=NOW + timedelta(minutes=1))
    await store.open_launch(new)
    launch_id = new.launch.launch_id
    assert await store.move(release(launch_id, time=NOW + timedelta(minutes=1))) is Outcome.LOST
    assert await store.move(expiry(launch_id)) is Outcome.LOST
    assert await store.move(expiry(launch_id, time=NOW + timedelta(minutes=1))) is Outcome.DONE
    row = await store.launch(launch_id)
    assert row is not None
    assert (row.state, row.packet, row.firmware) == ("expired", None, None)


async def test_a_request_id_is_taken_once_in_its_scope(store: SqlStore) -> None:
    first, second = opening(), opening()
    await store.open_launch(first)
    again = replace(second, request=replace(second.request, key=first.request.key))
    assert await store.open_launch(again) is Outcome.REQUEST_TAKEN
    assert await store.launch(second.launch.launch_id) is None
    other = replace(second, request=replace(second.request, key=replace(first.request.key, caller="d")))
    assert await store.open_launch(other) is Outcome.DONE
    taken = replace(release(second.launch.launch_id), request=first.request)
    assert await store.move(taken) is Outcome.REQUEST_TAKEN
    row = await store.launch(second.launch.launch_id)
    assert row is not None
    assert row.state == "open"


async def test_the_cap_counts_open_launches_of_one_caller_that_are_in_time(store: SqlStore) -> None:
    assert await store.open_launch(opening(cap=2, expire=NOW)) is Outcome.DONE
    assert await store.open_launch(opening(cap=2)) is Outcome.DONE
    two = opening(cap=2)
    assert await store.open_launch(two) is Outcome.DONE
    third = opening(cap=2)
    assert await store.open_launch(third) is Outcome.CAP_REACHED
    assert await store.request(third.request.key) is None
    assert await store.open_launch(opening(cap=2, caller="d")) is Outcome.DONE
    await store.move(release(two.launch.launch_id))
    assert await store.open_launch(third) is Outcome.DONE


async def test_the_open_launches_of_all_callers_are_counted_whatever_their_time(store: SqlStore) -> None:
    assert await store.count_open() == 0
    first = opening(expire=NOW)
    for each in (first, opening(), opening(caller="d")):
        await store.open_launch(each)
    assert await store.count_open() == 3
    await store.move(release(opening().launch.launch_id))
    assert await store.count_open() == 3
    second = opening()
    await store.open_launch(second)
    await store.move(release(second.launch.launch_id))
    assert await store.count_open() == 3


async def test_what_was_judged_by_other_documents_is_not_carried_out(store: SqlStore) -> None:
    stale = opening(revision=1, spending=BEGIN)
    assert await store.open_launch(stale) is Outcome.DOCUMENTS_CHANGED
    assert await store.launch(stale.launch.launch_id) is None
    assert await store.ledger("g") == LedgerRow()
    new = opening()
    await store.open_launch(new)
    move = release(new.launch.launch_id, revision=1)
    assert move.request is not None
    assert await store.move(move) is Outcome.DOCUMENTS_CHANGED
    assert await store.request(move.request.key) is None
    assert await store.move(replace(move, revision=0)) is Outcome.DONE


async def test_a_revision_counts_without_a_document(store: SqlStore) -> None:
    judged = opening(revision=await store.revision())
    await store.revise(SEAL)
    found = await store.documents()
    assert (found.revision, found.rows) == (1, ())
    SEAL.require(found)
    assert await store.open_launch(judged) is Outcome.DOCUMENTS_CHANGED
    assert await store.open_launch(opening(revision=1)) is Outcome.DONE


async def test_overdue_launches_are_found_oldest_first(store: SqlStore) -> None:
    ids = []
    for minutes, spending in ((3, None), (1, BEGIN), (2, None), (9, BEGIN)):
        new = opening(expire=NOW + timedelta(minutes=minutes), spending=spending)
        ids.append(new.launch.launch_id)
        await store.open_launch(new)
    then = NOW + timedelta(minutes=3)
    assert await store.overdue(then, "open", 10) == [ids[1], ids[2], ids[0]]
    assert await store.overdue(then, "open", 1) == [ids[1]]
    assert await store.overdue(then, "open", 10, grant="g") == [ids[1]]
    assert await store.overdue(then, "open", 10, grant="h") == []
    assert await store.overdue(then, "released", 10) == []


async def test_launches_are_listed_newest_first_in_pages_that_neither_skip_nor_repeat(store: SqlStore) -> None:
    made = []
    for index in range(7):
        # Three at a time begin in the same microsecond.
        new = opening(create=NOW + timedelta(seconds=index // 3), caller=f"c{index % 2}", workload=f"w{index % 3}")
        await store.open_launch(new)
        made.append(new.launch)
    newest_first = sorted(made, key=lambda launch: (launch.create_time, str(launch.launch_id)), reverse=True)
    paged: list[LaunchRow] = []
    before = None
    while page := await store.launches(LaunchFilter(), before=before, limit=2):
        paged += page
        before = page[-1].launch_id
    assert paged == newest_first
    behind = [await store.launch_behind(None, count) for count in range(1, 9)]
    assert behind == [*(each.launch_id for each in newest_first), None]
    third, fifth = newest_first[2].launch_id, newest_first[4].launch_id
    assert await store.launch_behind(third, 2) == fifth
    assert await store.launches(LaunchFilter(), before=third, until=fifth, limit=9) == newest_first[3:5]
    of_a_caller = await store.launches(LaunchFilter(caller="c0"), before=None, until=fifth, limit=9)
    assert of_a_caller == [each for each in newest_first[:5] if each.caller == "c0"]
    assert await store.launches(LaunchFilter(state="released"), before=None, until=fifth, limit=9) == []
    assert await store.launches(LaunchFilter(), before=uuid4(), limit=10) == []


async def test_a_list_of_launches_is_filtered_by_each_of_its_members_and_by_all(store: SqlStore) -> None:
    plain, granted = opening(caller="c"), opening(caller="d", workload="db", spending=BEGIN)
    await store.open_launch(plain)
    await store.open_launch(granted)
    await store.move(release(plain.launch.launch_id))

    async def found(which: LaunchFilter) -> list[str]:
        return [launch.caller for launch in await store.launches(which, before=None, limit=10)]

    assert sorted(await found(LaunchFilter())) == ["c", "d"]
    assert await found(LaunchFilter(workload="db")) == ["d"]
    assert await found(LaunchFilter(state="released")) == ["c"]
    assert await found(LaunchFilter(caller="c")) == ["c"]
    assert await found(LaunchFilter(grant="g")) == ["d"]
    assert await found(LaunchFilter(workload="db", state="open", caller="d", grant="g")) == ["d"]
    assert await found(LaunchFilter(workload="db", state="released")) == []


async def test_a_measurement_is_found_again_in_another_launch_only(store: SqlStore) -> None:
    new = opening()
    await store.open_launch(new)
    await store.move(release(new.launch.launch_id))
    assert await store.measured_before(b"m" * 48, uuid4()) == new.launch.launch_id
    assert await store.measured_before(b"m" * 48, new.launch.launch_id) is None
    assert await store.measured_before(b"n" * 48, uuid4()) is None


async def test_packets_are_erased_and_the_launch_stays(store: SqlStore) -> None:
    new = opening()
    await store.open_launch(new)
    await store.move(release(new.launch.launch_id))
    assert await store.erase_packets(NOW - timedelta(seconds=1)) == 0
    assert await store.erase_packets(NOW) == 1
    await store.flush_erased()
    row = await store.launch(new.launch.launch_id)
    assert row is not None
    assert (row.state, row.packet) == ("released", None)


async def test_many_packets_are_erased_a_few_at_a_time(store: SqlStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("verifier.store.sql_launches._ERASED_MAX", 2)
    for ended in (NOW, NOW, NOW, NOW, NOW + timedelta(seconds=1)):
        new = opening()
        await store.open_launch(new)
        await store.move(replace(release(new.launch.launch_id), time=ended))
    assert await store.erase_packets(NOW) == 4
    assert await store.erase_packets(NOW) == 0
    assert await store.erase_packets(NOW + timedelta(seconds=1)) == 1


async def test_a_pdh_keeps_the_oldest_firmware_that_it_was_used_under(store: SqlStore) -> None:
    for firmware, oldest in (
        ((1, 55, 24), (1, 55, 24)),
        ((1, 55, 30), (1, 55, 24)),
        ((1, 54, 99), (1, 54, 99)),
        ((0, 99, 99), (0, 99, 99)),
        ((1, 0, 0), (0, 99, 99)),
    ):
        new = opening()
        await store.open_launch(new)
        sighting = PdhSighting(pdh_fingerprint=b"h" * 32, firmware=firmware)
        assert await store.move(release(new.launch.launch_id, sighting=sighting)) is Outcome.DONE
        assert await store.sighted(b"h" * 32) == oldest
    assert await store.sighted(b"i" * 32) is None


# Ledgers.


async def test_a_ledger_becomes_what_the_spending_says_and_is_its_grants_own(store: SqlStore) -> None:
    new = opening(spending=BEGIN)
    await store.open_launch(new)
    assert await store.ledger("g") == LedgerRow(open=1)
    rated = Spending(grant="g", change=lambda row: replace(count_released(row), rate_time=2**60))
    await store.move(release(new.launch.launch_id, spending=rated))
    assert await store.ledger("g") == LedgerRow(released=1, rate_time=2**60)
    assert await store.ledger("h") == LedgerRow()


async def test_a_ledger_at_a_time_leaves_out_the_open_launches_that_are_overdue_then(store: SqlStore) -> None:
    minutes = [timedelta(minutes=each) for each in (5, 5, 10)]
    first, *_ = new = [opening(expire=NOW + each, spending=BEGIN) for each in minutes]
    others = [opening(expire=NOW, spending=Spending(grant="h", change=count_open)), opening(expire=NOW)]
    for each in (*new, *others):
        await store.open_launch(each)
    await store.move(release(first.launch.launch_id, spending=RELEASED))
    for at, still_open in ((None, 2), (timedelta(minutes=4), 2), (timedelta(minutes=5), 1), (timedelta(minutes=10), 0)):
        row = await store.ledger("g", at=None if at is None else NOW + at)
        assert row == LedgerRow(open=still_open, released=1)
    assert await store.ledger("g") == LedgerRow(open=2, released=1)


async def test_a_ledger_that_somebody_else_wrote_to_is_never_less_than_empty(store: SqlStore) -> None:
    await store.open_launch(opening(expire=NOW, spending=Spending(grant="g", change=lambda row: replace(row, open=0))))
    await store.record(audit(), Spending(grant="g", change=lambda row: replace(row, refused=1)))
    assert await store.ledger("g", at=NOW) == LedgerRow(refused=1)


async def test_a_spending_that_refuses_passes_through_and_changes_nothing(store: SqlStore) -> None:
    refusal = Refused(Reason.GRANT_EXHAUSTED, "the grant is spent", grant="g")

    def refuse(_row: LedgerRow) -> LedgerRow:
        raise refusal

    new = opening(spending=Spending(grant="g", change=refuse))
    with pytest.raises(Refused) as caught:
        await store.open_launch(new)
    assert caught.value is refusal
    assert await store.launch(new.launch.launch_id) is None
    assert await store.request(new.request.key) is None
    assert await chain_verifies(store) == 0
    assert await store.open_launch(replace(new, spending=BEGIN)) is Outcome.DONE
    with pytest.raises(Refused):
        await store.move(release(new.launch.launch_id, spending=new.spending))
    row = await store.launch(new.launch.launch_id)
    assert row is not None
    assert row.keys == new.launch.keys
    assert await store.ledger("g") == LedgerRow(open=1)


async def test_a_record_settles_with_a_grant_or_is_not_written(store: SqlStore) -> None:
    await store.open_launch(opening(spending=BEGIN))
    await store.record(audit(), RELEASED)
    assert await store.ledger("g") == LedgerRow(released=1)
    assert await store.ledger("h") == LedgerRow()
    head = await store.head()

    def refuse(_: LedgerRow) -> LedgerRow:
        raise Refused(Reason.GRANT_EXHAUSTED, "no more")

    with pytest.raises(Refused):
        await store.record(audit(), Spending(grant="g", change=refuse))
    assert await store.head() == head
    assert await store.ledger("g") == LedgerRow(released=1)


async def test_the_latest_time_of_the_log_is_its_heads_also_where_its_last_record_is_earlier(store: SqlStore) -> None:
    for minutes in (0, 30, 1):
        await store.record(audit(time=NOW + timedelta(minutes=minutes)))
    number, _, time = await store.head()
    assert (number, time) == (3, NOW + timedelta(minutes=30))


async def test_the_schema_refuses_a_ledger_below_zero(store: SqlStore) -> None:
    with pytest.raises(Unavailable):
        await store.open_launch(opening(spending=RELEASED))
    assert await store.ledger("g") == LedgerRow()
    assert await chain_verifies(store) == 0


# The audit log.


async def test_records_are_a_chain_and_come_in_pages(store: SqlStore) -> None:
    for index in range(5):
        await store.record(audit(f"event.{index}", body='{"words":"Grüße, \\u0000 and 💾"}'))
    assert await chain_verifies(store) == 5
    page = await store.records(None, after=2, limit=2)
    assert [(each.number, each.record.event) for each in page] == [(3, "event.2"), (4, "event.3")]
    assert await store.records(uuid4(), after=0, limit=10) == []


async def test_the_latest_time_never_goes_back(store: SqlStore) -> None:
    await store.record(audit(time=NOW))
    await store.record(audit(time=NOW - timedelta(hours=1)))
    assert await store.last_time() == NOW


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE audit SET body='{}'",
        "DELETE FROM audit",
        "UPDATE checkpoint SET token='forged'",
        "DELETE FROM checkpoint",
    ],
)
async def test_what_was_recorded_can_be_neither_changed_nor_removed(store: SqlStore, statement: str) -> None:
    await store.record(audit())
    await store.keep_checkpoint(Checkpoint(number=1, token="signed"))
    with pytest.raises(Unavailable):
        await store._engine.write("vandal", lambda transaction: transaction.change(statement))
    assert await chain_verifies(store) == 1
    assert await store.checkpoints(after=0, limit=10) == [Checkpoint(number=1, token="signed")]


async def test_a_checkpoint_is_kept_once_for_its_number(store: SqlStore) -> None:
    assert await store.keep_checkpoint(Checkpoint(number=2, token="two"))
    assert await store.keep_checkpoint(Checkpoint(number=1, token="one"))
    assert not await store.keep_checkpoint(Checkpoint(number=2, token="another two"))
    assert [each.token for each in await store.checkpoints(after=0, limit=10)] == ["one", "two"]
    assert [each.token for each in await store.checkpoints(after=1, limit=10)] == ["two"]
    assert [each.token for each in await store.checkpoints(after=0, limit=1)] == ["one"]


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE launch SET state='released', end_time=1",
        "UPDATE launch SET receipt='{}'",
        "UPDATE launch SET state='strange', end_time=1, tek=NULL, tik=NULL",
        "UPDATE launch SET tik=NULL",
        "DELETE FROM launch",
        "DELETE FROM terms",
    ],
)
async def test_the_schema_refuses_a_launch_that_cannot_be(store: SqlStore, statement: str) -> None:
    new = opening()
    await store.open_launch(new)

    async def work(transaction: Transaction) -> int:
        return await transaction.change(statement)

    with pytest.raises(Unavailable):
        await store._engine.write("vandal", work)
    assert await store.launch(new.launch.launch_id) == new.launch


# The whole.


async def test_a_store_is_found_again_after_a_restart(place: Place) -> None:
    new = opening()
    first = place.store()
    await first.open(make=True)
    await first.open_launch(new)
    await first.close()
    second = place.store()
    await second.open(make=True)
    assert await second.launch(new.launch.launch_id) == new.launch
    await second.check()
    await second.close()


async def test_a_cancelled_caller_leaves_the_transaction_whole(store: SqlStore) -> None:
    new = opening()
    task = asyncio.create_task(store.open_launch(new))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    # As many transactions as there are threads: the cancelled one has ended when these have.
    await asyncio.gather(*(store.check() for _ in range(8)))
    row = await store.launch(new.launch.launch_id)
    request = await store.request(new.request.key)
    assert (row is None) == (request is None)
    assert await chain_verifies(store) == (0 if row is None else 1)


async def test_a_release_is_confirmed_where_it_stands_and_nowhere_else(store: SqlStore) -> None:
    new = opening()
    end = release(new.launch.launch_id)
    launch_id, audit_id = new.launch.launch_id, end.audit.audit_id
    assert await store.confirm(launch_id, audit_id, 0) is Outcome.LOST
    assert await store.open_launch(new) is Outcome.DONE
    assert await store.confirm(launch_id, audit_id, 0) is Outcome.LOST
    assert await store.move(end) is Outcome.DONE
    assert await store.confirm(launch_id, audit_id, 0) is Outcome.DONE
    assert await store.confirm(launch_id, new.audit.audit_id, 0) is Outcome.LOST
    assert await store.confirm(launch_id, audit_id, 1) is Outcome.DOCUMENTS_CHANGED
