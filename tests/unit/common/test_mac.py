"""HMAC-SHA-256 as RFC 4231 and the standard library have it."""

from __future__ import annotations

import hmac

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.mac import Macs, hmac_sha256

# RFC 4231 sections 4.2, 4.3 and 4.7: key, message, MAC.
VECTORS = [
    (b"\x0b" * 20, b"Hi There", "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7"),
    (b"Jefe", b"what do ya want for nothing?", "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"),
    (
        b"\xaa" * 131,
        b"Test Using Larger Than Block-Size Key - Hash Key First",
        "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54",
    ),
]


@pytest.mark.parametrize(("key", "message", "mac"), VECTORS)
def test_the_published_macs(key: bytes, message: bytes, mac: str) -> None:
    assert hmac_sha256(key, message).hex() == mac
    assert Macs(key).of(message).hex() == mac


@given(key=st.binary(max_size=200), messages=st.lists(st.binary(max_size=200), max_size=4))
def test_no_message_leaves_anything_behind_for_the_next(key: bytes, messages: list[bytes]) -> None:
    macs = Macs(key)
    for message in messages:
        assert macs.of(message) == hmac_sha256(key, message) == hmac.digest(key, message, "sha256")


def test_another_key_or_message_has_another_mac() -> None:
    macs = {hmac_sha256(key, message) for key in (b"a", b"b") for message in (b"", b"a", b"b")}
    assert len(macs) == 6


def test_a_key_does_not_show() -> None:
    assert repr(Macs(b"seen")) == "Macs(redacted)"
