"""What the verifier signs with, what it hides chip ids behind, and what it knows its owners' documents again by.

All of it is the same for all its replicas.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import msgspec
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from common.audit.jws import ALGORITHM, COORDINATE_SIZE, base64url, key_set, thumbprint

PSEUDONYM_KEY_SIZE = 32
DOCUMENT_KEY_SIZE = 32
_PSEUDONYM_SIZE = 16
_ES256 = ec.ECDSA(hashes.SHA256())


class Signer:
    """Signs tokens with ES256: receipts and the audit log's checkpoints. `common.audit.jws` verifies them."""

    def __init__(self, key: ec.EllipticCurvePrivateKey) -> None:
        """Take over a private key on P-256.

        Raises:
            ValueError: it is on another curve.
        """
        if key.curve.name != ec.SECP256R1.name:
            raise ValueError("ES256 wants a key on P-256")
        self._key = key
        self._kid = thumbprint(key.public_key())
        self._header = lru_cache(maxsize=8)(self._make_header)

    @property
    def kid(self) -> str:
        """The public key's name: its thumbprint (RFC 7638), 43 characters."""
        return self._kid

    def __repr__(self) -> str:
        return f"Signer({self._kid}, redacted)"

    def sign(self, claims: Mapping[str, Any], *, typ: str) -> str:
        """A compact JWS over the claims.

        Args:
            claims: JSON values without fractions.
            typ: what kind of token it is, for its header.
        """
        text = f"{self._header(typ)}.{base64url(msgspec.json.encode(claims))}"
        r, s = decode_dss_signature(self._key.sign(text.encode("ascii"), _ES256))
        signature = r.to_bytes(COORDINATE_SIZE, "big") + s.to_bytes(COORDINATE_SIZE, "big")
        return f"{text}.{base64url(signature)}"

    def _make_header(self, typ: str) -> str:
        return base64url(msgspec.json.encode({"alg": ALGORITHM, "kid": self._kid, "typ": typ}))

    def jwks(self) -> dict[str, Any]:
        """The JWK set (RFC 7517) that verifies what this signs."""
        return key_set([self._key.public_key()])


class Pseudonyms:
    """Names for chips and their keys that only the owner can tell apart from any others.

    Chip ids and fingerprints are few enough to be guessed, so a plain hash would hide nothing.

    Attributes:
        of: the name of a chip's id or fingerprint: `chip:` and 32 hex digits; those of late are kept.
    """

    def __init__(self, key: bytes) -> None:
        """Take over the key.

        Raises:
            ValueError: it has not 32 bytes.
        """
        if len(key) != PSEUDONYM_KEY_SIZE:
            raise ValueError(f"a pseudonym key has {PSEUDONYM_KEY_SIZE} bytes")
        self._key = key
        self.of = lru_cache(maxsize=4096)(self._of)

    def __repr__(self) -> str:
        return "Pseudonyms(redacted)"

    def _of(self, value: str) -> str:
        """HMAC-SHA-256, the first 16 bytes."""
        return "chip:" + hmac.digest(self._key, value.encode(), "sha256")[:_PSEUDONYM_SIZE].hex()


class DocumentKey:
    """Makes tags that nobody makes who has the database alone."""

    def __init__(self, key: bytes) -> None:
        """Take over the key.

        Raises:
            ValueError: it has not 32 bytes.
        """
        if len(key) != DOCUMENT_KEY_SIZE:
            raise ValueError(f"a key for documents has {DOCUMENT_KEY_SIZE} bytes")
        self._key = key

    def __repr__(self) -> str:
        return "DocumentKey(redacted)"

    def tag(self, words: bytes) -> bytes:
        """HMAC-SHA-256 of some words, 32 bytes."""
        return hmac.digest(self._key, words, "sha256")
