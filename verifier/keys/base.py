"""What seals the secrets that the store keeps: a key file today, a token or a key service behind the same face."""

from __future__ import annotations

from typing import Protocol
from uuid import UUID


class SealingKey(Protocol):
    """Seals small secrets so that only the holder of the key can open them, each in its own place."""

    @property
    def key_id(self) -> bytes:
        """Names the key in every sealed blob and in the store, 8 bytes; tells nothing about it."""
        ...

    def seal(self, secret: bytes, *, launch_id: UUID, column: str) -> bytes:
        """The sealed blob of a secret that belongs into one column of one launch, and opens nowhere else."""
        ...

    def unseal(self, sealed: bytes, *, launch_id: UUID, column: str) -> bytes:
        """The secret in a sealed blob.

        Raises:
            Unavailable: the blob was sealed under another key, belongs elsewhere, or was changed; or the key is out of
                reach.
        """
        ...
