"""Files that hold a secret: read only where nobody else could, made for their owner alone."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from common.errors import InvalidInput, Reason
from common.private_file import read_private, write_private

CONTENT = b"what nobody else may see"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    write_private(path, CONTENT)
    return path


def refused(path: Path, most: int = 100) -> str:
    with pytest.raises(InvalidInput) as caught:
        read_private(path, most)
    assert caught.value.reason is Reason.INVALID_CONFIGURATION
    assert CONTENT.decode() not in repr(caught.value)
    return caught.value.message.removeprefix(f"{path}: ")


def test_what_was_written_is_read_again(file: Path) -> None:
    assert file.stat().st_mode & 0o777 == 0o600
    assert read_private(file, len(CONTENT)) == CONTENT
    file.chmod(0o400)
    assert read_private(file, 100) == CONTENT


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o610, 0o601])
def test_a_file_that_others_can_use_is_refused(file: Path, mode: int) -> None:
    file.chmod(mode)
    assert refused(file) == f"can be used by others (mode {mode:04o})"


def test_a_larger_file_is_refused(file: Path) -> None:
    assert refused(file, len(CONTENT) - 1) == f"has more than {len(CONTENT) - 1} bytes"


def test_what_is_no_file_is_refused_and_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    (tmp_path / "folder").mkdir(0o700)
    for name, sentence in (("pipe", "is not a regular file"), ("folder", "is not a regular file")):
        assert refused(tmp_path / name) == sentence
    assert refused(tmp_path / "none") == "no such file or directory"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_somebody_else_s_file_is_refused(file: Path) -> None:
    os.chown(file, 65534, -1)
    assert refused(file) == "belongs to another user"


def test_a_file_that_exists_is_not_touched_and_a_link_is_not_followed(file: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    for path in (file, tmp_path / "link"):
        with pytest.raises(InvalidInput, match="is never overwritten"):
            write_private(path, b"other")
    assert file.read_bytes() == CONTENT
    assert not (tmp_path / "target").exists()


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidInput, match="no such file or directory"):
        write_private(tmp_path / "none" / "file", CONTENT)

    def full(_fd: int, _data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(InvalidInput, match="no space left on device"):
        write_private(tmp_path / "full", CONTENT)
    assert not (tmp_path / "full").exists()
