"""HMAC-SHA-256 (RFC 2104).

By the library that all other cryptography here comes from: the standard library's has OpenSSL look the algorithm up
for each message, which takes longer than the short messages of a launch themselves.
"""

from __future__ import annotations

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.hmac import HMAC

_SHA256 = hashes.SHA256()


def hmac_sha256(key: bytes, message: bytes) -> bytes:
    """The MAC of one message, 32 bytes."""
    mac = HMAC(key, _SHA256)
    mac.update(message)
    return mac.finalize()


class Macs:
    """The MACs of many messages under one key, which is prepared once."""

    def __init__(self, key: bytes) -> None:
        """Take over the key."""
        self._empty = HMAC(key, _SHA256)

    def __repr__(self) -> str:
        return "Macs(redacted)"

    def of(self, message: bytes) -> bytes:
        """The MAC of one message, 32 bytes."""
        mac = self._empty.copy()
        mac.update(message)
        return mac.finalize()
