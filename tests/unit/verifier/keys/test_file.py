"""The key file and what it seals: each blob opens in its own place, under its own key, or not at all."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import InvalidInput, Unavailable
from verifier.keys.file import FileKey, read_key_file, write_key_file

KEK = bytes(range(32))
LAUNCH = UUID(int=7)


def test_a_sealed_secret_opens_in_its_place() -> None:
    key = FileKey(KEK)
    sealed = key.seal(b"sixteen bytes ..", launch_id=LAUNCH, column="tek")
    assert key.unseal(sealed, launch_id=LAUNCH, column="tek") == b"sixteen bytes .."
    assert b"sixteen" not in sealed
    assert sealed[0] == 1
    assert sealed[1:9] == key.key_id


def test_the_same_secret_never_looks_the_same() -> None:
    key = FileKey(KEK)
    assert len({key.seal(b"secret", launch_id=LAUNCH, column="tek") for _ in range(100)}) == 100


@pytest.mark.parametrize(("launch_id", "column"), [(uuid4(), "tek"), (LAUNCH, "tik")])
def test_a_sealed_secret_opens_nowhere_else(launch_id: UUID, column: str) -> None:
    key = FileKey(KEK)
    sealed = key.seal(b"secret", launch_id=LAUNCH, column="tek")
    with pytest.raises(Unavailable, match="does not open"):
        key.unseal(sealed, launch_id=launch_id, column=column)


def test_another_key_is_named_as_such() -> None:
    sealed = FileKey(KEK).seal(b"secret", launch_id=LAUNCH, column="tek")
    with pytest.raises(Unavailable, match="under another key file"):
        FileKey(KEK[::-1]).unseal(sealed, launch_id=LAUNCH, column="tek")


@given(st.data())
def test_any_changed_byte_is_found(data: st.DataObject) -> None:
    key = FileKey(KEK)
    sealed = bytearray(key.seal(b"secret", launch_id=LAUNCH, column="tek"))
    sealed[data.draw(st.integers(0, len(sealed) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(Unavailable):
        key.unseal(bytes(sealed), launch_id=LAUNCH, column="tek")


@given(st.binary(max_size=80))
def test_any_bytes_are_refused_and_nothing_else_is_raised(sealed: bytes) -> None:
    with pytest.raises(Unavailable):
        FileKey(KEK).unseal(sealed, launch_id=LAUNCH, column="tek")


def test_the_key_never_shows() -> None:
    key = FileKey(KEK)
    assert KEK.hex() not in repr(key)
    assert key.key_id not in KEK
    with pytest.raises(InvalidInput) as caught:
        FileKey(b"K" * 31)
    assert "KKK" not in str(caught.value)


@pytest.mark.parametrize("kek", [b"", bytes(31), bytes(33), bytes(32)])
def test_a_key_of_another_size_or_of_zeros_is_refused(kek: bytes) -> None:
    with pytest.raises(InvalidInput):
        FileKey(kek)


def test_a_key_file_is_made_for_its_owner_and_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "kek.bin"
    previous = os.umask(0)
    try:
        write_key_file(path)
    finally:
        os.umask(previous)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    content = path.read_bytes()
    assert len(content) == 32
    with pytest.raises(InvalidInput, match="never overwritten"):
        write_key_file(path)
    assert path.read_bytes() == content
    assert read_key_file(path).key_id == FileKey(content).key_id


def test_a_key_file_in_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput):
        write_key_file(tmp_path / "no" / "kek.bin")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o660])
def test_a_key_file_that_others_can_use_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "kek.bin"
    write_key_file(path)
    path.chmod(mode)
    with pytest.raises(InvalidInput, match="can be used by others"):
        read_key_file(path)


def test_a_key_file_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "kek.bin"
    write_key_file(path)
    if path.stat().st_uid == 0:
        os.chown(path, 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(InvalidInput, match="belongs to another user"):
        read_key_file(path)


def test_what_is_no_key_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="No such file"):
        read_key_file(tmp_path / "none")
    with pytest.raises(InvalidInput):
        read_key_file(tmp_path)
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(InvalidInput, match="not a regular file"):
        read_key_file(tmp_path / "pipe")
    long = tmp_path / "long"
    long.write_bytes(bytes(range(33)))
    long.chmod(0o600)
    with pytest.raises(InvalidInput, match="must hold 32 bytes"):
        read_key_file(long)
