"""Files that are written whole or not at all, and several as one."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from orchestrator import files
from orchestrator.files import PRIVATE, NewFile, place_of, write_all

OLD, NEW = b"old", b"new" * 1000


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def test_files_are_made_with_their_modes(tmp_path: Path) -> None:
    with umask(0o022):
        write_all([NewFile(path=tmp_path / "key", data=NEW, mode=PRIVATE), NewFile(path=tmp_path / "cert", data=OLD)])
    assert (tmp_path / "key").read_bytes() == NEW
    assert (tmp_path / "cert").read_bytes() == OLD
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("key", "cert")]
    assert modes == [0o600, 0o644]


def test_what_is_replaced_leaves_nothing_behind(tmp_path: Path) -> None:
    for name in ("key", "cert"):
        (tmp_path / name).write_bytes(OLD)
    write_all([NewFile(path=tmp_path / "key", data=NEW, mode=PRIVATE), NewFile(path=tmp_path / "cert", data=NEW)])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"key": NEW, "cert": NEW}
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600, "also where the old one was open to others"


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("broken", ["second folder missing", "second is a folder", "second rename", "interrupted"])
def test_what_fails_leaves_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str, *, there: bool
) -> None:
    first, second = tmp_path / "key", tmp_path / "cert"
    if there:
        first.write_bytes(OLD)
    failure: type[BaseException] = OSError
    if broken == "second folder missing":
        second = tmp_path / "nowhere" / "cert"
    elif broken == "second is a folder":
        second.mkdir()
    else:
        failure = KeyboardInterrupt if broken == "interrupted" else OSError
        _fail_at_the_second(monkeypatch, failure)
    before = _tree(tmp_path)
    with pytest.raises(failure) as told:
        write_all([NewFile(path=first, data=NEW), NewFile(path=second, data=NEW)])
    assert _tree(tmp_path) == before
    if isinstance(told.value, OSError) and broken != "second rename":
        assert told.value.filename == str(second)


def _fail_at_the_second(monkeypatch: pytest.MonkeyPatch, failure: type[BaseException]) -> None:
    renamed = []
    real = files._rename

    def rename(temporary: Path, target: Path, asked: Path) -> None:
        renamed.append(target)
        if len(renamed) > 1:
            raise failure
        real(temporary, target, asked)

    monkeypatch.setattr(files, "_rename", rename)


def _tree(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_a_full_disk_leaves_the_old_file_and_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    target = tmp_path / "chain"
    target.write_bytes(OLD)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space") as told:
        write_all([NewFile(path=target, data=NEW)])
    assert told.value.filename == str(target)
    assert _tree(tmp_path) == {str(target): OLD}


def test_a_link_is_followed_and_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(OLD)
    (tmp_path / "link").symlink_to("real")
    write_all([NewFile(path=tmp_path / "link", data=NEW)])
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == NEW


def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    write_all([NewFile(path=pipe, data=NEW)])
    reader.join(30)
    assert got == [NEW]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_public_file_keeps_mode_and_owner_of_the_one_before(tmp_path: Path) -> None:
    target, private = tmp_path / "chain", tmp_path / "key"
    for path in (target, private):
        path.write_bytes(OLD)
        path.chmod(0o664)
        if not os.getuid():
            os.chown(path, 65534, 65533)
    before = target.stat()
    with umask(0o022):
        write_all([NewFile(path=target, data=NEW)])
        write_all([NewFile(path=private, data=NEW, mode=PRIVATE)])
    after, key = target.stat(), private.stat()
    assert after.st_ino != before.st_ino
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)
    assert (stat.S_IMODE(key.st_mode), key.st_uid) == (PRIVATE, os.getuid())


def test_a_file_of_others_is_replaced_where_its_owner_cannot_be_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    target = tmp_path / "chain"
    target.write_bytes(OLD)
    target.chmod(0o640)
    monkeypatch.setattr(os, "fchown", refused)
    write_all([NewFile(path=target, data=NEW)])
    assert (target.read_bytes(), stat.S_IMODE(target.stat().st_mode)) == (NEW, 0o640)


@pytest.mark.parametrize("loop", ["itself", "two", "folder"])
def test_links_that_lead_round_in_a_circle_are_named(tmp_path: Path, loop: str) -> None:
    path = tmp_path / "a"
    path.symlink_to("b" if loop == "two" else "a")
    (tmp_path / "b").symlink_to("a")
    if loop == "folder":
        path = path / "chain"
    before = {entry.name for entry in tmp_path.iterdir()}
    for act in (lambda: write_all([NewFile(path=path, data=NEW)]), lambda: place_of(path)):
        with pytest.raises(OSError, match=os.strerror(errno.ELOOP)) as told:
            act()
        assert told.value.filename == str(path)
    assert {entry.name for entry in tmp_path.iterdir()} == before


def test_a_link_to_nothing_makes_what_it_names(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("real")
    write_all([NewFile(path=tmp_path / "link", data=NEW)])
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == NEW


@pytest.mark.parametrize("name", ["/dev/fd/{}", "/proc/self/fd/{}", "link", "link to link"])
def test_an_open_file_goes_on_where_it_is(tmp_path: Path, name: str) -> None:
    target = tmp_path / "out"
    with target.open("wb", buffering=0) as out:
        out.write(OLD)
        (tmp_path / "link").symlink_to(f"/proc/self/fd/{out.fileno()}")
        (tmp_path / "link to link").symlink_to("link")
        path = Path(name.format(out.fileno())) if name.startswith("/") else tmp_path / name
        write_all([NewFile(path=path, data=NEW)])
        out.write(OLD)
        assert os.fstat(out.fileno()).st_ino == target.stat().st_ino
    assert target.read_bytes() == OLD + NEW + OLD


def test_a_file_that_another_process_has_open_loses_nothing(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with target.open("wb") as out, subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=out) as process:
        target.write_bytes(OLD)
        write_all([NewFile(path=Path(f"/proc/{process.pid}/fd/1"), data=NEW)])
    assert target.read_bytes() == OLD + NEW


def test_a_full_device_is_named() -> None:
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)) as told:
        write_all([NewFile(path=Path("/dev/full"), data=NEW)])
    assert told.value.filename == "/dev/full"


def test_a_secret_file_does_not_show_its_content() -> None:
    assert "hidden" not in repr(NewFile(path=Path("x"), data=b"hidden"))
