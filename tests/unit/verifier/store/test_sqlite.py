"""The embedded store: one transaction or nothing, one process or none, and what is erased is gone."""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from common.errors import InvalidInput, Reason, Unavailable
from verifier.store.migrations import migrations
from verifier.store.rows import AuditRow, LaunchRow, Move, Opening, Outcome, Packet, RequestKey, RequestRow, SealedKeys
from verifier.store.sqlite import SqliteStore, read_audit
from verifier.store.sqlite_file import FILE_NAME

NOW = datetime(2026, 3, 1, tzinfo=UTC)
TEK, TIK = b"sealed TEK" * 4, b"sealed TIK" * 4


def audit(event: str = "launch.begun", launch_id: UUID | None = None, time: datetime = NOW) -> AuditRow:
    return AuditRow(
        audit_id=uuid4(), time=time, event=event, launch_id=launch_id, caller="c", reason=None, body='{"a":1}'
    )


def opening(*, caller: str = "c", expire: datetime = NOW + timedelta(minutes=10), cap: int = 10) -> Opening:
    launch_id = uuid4()
    launch = LaunchRow(
        launch_id=launch_id,
        caller=caller,
        state="open",
        workload="web",
        workload_version="1",
        terms_id=b"t" * 32,
        platform_id=b"p" * 32,
        generation="milan",
        fingerprint="f" * 64,
        policy=0xFFFF000F,
        godh=b"g" * 2084,
        session=b"s" * 128,
        pdh_fingerprint=b"h" * 32,
        keys=SealedKeys(key_id=b"12345678", tek=TEK, tik=TIK),
        create_time=NOW,
        expire_time=expire,
    )
    key = RequestKey(caller=caller, method="BeginLaunch", request_id=uuid4())
    return Opening(
        launch=launch,
        terms=b"{}",
        chain=b"c" * 8336,
        request=RequestRow(key=key, content=b"0" * 32, launch_id=launch_id),
        audit=audit(launch_id=launch_id),
        open_cap=cap,
    )


def release(launch_id: UUID, *, time: datetime = NOW, caller: str = "c") -> Move:
    key = RequestKey(caller=caller, method="ReleaseSecret", request_id=uuid4())
    return Move(
        launch_id=launch_id,
        expected="open",
        to="released",
        time=time,
        in_time=True,
        measurement=b"m" * 48,
        digest=b"d" * 32,
        packet=Packet(header=b"H" * 52, payload=b"P" * 64, receipt="{}"),
        generated=b"sealed",
        request=RequestRow(key=key, content=b"1" * 32, launch_id=launch_id),
        audit=audit("launch.released", launch_id, time),
    )


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    made = SqliteStore(tmp_path / "state")
    await made.open()
    yield made
    await made.close()


async def test_a_launch_comes_back_as_it_was_written(store: SqliteStore) -> None:
    new = opening()
    assert await store.open_launch(new) is Outcome.DONE
    assert await store.launch(new.launch.launch_id) == new.launch
    assert await store.request(new.request.key) == new.request
    assert await store.terms(b"t" * 32) == b"{}"
    assert await store.chain(b"p" * 32) == b"c" * 8336
    assert await store.last_time() == NOW
    assert await store.sealing_keys() == {b"12345678"}


async def test_what_is_not_there_is_none_and_lost_terms_are_an_outage(store: SqliteStore) -> None:
    assert await store.launch(uuid4()) is None
    assert await store.request(RequestKey(caller="c", method="m", request_id=uuid4())) is None
    assert await store.last_time() is None
    with pytest.raises(Unavailable):
        await store.terms(b"x" * 32)


async def test_a_release_moves_once_and_erases_the_keys(store: SqliteStore, tmp_path: Path) -> None:
    new = opening()
    await store.open_launch(new)
    move = release(new.launch.launch_id)
    assert await store.move(move) is Outcome.DONE
    assert await store.move(release(new.launch.launch_id)) is Outcome.LOST
    row = await store.launch(new.launch.launch_id)
    assert row is not None
    assert (row.state, row.keys, row.packet, row.end_time) == ("released", None, move.packet, NOW)
    assert (row.measurement, row.digest, row.audit_id) == (b"m" * 48, b"d" * 32, move.audit.audit_id)
    events = [each.event for each in read_audit(tmp_path / "state" / FILE_NAME, new.launch.launch_id)]
    assert events == ["launch.begun", "launch.released"]


async def test_a_lost_move_leaves_nothing_behind(store: SqliteStore, tmp_path: Path) -> None:
    new = opening()
    await store.open_launch(new)
    await store.move(release(new.launch.launch_id))
    late = release(new.launch.launch_id)
    assert late.request is not None
    assert await store.move(late) is Outcome.LOST
    assert await store.request(late.request.key) is None
    assert len(read_audit(tmp_path / "state" / FILE_NAME, None)) == 2


async def test_time_is_part_of_the_compare_and_set(store: SqliteStore) -> None:
    new = opening(expire=NOW + timedelta(minutes=1))
    await store.open_launch(new)
    launch_id = new.launch.launch_id
    assert await store.move(release(launch_id, time=NOW + timedelta(minutes=1))) is Outcome.LOST
    expire = Move(
        launch_id=launch_id, expected="open", to="expired", time=NOW, overdue=True, audit=audit("launch.expired")
    )
    assert await store.move(expire) is Outcome.LOST
    due = replace(expire, time=NOW + timedelta(minutes=1))
    assert await store.move(due) is Outcome.DONE


async def test_a_request_id_is_taken_once_in_its_scope(store: SqliteStore) -> None:
    first, second = opening(), opening()
    await store.open_launch(first)
    again = replace(second, request=replace(second.request, key=first.request.key))
    assert await store.open_launch(again) is Outcome.REQUEST_TAKEN
    assert await store.launch(second.launch.launch_id) is None
    other = replace(second, request=replace(second.request, key=replace(first.request.key, caller="d")))
    assert await store.open_launch(other) is Outcome.DONE


async def test_the_cap_counts_open_launches_of_one_caller_that_are_in_time(store: SqliteStore) -> None:
    assert await store.open_launch(opening(cap=2, expire=NOW)) is Outcome.DONE
    assert await store.open_launch(opening(cap=2)) is Outcome.DONE
    two = opening(cap=2)
    assert await store.open_launch(two) is Outcome.DONE
    assert await store.open_launch(opening(cap=2)) is Outcome.CAP_REACHED
    assert await store.open_launch(opening(cap=2, caller="d")) is Outcome.DONE
    await store.move(release(two.launch.launch_id))
    assert await store.open_launch(opening(cap=2)) is Outcome.DONE


async def test_overdue_launches_are_found_oldest_first(store: SqliteStore) -> None:
    times = [NOW + timedelta(minutes=each) for each in (3, 1, 2, 9)]
    ids = []
    for time in times:
        new = opening(expire=time)
        ids.append(new.launch.launch_id)
        await store.open_launch(new)
    assert await store.overdue(NOW + timedelta(minutes=3), "open", 10) == [ids[1], ids[2], ids[0]]
    assert await store.overdue(NOW + timedelta(minutes=3), "open", 1) == [ids[1]]


async def test_a_measurement_is_found_again_in_another_launch_only(store: SqliteStore) -> None:
    new = opening()
    await store.open_launch(new)
    await store.move(release(new.launch.launch_id))
    assert await store.measured_before(b"m" * 48, uuid4()) == new.launch.launch_id
    assert await store.measured_before(b"m" * 48, new.launch.launch_id) is None
    assert await store.measured_before(b"n" * 48, uuid4()) is None


async def test_packets_are_erased_and_the_launch_stays(store: SqliteStore) -> None:
    new = opening()
    await store.open_launch(new)
    await store.move(release(new.launch.launch_id))
    assert await store.erase_packets(NOW - timedelta(seconds=1)) == 0
    assert await store.erase_packets(NOW) == 1
    row = await store.launch(new.launch.launch_id)
    assert row is not None
    assert (row.state, row.packet) == ("released", None)


async def test_the_latest_time_never_goes_back(store: SqliteStore) -> None:
    await store.record(audit(time=NOW))
    await store.record(audit(time=NOW - timedelta(hours=1)))
    assert await store.last_time() == NOW


async def test_audit_records_can_be_neither_changed_nor_removed(store: SqliteStore, tmp_path: Path) -> None:
    await store.record(audit())
    connection = sqlite3.connect(tmp_path / "state" / FILE_NAME)
    try:
        for statement in ("UPDATE audit SET body='{}'", "DELETE FROM audit"):
            with pytest.raises(sqlite3.IntegrityError, match="audit records are not"):
                connection.execute(statement)
    finally:
        connection.close()


async def test_the_schema_refuses_keys_in_a_launch_that_has_ended(store: SqliteStore, tmp_path: Path) -> None:
    new = opening()
    await store.open_launch(new)
    connection = sqlite3.connect(tmp_path / "state" / FILE_NAME)
    try:
        with pytest.raises(sqlite3.IntegrityError):
            connection.execute("UPDATE launch SET state='released', end_time=1")
    finally:
        connection.close()


async def test_files_are_their_owners_only(store: SqliteStore, tmp_path: Path) -> None:
    await store.open_launch(opening())
    folder = tmp_path / "state"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    names = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert names
    assert set(names.values()) == {0o600}


async def test_a_loose_folder_is_tightened_and_a_strangers_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "loose"
    folder.mkdir(mode=0o755)
    made = SqliteStore(folder)
    await made.open()
    await made.close()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(InvalidInput, match="belongs to another user"):
        await SqliteStore(folder).open()


async def test_a_second_process_is_refused(store: SqliteStore, tmp_path: Path) -> None:
    program = (
        "import asyncio, sys; from pathlib import Path; from verifier.store.sqlite import SqliteStore;"
        "asyncio.run(SqliteStore(Path(sys.argv[1])).open())"
    )
    await store.check()
    run = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", program, str(tmp_path / "state")], capture_output=True, check=False
    )
    assert run.returncode == 1
    assert b"another process serves from" in run.stderr


async def test_a_store_is_found_again_after_a_restart(tmp_path: Path) -> None:
    new = opening()
    first = SqliteStore(tmp_path)
    await first.open()
    await first.open_launch(new)
    await first.close()
    second = SqliteStore(tmp_path)
    await second.open()
    assert await second.launch(new.launch.launch_id) == new.launch
    await second.close()


async def test_a_store_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    made = SqliteStore(tmp_path)
    await made.open()
    await made.close()
    connection = sqlite3.connect(tmp_path / FILE_NAME)
    connection.execute("PRAGMA user_version=999")
    connection.close()
    again = SqliteStore(tmp_path)
    with pytest.raises(Unavailable, match="schema 999"):
        await again.open()
    await again.close()
    with pytest.raises(Unavailable, match="schema 999"):
        read_audit(tmp_path / FILE_NAME, None)


def test_migrations_are_numbered_without_gaps() -> None:
    assert [number for number, _, _ in migrations()] == list(range(1, len(migrations()) + 1))


async def test_a_locked_database_is_an_outage_that_passes(
    store: SqliteStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("verifier.store.sqlite_file.BUSY_TIMEOUT_S", 0.05)
    await store._read(lambda _connection: store._disconnect())
    new = opening()
    holder = sqlite3.connect(tmp_path / "state" / FILE_NAME, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(Unavailable) as caught:
        await store.open_launch(new)
    assert caught.value.reason is Reason.STORE_UNAVAILABLE
    holder.execute("ROLLBACK")
    holder.close()
    assert await store.launch(new.launch.launch_id) is None
    assert await store.open_launch(new) is Outcome.DONE


async def test_a_full_disk_is_an_outage_that_passes(store: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    first = opening()
    await store.open_launch(first)
    from verifier.store import sqlite_file

    real = sqlite_file.connect

    def small(path: Path) -> sqlite3.Connection:
        connection = real(path)
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count={pages}")
        return connection

    monkeypatch.setattr(sqlite_file, "connect", small)
    await store._read(lambda _connection: store._disconnect())
    refused = []
    for _ in range(20):
        try:
            await store.open_launch(opening())
        except Unavailable as error:
            refused.append(error)
            break
    assert refused
    assert "full" in refused[0].message
    # What is there can be read, and nothing half is left.
    assert await store.launch(first.launch.launch_id) == first.launch
    monkeypatch.setattr(sqlite_file, "connect", real)
    await store._read(lambda _connection: store._disconnect())
    assert await store.open_launch(opening()) is Outcome.DONE


async def test_the_check_is_a_write_that_reaches_the_disk(
    store: SqliteStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wal = tmp_path / "state" / f"{FILE_NAME}-wal"
    await store.flush_erased()
    await store.check()
    assert wal.stat().st_size > 0
    from verifier.store import sqlite_file

    real = sqlite_file.connect

    def frozen(path: Path) -> sqlite3.Connection:
        connection = real(path)
        connection.execute("PRAGMA query_only=ON")
        return connection

    monkeypatch.setattr(sqlite_file, "connect", frozen)
    await store._read(lambda _connection: store._disconnect())
    with pytest.raises(Unavailable, match="readonly"):
        await store.check()
    monkeypatch.setattr(sqlite_file, "connect", real)
    await store._read(lambda _connection: store._disconnect())
    await store.check()


async def test_a_file_that_was_moved_away_stops_the_store(store: SqliteStore, tmp_path: Path) -> None:
    new = opening()
    await store.open_launch(new)
    path, aside = tmp_path / "state" / FILE_NAME, tmp_path / "aside"
    path.rename(aside)
    for call in (store.launch(new.launch.launch_id), store.move(release(new.launch.launch_id)), store.check()):
        with pytest.raises(Unavailable) as gone:
            await call
        # Callers at the other site read this, too.
        assert str(tmp_path) not in gone.value.message
    path.write_bytes(b"")
    with pytest.raises(Unavailable, match="not the file that was opened") as strange:
        await store.check()
    assert str(tmp_path) not in strange.value.message
    path.unlink()
    aside.rename(path)
    assert await store.launch(new.launch.launch_id) == new.launch


async def test_a_cancelled_caller_leaves_the_transaction_whole(store: SqliteStore) -> None:
    new = opening()
    task = asyncio.create_task(store.open_launch(new))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    row = await store.launch(new.launch.launch_id)
    request = await store.request(new.request.key)
    assert (row is None) == (request is None)


async def test_erased_keys_are_gone_from_every_file(store: SqliteStore, tmp_path: Path) -> None:
    new = opening()
    await store.open_launch(new)
    await store.move(release(new.launch.launch_id))
    await store.flush_erased()
    for path in (tmp_path / "state").iterdir():
        data = path.read_bytes()
        assert TEK not in data
        assert TIK not in data


async def test_each_commit_is_synced_to_the_disk(store: SqliteStore) -> None:
    values = await store._read(
        lambda c: {
            name: c.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("journal_mode", "synchronous", "secure_delete", "foreign_keys", "trusted_schema")
        }
    )
    assert values == {
        "journal_mode": "wal",
        "synchronous": 2,
        "secure_delete": 1,
        "foreign_keys": 1,
        "trusted_schema": 0,
    }


async def test_thirty_two_movers_of_one_launch_are_one_move(store: SqliteStore, tmp_path: Path) -> None:
    new = opening()
    await store.open_launch(new)
    outcomes = await asyncio.gather(*(store.move(release(new.launch.launch_id)) for _ in range(32)))
    assert sorted(outcome.name for outcome in outcomes) == ["DONE"] + ["LOST"] * 31
    records = read_audit(tmp_path / "state" / FILE_NAME, None)
    assert [record.event for record in records].count("launch.released") == 1
    assert json.loads(records[0].body) == {"a": 1}


async def test_a_folder_that_holds_something_else_keeps_its_mode(tmp_path: Path) -> None:
    folder = tmp_path / "etc"
    folder.mkdir(mode=0o755)
    folder.chmod(0o755)
    (folder / "verifier.toml").touch()
    with pytest.raises(InvalidInput, match=r"state_dir: .* holds something else"):
        await SqliteStore(folder).open()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755
    (folder / "verifier.toml").unlink()
    made = SqliteStore(folder)
    await made.open()
    await made.close()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
