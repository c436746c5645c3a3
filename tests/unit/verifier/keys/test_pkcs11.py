"""A key file that only a token opens: made, opened, lost with the token and back with it. SoftHSM is the token."""

from __future__ import annotations

import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pkcs11
import pytest
from pkcs11 import Attribute, ObjectClass

from common.errors import InvalidInput, Reason, Unavailable
from common.private_file import write_private
from tests.support.softhsm import KEY, MISSING, SoftToken
from tests.support.token_keys import MODULE, content, make_another, path, reached, refusal, token
from verifier.keys.file import FileKey, read_key_file, write_key_file
from verifier.keys.keyring import Keyring
from verifier.keys.pkcs11 import (
    WRAPPED_SIZE,
    TokenKey,
    read_any_key_file,
    read_wrapped_key_file,
    write_wrapped_key_file,
)
from verifier.keys.token import Token

__all__ = ["content", "path", "token"]  # fixtures
pytestmark = pytest.mark.skipif(MODULE is None, reason=MISSING)


async def test_what_is_sealed_opens_with_the_token_and_not_before(token: SoftToken, path: Path) -> None:
    key = read_wrapped_key_file(path, token.settings)
    with pytest.raises(Unavailable) as caught:
        key.seal(b"secret", b"place")
    assert caught.value.reason is Reason.KEY_UNAVAILABLE
    await key.refresh()
    sealed = key.seal(b"secret", b"place")
    again = read_wrapped_key_file(path, token.settings)
    await again.refresh()
    assert again.unseal(sealed, b"place") == b"secret"
    assert again.key_id == key.key_id == sealed[1:9]
    with pytest.raises(Unavailable, match="does not open"):
        again.unseal(sealed, b"elsewhere")


async def test_the_file_has_the_form_that_the_page_gives(token: SoftToken, path: Path, content: bytes) -> None:
    """Opened once more with python-pkcs11 alone, and sealed with the 32 bytes that come out."""
    assert (len(content), content[0]) == (WRAPPED_SIZE, 1)

    def unwrap(session: Any) -> bytes:
        found = session.get_key(object_class=ObjectClass.SECRET_KEY, label=KEY)
        assert not found[Attribute.EXTRACTABLE]
        assert found[Attribute.SENSITIVE]
        with pytest.raises(pkcs11.AttributeSensitive):
            found[Attribute.VALUE]
        parameters = pkcs11.GCMParams(content[9:21], content[:9])
        return bytes(found.decrypt(content[21:], mechanism=pkcs11.Mechanism.AES_GCM, mechanism_param=parameters))

    kek = reached(token.settings, unwrap)
    assert len(kek) == 32
    assert kek not in content
    assert FileKey(kek).key_id == content[1:9]
    key = read_wrapped_key_file(path, token.settings)
    await key.refresh()
    assert FileKey(kek).unseal(key.seal(b"secret", b"place"), b"place") == b"secret"
    assert kek.hex() not in repr(key)


async def test_a_pulled_token_is_missed_when_the_kept_key_runs_out_and_welcome_when_it_is_back(
    token: SoftToken, content: bytes
) -> None:
    now = 1000.0
    key = TokenKey(content, Token(token.settings), keep=60, monotonic=lambda: now)
    await key.refresh()
    sealed = key.seal(b"secret", b"place")
    token.pull()
    assert "is not there" in (await refusal(key)).message
    now += 59.9
    assert key.unseal(sealed, b"place") == b"secret"
    now += 0.1
    with pytest.raises(Unavailable) as caught:
        key.unseal(sealed, b"place")
    assert caught.value.reason is Reason.KEY_UNAVAILABLE
    with pytest.raises(Unavailable):
        key.seal(b"secret", b"place")
    token.put_back()
    await key.refresh()
    assert key.unseal(sealed, b"place") == b"secret"


async def test_a_token_folder_that_is_gone_altogether_comes_back_too(token: SoftToken, path: Path) -> None:
    key = read_wrapped_key_file(path, token.settings)
    token.pull()
    (token.folder / "tokens").rmdir()
    for _ in range(3):
        assert "does not do it" in (await refusal(key)).message
    (token.folder / "tokens").mkdir()
    token.put_back()
    await key.refresh()
    assert key.seal(b"secret", b"place")


async def test_a_key_that_was_deleted_in_the_token_is_named(token: SoftToken, path: Path) -> None:
    key = read_wrapped_key_file(path, token.settings)
    reached(token.settings, lambda session: session.get_key(label=KEY).destroy())
    assert f"has no AES key {KEY}" in (await refusal(key)).message
    make_another(token)  # of the same name: it opens nothing
    assert "does not do it" in (await refusal(key)).message
    make_another(token)
    assert f"has 2 AES keys {KEY}" in (await refusal(key)).message


async def test_a_library_that_is_not_there_is_a_key_out_of_reach(token: SoftToken, path: Path, tmp_path: Path) -> None:
    module = tmp_path / "none.so"
    key = read_wrapped_key_file(path, replace(token.settings, module=module))
    assert (await refusal(key)).message == f"pkcs11.module: {module}: no such file or directory"
    module.write_text("no library")
    assert (await refusal(key)).message == f"pkcs11.module: {module}: is no PKCS#11 library"
    await read_wrapped_key_file(path, token.settings).refresh()


async def test_a_changed_key_file_does_not_open(token: SoftToken, content: bytes) -> None:
    for at in range(1, WRAPPED_SIZE):
        changed = bytearray(content)
        changed[at] ^= 1
        await refusal(TokenKey(bytes(changed), Token(token.settings), keep=60))
    await TokenKey(content, Token(token.settings), keep=60).refresh()


@pytest.mark.parametrize(
    "change", [lambda _: b"", lambda data: data[:-1], lambda data: b"\x02" + data[1:]], ids=range(3)
)
def test_what_is_no_wrapped_key_is_refused(token: SoftToken, path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(InvalidInput, match="is not a key of 69 bytes"):
        read_wrapped_key_file(path, token.settings)


def test_plain_and_wrapped_key_files_are_not_taken_for_each_other(token: SoftToken, path: Path) -> None:
    with pytest.raises(InvalidInput, match="must hold 32 bytes"):
        read_key_file(path)
    write_key_file(path.with_name("plain"))
    with pytest.raises(InvalidInput, match="is not a key of 69 bytes"):
        read_wrapped_key_file(path.with_name("plain"), token.settings)


async def test_on_the_way_into_a_token_plain_and_wrapped_key_files_are_open_at_once(
    token: SoftToken, path: Path, tmp_path: Path
) -> None:
    write_key_file(tmp_path / "plain")
    plain, wrapped = (read_any_key_file(each, token.settings) for each in (tmp_path / "plain", path))
    assert isinstance(wrapped, TokenKey)
    await wrapped.refresh()
    ring = Keyring(wrapped, [plain])
    assert ring.unseal(plain.seal(b"secret", b"place"), b"place") == b"secret"
    assert ring.unseal(ring.seal(b"secret", b"place"), b"place") == b"secret"
    write_private(tmp_path / "neither", bytes(33))
    with pytest.raises(InvalidInput, match="is not a key of 69 bytes"):
        read_any_key_file(tmp_path / "neither", token.settings)


def test_keygen_makes_a_key_only_when_asked_and_overwrites_nothing(token: SoftToken, tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="has no AES key "):
        write_wrapped_key_file(tmp_path / "kek", token.settings)
    assert not (tmp_path / "kek").exists()
    key_id = write_wrapped_key_file(tmp_path / "kek", token.settings, make_key=True)
    assert (tmp_path / "kek").read_bytes()[1:9] == key_id
    assert stat.S_IMODE((tmp_path / "kek").stat().st_mode) == 0o600
    assert write_wrapped_key_file(tmp_path / "second", token.settings, make_key=True) != key_id  # with the same key
    assert len(reached(token.settings, lambda session: list(session.get_objects({Attribute.LABEL: KEY})))) == 1
    with pytest.raises(InvalidInput, match="never overwritten"):
        write_wrapped_key_file(tmp_path / "kek", token.settings)


def test_a_key_that_could_leave_the_token_wraps_nothing(token: SoftToken, tmp_path: Path) -> None:
    make_another(token, extractable=True)
    with pytest.raises(InvalidInput, match="cannot leave the token"):
        write_wrapped_key_file(tmp_path / "kek", token.settings, make_key=True)
    assert not (tmp_path / "kek").exists()


def test_without_python_pkcs11_the_extra_is_named(
    token: SoftToken, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pkcs11", None)
    with pytest.raises(InvalidInput, match=r"pkcs11: needs the extra sevattest\[pkcs11\]$") as caught:
        read_wrapped_key_file(path, token.settings)
    assert "sevattest[pkcs11]" in caught.value.fields["hint"]
