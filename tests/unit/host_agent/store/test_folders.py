"""Launches on disk: whole records only, private files, one process at a time."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from uuid import uuid4

import pytest

from common.errors import InvalidInput, Reason, Unavailable
from host_agent.store.folders import RECORD, LaunchFolders


@pytest.fixture
def folders(tmp_path: Path) -> LaunchFolders:
    made = LaunchFolders(tmp_path / "state")
    made.open()
    return made


def test_a_record_is_found_again_with_its_path(folders: LaunchFolders) -> None:
    one, two = uuid4(), uuid4()
    folders.save(one, b"1")
    folders.save(two, b"2")
    folders.save(one, b"3")
    assert {launch: data for launch, _, data in folders.records()} == {one: b"3", two: b"2"}
    assert {path for _, path, _ in folders.records()} == {folders.folder(one) / RECORD, folders.folder(two) / RECORD}


def test_folders_and_records_are_their_owners_only(folders: LaunchFolders, tmp_path: Path) -> None:
    launch = uuid4()
    folders.save(launch, b"1")
    folder = folders.folder(launch)
    for path, mode in ((tmp_path / "state" / "launches", 0o700), (folder, 0o700), (folder / RECORD, 0o600)):
        assert stat.S_IMODE(path.stat().st_mode) == mode


def test_a_folder_that_others_may_read_is_closed_to_them(tmp_path: Path) -> None:
    (tmp_path / "launches").mkdir(mode=0o755)
    made = LaunchFolders(tmp_path)
    made.open()
    assert stat.S_IMODE((tmp_path / "launches").stat().st_mode) == 0o700
    made.close()


def test_a_first_write_that_fails_leaves_no_folder(folders: LaunchFolders, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = uuid4()

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(Unavailable):
            folders.save(launch, b"new")
    assert not folders.folder(launch).exists()


def test_a_write_that_fails_leaves_the_old_record(folders: LaunchFolders, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = uuid4()
    folders.save(launch, b"old")

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(Unavailable) as failure:
            folders.save(launch, b"new")
    assert failure.value.reason is Reason.STORE_UNAVAILABLE
    assert [data for _, _, data in folders.records()] == [b"old"]


def test_a_record_is_on_the_disk_before_it_counts(folders: LaunchFolders, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = uuid4()
    order: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(descriptor: int) -> None:
        order.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def noted_replace(path: Path, target: Path) -> Path:
        order.append("rename")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    folders.save(launch, b"1")
    assert order == ["file", "rename", "folder", "folder"]
    order.clear()
    folders.save(launch, b"2")
    assert order == ["file", "rename", "folder"]


def test_half_a_record_of_a_killed_agent_is_not_a_record(folders: LaunchFolders) -> None:
    launch = uuid4()
    folders.save(launch, b"whole")
    (folders.folder(launch) / "record.json.new").write_bytes(b"ha")
    assert [data for _, _, data in folders.records()] == [b"whole"]
    assert [path.name for path in folders.folder(launch).iterdir()] == [RECORD]


def test_a_folder_without_a_record_is_swept_away(folders: LaunchFolders) -> None:
    folder = folders.folder(uuid4())
    folder.mkdir()
    (folder / "record.json.new").write_bytes(b"ha")
    (folder / "session.b64").write_bytes(b"x")
    assert list(folders.records()) == []
    assert not folder.exists()


def test_what_is_no_launch_is_left_alone(folders: LaunchFolders, tmp_path: Path) -> None:
    other = tmp_path / "state" / "launches" / "lost+found"
    other.mkdir()
    (tmp_path / "state" / "launches" / "notes.txt").write_text("x")
    assert list(folders.records()) == []
    assert other.exists()


def test_an_unreadable_record_is_named(folders: LaunchFolders) -> None:
    launch = uuid4()
    folders.save(launch, b"1")
    record = folders.folder(launch) / RECORD
    record.unlink()
    record.mkdir()
    with pytest.raises(InvalidInput, match=str(record)) as failure:
        list(folders.records())
    assert failure.value.reason is Reason.INVALID_CONFIGURATION


def test_clearing_keeps_the_record_and_what_it_is_told_to_keep(folders: LaunchFolders) -> None:
    launch = uuid4()
    folders.save(launch, b"1")
    folder = folders.folder(launch)
    (folder / "machine.log").write_text("x")
    (folder / "session.b64").write_text("x")
    (folder / "sub").mkdir()
    folders.clear(launch, keep={"machine.log"})
    assert {path.name for path in folder.iterdir()} == {RECORD, "machine.log"}
    folders.clear(launch, keep=())
    assert {path.name for path in folder.iterdir()} == {RECORD}
    folders.clear(uuid4(), keep=())


def test_a_removed_launch_is_gone(folders: LaunchFolders) -> None:
    launch = uuid4()
    folders.save(launch, b"1")
    (folders.folder(launch) / "machine.log").write_text("x")
    folders.remove(launch)
    assert not folders.folder(launch).exists()
    folders.remove(launch)


def test_one_process_at_a_time_has_the_folders(folders: LaunchFolders, tmp_path: Path) -> None:
    second = LaunchFolders(tmp_path / "state")
    with pytest.raises(InvalidInput, match="another sev-host-agent"):
        second.open()
    folders.close()
    second.open()
    second.close()


def test_a_state_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InvalidInput, match="state_dir"):
        LaunchFolders(tmp_path / "file" / "state").open()
