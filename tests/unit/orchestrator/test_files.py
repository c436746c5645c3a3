"""Files that are written whole or not at all, and several as one."""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from orchestrator import files
from orchestrator.files import PRIVATE, NewFile, write_all

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


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    target = tmp_path / "chain"
    target.write_bytes(OLD)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_all([NewFile(path=target, data=NEW)])
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


def test_a_secret_file_does_not_show_its_content() -> None:
    assert "hidden" not in repr(NewFile(path=Path("x"), data=b"hidden"))
