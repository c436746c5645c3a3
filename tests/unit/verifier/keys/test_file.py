"""The key file and what it seals: each blob opens in its own place, under its own key, or not at all."""

from __future__ import annotations

import errno
import hmac
import os
import stat
from pathlib import Path
from uuid import UUID

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import GCM
from hypothesis import given
from hypothesis import strategies as st

from common.errors import InvalidInput, Reason, Unavailable
from verifier.keys.base import identity_place, launch_place, secret_place
from verifier.keys.file import FileKey, read_key_file, write_key_file

KEK = bytes(range(32))
LAUNCH = UUID(int=7)
TEK = launch_place(LAUNCH, "tek")
ELSEWHERE = (
    launch_place(UUID(int=8), "tek"),
    launch_place(LAUNCH, "tik"),
    secret_place("tek", 7),
    identity_place("tek"),
)

KNOWN = "01ac43c5b508f718284e4e4e4e4e4e4e4e4e4e4e4ee2b94c5065a2c07dd82c86af6f8d3a15cb103efc3dd2dc571ee76cc9131e21cc"


def test_a_sealed_secret_opens_in_its_place() -> None:
    key = FileKey(KEK)
    sealed = key.seal(b"sixteen bytes ..", TEK)
    assert key.unseal(sealed, TEK) == b"sixteen bytes .."
    assert b"sixteen" not in sealed
    assert sealed[0] == 1
    assert sealed[1:9] == key.key_id


def test_the_same_secret_never_looks_the_same() -> None:
    key = FileKey(KEK)
    assert len({key.seal(b"secret", TEK) for _ in range(100)}) == 100


def test_sealing_matches_the_formulas_written_out_once_more() -> None:
    """HKDF as two HMACs (RFC 5869) and AES-256-GCM from the ciphers API: nothing of ours."""
    sealed = FileKey(KEK, random=lambda size: b"N" * size).seal(b"sixteen bytes ..", TEK)
    place = LAUNCH.bytes + b"tek"
    key_id = hkdf(b"sevattest key id")[:8]
    encryptor = Cipher(AES(hkdf(b"sevattest row" + place)), GCM(b"N" * 12)).encryptor()
    encryptor.authenticate_additional_data(b"sevattest\x01" + key_id + place)
    ciphertext = encryptor.update(b"sixteen bytes ..") + encryptor.finalize()
    assert sealed == b"\x01" + key_id + b"N" * 12 + ciphertext + encryptor.tag
    # Blobs are kept for years: this one was made by the first version that sealed.
    assert sealed.hex() == KNOWN


def hkdf(info: bytes) -> bytes:
    """RFC 5869 with no salt, one block of output."""
    key = hmac.digest(bytes(32), KEK, "sha256")
    return hmac.digest(key, info + b"\x01", "sha256")


@pytest.mark.parametrize("place", ELSEWHERE)
def test_a_sealed_secret_opens_nowhere_else(place: bytes) -> None:
    key = FileKey(KEK)
    sealed = key.seal(b"secret", TEK)
    with pytest.raises(Unavailable, match="does not open") as caught:
        key.unseal(sealed, place)
    assert caught.value.reason is Reason.STORE_UNAVAILABLE
    assert key.unseal(sealed, TEK) == b"secret"


def test_no_two_places_are_the_same() -> None:
    assert len({TEK, *ELSEWHERE, secret_place("a", 1), secret_place("a", 2), secret_place("b", 1)}) == 8


def test_another_key_is_named_as_such() -> None:
    sealed = FileKey(KEK).seal(b"secret", TEK)
    with pytest.raises(Unavailable, match="under another key file"):
        FileKey(KEK[::-1]).unseal(sealed, TEK)


@given(st.data())
def test_any_changed_byte_is_found(data: st.DataObject) -> None:
    key = FileKey(KEK)
    sealed = bytearray(key.seal(b"secret", TEK))
    sealed[data.draw(st.integers(0, len(sealed) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(Unavailable):
        key.unseal(bytes(sealed), TEK)


@given(st.binary(max_size=80))
def test_any_bytes_are_refused_and_nothing_else_is_raised(sealed: bytes) -> None:
    with pytest.raises(Unavailable):
        FileKey(KEK).unseal(sealed, TEK)


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


def test_a_key_file_for_which_there_is_no_room_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_fd: int, _data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "kek.bin"
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(InvalidInput, match=f"^{path}: no space left on device$"):
        write_key_file(path)
    assert not path.exists()
    monkeypatch.undo()
    assert write_key_file(path) == read_key_file(path).key_id


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
    with pytest.raises(InvalidInput, match="No such file") as caught:
        read_key_file(tmp_path / "none")
    # A new key would open nothing: the copy of the old one comes first.
    assert caught.value.fields["hint"].startswith("put it back from its copy")
    with pytest.raises(InvalidInput):
        read_key_file(tmp_path)
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(InvalidInput, match="not a regular file"):
        read_key_file(tmp_path / "pipe")
    long = tmp_path / "long"
    long.write_bytes(bytes(range(33)))
    long.chmod(0o600)
    with pytest.raises(InvalidInput, match=f"^key_file: {long} must hold 32 bytes, not 33$"):
        read_key_file(long)
