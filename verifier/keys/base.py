"""What seals the secrets that the store keeps: a key file, a key file inside of a token, or several in turn.

A sealed blob belongs into one place and opens nowhere else. Places are for ever: they are part of what is sealed.
"""

from __future__ import annotations

from typing import Protocol
from uuid import UUID


class SealingKey(Protocol):
    """Seals small secrets so that only the holder of the key can open them, each in its own place."""

    @property
    def key_id(self) -> bytes:
        """Names the key that seals in every sealed blob and in the store, 8 bytes; tells nothing about it."""
        ...

    def seal(self, secret: bytes, place: bytes) -> bytes:
        """The sealed blob of a secret that belongs into one place.

        Raises:
            Unavailable: the key is out of reach (KEY_UNAVAILABLE).
        """
        ...

    def unseal(self, sealed: bytes, place: bytes) -> bytes:
        """The secret in a sealed blob.

        Raises:
            Unavailable: the key is out of reach (KEY_UNAVAILABLE); or the blob was sealed under a key that is not
                known, belongs elsewhere, or was changed (STORE_UNAVAILABLE).
        """
        ...


def launch_place(launch_id: UUID, column: str) -> bytes:
    """Where a launch's `tek`, `tik` or `generated` secret belongs."""
    return launch_id.bytes + column.encode("ascii")


def secret_place(name: str, version: int) -> bytes:
    """Where one version of a stored secret belongs."""
    return b"secret\0" + name.encode() + b"\0" + version.to_bytes(8, "big")


def identity_place(name: str) -> bytes:
    """Where a key of the verifier's own belongs."""
    return b"identity\0" + name.encode("ascii")
