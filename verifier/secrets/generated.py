"""Secrets that are made for one launch: random bytes, or a passphrase that a person can type."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import ClassVar

from verifier.documents.sources import GeneratedSource

# RFC 4648's base32 in lower case: no letter that looks like another, the same keys on most keyboards. 32 letters are
# 5 bits each, and as 32 divides 256, every letter of a passphrase is as likely as every other.
ALPHABET = b"abcdefghijklmnopqrstuvwxyz234567"


class GeneratedSecrets:
    """Makes secrets."""

    waits: ClassVar[bool] = False

    def __init__(self, random: Callable[[int], bytes] = os.urandom) -> None:
        """Take the source of random bytes."""
        self._random = random

    async def size(self, source: GeneratedSource) -> int:
        """See `Asked`."""
        return source.size

    async def read(self, source: GeneratedSource) -> bytes:
        """See `Asked`; another secret with each call."""
        made = self._random(source.size)
        if source.form == "passphrase":
            return bytes(ALPHABET[byte % len(ALPHABET)] for byte in made)
        return made
