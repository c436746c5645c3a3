"""A keyring opens what any of its keys sealed, and takes other keys all at once."""

from __future__ import annotations

import pytest

from common.errors import InvalidInput, Reason, Unavailable
from verifier.keys.file import FileKey
from verifier.keys.keyring import Keyring

OLD, NEW, OTHER = FileKey(b"o" * 32), FileKey(b"n" * 32), FileKey(b"x" * 32)


def test_one_key_seals_and_all_of_them_open() -> None:
    ring = Keyring(NEW, [OLD])
    assert ring.key_id == NEW.key_id
    assert ring.key_ids == {NEW.key_id, OLD.key_id}
    sealed = ring.seal(b"secret", b"place")
    assert NEW.unseal(sealed, b"place") == b"secret"
    assert [ring.unseal(key.seal(b"secret", b"place"), b"place") for key in (OLD, NEW)] == [b"secret"] * 2


def test_what_another_key_sealed_stays_closed_and_the_key_is_named() -> None:
    with pytest.raises(Unavailable, match=OTHER.key_id.hex()) as caught:
        Keyring(NEW, [OLD]).unseal(OTHER.seal(b"secret", b"place"), b"place")
    assert caught.value.reason is Reason.STORE_UNAVAILABLE
    with pytest.raises(Unavailable, match="not in a form"):
        Keyring(NEW).unseal(b"", b"place")
    with pytest.raises(Unavailable, match="does not open"):
        Keyring(NEW, [OLD]).unseal(OLD.seal(b"secret", b"place"), b"elsewhere")


def test_reload_puts_other_keys_in_place() -> None:
    ring = Keyring(OLD)
    sealed = ring.seal(b"secret", b"place")
    ring.reload(NEW, [OLD])
    assert ring.key_id == NEW.key_id
    assert ring.unseal(sealed, b"place") == b"secret"
    ring.reload(NEW)
    with pytest.raises(Unavailable):
        ring.unseal(sealed, b"place")


def test_a_key_that_is_named_twice_changes_nothing() -> None:
    ring = Keyring(OLD)
    with pytest.raises(InvalidInput, match="more than once"):
        ring.reload(NEW, [FileKey(b"n" * 32)])
    assert ring.key_ids == {OLD.key_id}


def test_a_keyring_shows_ids_only() -> None:
    shown = repr(Keyring(NEW, [OLD]))
    assert NEW.key_id.hex() in shown
    assert (b"n" * 32).hex() not in shown
    assert "nnnn" not in shown
