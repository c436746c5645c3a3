"""What the embedded store has of its own: file modes, the folder's lock, settings, and that what is erased is gone."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from common.errors import InvalidInput, Reason, Unavailable
from tests.support.store_rows import GENERATED, SEAL, TEK, TIK, admin_request, audit, opening, release, sealed
from verifier.store.engine import Transaction
from verifier.store.rows import Outcome
from verifier.store.sqlite import SqliteStore, read_audit
from verifier.store.sqlite_engine import SqliteEngine
from verifier.store.sqlite_file import FILE_NAME


def engine_of(store: SqliteStore) -> SqliteEngine:
    engine = store._engine
    assert isinstance(engine, SqliteEngine)
    return engine


async def forget(store: SqliteStore) -> None:
    """Let the next call make a connection of its own."""
    engine_of(store)._disconnect()


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    made = SqliteStore(tmp_path / "state")
    await made.open(make=True)
    yield made
    await made.close()


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
    await made.open(make=True)
    await made.close()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(InvalidInput, match="belongs to another user"):
        await SqliteStore(folder).open(make=True)


async def test_a_second_process_is_refused(store: SqliteStore, tmp_path: Path) -> None:
    program = (
        "import asyncio, sys; from pathlib import Path; from verifier.store.sqlite import SqliteStore;"
        "asyncio.run(SqliteStore(Path(sys.argv[1])).open(make=True))"
    )
    await store.check()
    run = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", program, str(tmp_path / "state")], capture_output=True, check=False
    )
    assert run.returncode == 1
    assert b"another process serves from" in run.stderr


async def test_a_locked_database_is_an_outage_that_passes(
    store: SqliteStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("verifier.store.sqlite_file.BUSY_TIMEOUT_S", 0.05)
    await forget(store)
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
    await forget(store)
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
    await forget(store)
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
    await forget(store)
    with pytest.raises(Unavailable, match="readonly"):
        await store.check()
    monkeypatch.setattr(sqlite_file, "connect", real)
    await forget(store)
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


async def test_erased_keys_are_gone_from_every_file(store: SqliteStore, tmp_path: Path) -> None:
    new = opening()
    await store.open_launch(new)
    await store.move(release(new.launch.launch_id))
    await store.flush_erased()
    for path in (tmp_path / "state").iterdir():
        data = path.read_bytes()
        assert TEK not in data
        assert TIK not in data
    # The evil twin: what was not erased is found in the same way.
    assert GENERATED in (tmp_path / "state" / FILE_NAME).read_bytes()


async def test_an_erased_secret_is_gone_from_every_file(store: SqliteStore, tmp_path: Path) -> None:
    blob = sealed(b"sealed secret" * 4)
    await store.put_secret("disk", lambda _version: blob, 9, admin_request(), audit("secret.put"))
    await store.flush_erased()
    assert blob in (tmp_path / "state" / FILE_NAME).read_bytes()
    assert (await store.delete_secret("disk", admin_request(), audit("secret.deleted"), SEAL))[0] is Outcome.DONE
    await store.flush_erased()
    assert not [path for path in (tmp_path / "state").iterdir() if blob in path.read_bytes()]


async def test_the_audit_log_is_read_beside_the_process_that_serves(store: SqliteStore, tmp_path: Path) -> None:
    path = tmp_path / "state" / FILE_NAME
    first, second = opening(), opening()
    await store.open_launch(first)
    await store.open_launch(second)
    assert read_audit(path, None) == [first.audit, second.audit]
    assert read_audit(path, second.launch.launch_id) == [second.audit]
    with pytest.raises(Unavailable):
        read_audit(tmp_path / "nothing", None)


async def test_an_audit_log_of_another_schema_is_not_read(store: SqliteStore, tmp_path: Path) -> None:
    path = tmp_path / "state" / FILE_NAME
    await store.record(audit())
    connection = sqlite3.connect(path)
    with connection:
        connection.execute("INSERT INTO migration VALUES (999, 'newer', 1, 0)")
    # A newer schema that only added is read, and one that took something away is not.
    assert len(read_audit(path, None)) == 1
    with connection:
        connection.execute("UPDATE migration SET compatible_from=999 WHERE number=999")
    with pytest.raises(Unavailable, match="schema 999"):
        read_audit(path, None)
    with connection:
        connection.execute("DELETE FROM migration")
    with pytest.raises(Unavailable, match="has no schema"):
        read_audit(path, None)
    connection.close()


async def test_each_commit_is_synced_to_the_disk(store: SqliteStore) -> None:
    async def look(transaction: Transaction) -> dict[str, Any]:
        names = ("journal_mode", "synchronous", "secure_delete", "foreign_keys", "trusted_schema")
        return {name: (await transaction.rows(f"PRAGMA {name}"))[0][0] for name in names}

    assert await engine_of(store).read(look) == {
        "journal_mode": "wal",
        "synchronous": 2,
        "secure_delete": 1,
        "foreign_keys": 1,
        "trusted_schema": 0,
    }


async def test_a_folder_that_holds_something_else_keeps_its_mode(tmp_path: Path) -> None:
    folder = tmp_path / "etc"
    folder.mkdir(mode=0o755)
    folder.chmod(0o755)
    (folder / "verifier.toml").touch()
    with pytest.raises(InvalidInput, match=r"state_dir: .* holds something else"):
        await SqliteStore(folder).open(make=True)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755
    (folder / "verifier.toml").unlink()
    made = SqliteStore(folder)
    await made.open(make=True)
    await made.close()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
