"""Re-wrapping: what is sealed under an older key is sealed again under the one that seals now, while serving.

Each blob moves by itself, by compare-and-set in the store: a crash anywhere leaves every blob under one key or the
other, and both open. A launch that ends meanwhile takes its blobs with it. Replicas may do it at the same time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol
from uuid import UUID

from common.errors import Reason, Unavailable
from common.telemetry.log import Log
from verifier.keys.base import identity_place, launch_place, secret_place
from verifier.keys.file import sealing_key_id
from verifier.keys.keyring import Keyring


class Blob(Protocol):
    """A sealed blob and where the store has it."""

    @property
    def place(self) -> tuple[str, ...]:
        """`launch`, launch id, column; or `secret`, name, version; or `identity`, name."""
        ...

    @property
    def sealed(self) -> bytes:
        """The blob."""
        ...


class BlobStore(Protocol):
    """What re-wrapping asks of a store (`verifier.store.base.Store` has it)."""

    async def sealed_under_others(self, key_id: bytes, /, limit: int) -> Sequence[Blob]:
        """Sealed blobs under other keys than `key_id`."""
        ...

    async def reseal(self, place: tuple[str, ...], old: bytes, new: bytes) -> bool:
        """Put another blob in place of `old`, if it is still there; whether it was."""
        ...


class Rewrap:
    """Moves blobs to the key that seals. What it cannot open is said once and left where it is."""

    def __init__(self, store: BlobStore, keyring: Keyring, log: Log) -> None:
        """Take the means."""
        self._store = store
        self._keyring = keyring
        self._log = log
        self._unknown: set[bytes] = set()
        self._broken: set[tuple[str, ...]] = set()

    async def some(self, limit: int) -> int:
        """Move up to `limit` blobs; how many were moved. 0 says that nothing is left to do, or possible.

        Raises:
            Unavailable: the store has no answer (STORE_UNAVAILABLE), or a key is out of reach (KEY_UNAVAILABLE); what
                was moved until then stays moved.
        """
        moved = 0
        while not moved:
            broken = len(self._broken)
            for blob in await self._movable(limit):
                opened = self._opened(blob)
                if opened is None:
                    continue
                secret, place = opened
                moved += await self._store.reseal(blob.place, blob.sealed, self._keyring.seal(secret, place))
            if len(self._broken) == broken:
                break  # nobody was in the way: there is nothing else
        return moved

    async def _movable(self, limit: int) -> Sequence[Blob]:
        # Blobs that stay where they are come first in every answer, so more is asked for until others show.
        asked = limit
        while True:
            blobs = await self._store.sealed_under_others(self._keyring.key_id, asked)
            movable = [blob for blob in blobs if blob.place not in self._broken and self._known(blob)]
            if movable or len(blobs) < asked:
                return movable[:limit]
            asked *= 2

    def _known(self, blob: Blob) -> bool:
        try:
            key_id = sealing_key_id(blob.sealed)
        except Unavailable as error:
            return self._left(blob, error)
        if key_id in self._keyring.key_ids:
            return True
        if key_id not in self._unknown:
            self._unknown.add(key_id)
            self._log.warning(
                "keys.unknown", sealing=key_id.hex(), text="sealed under a key that is not configured: left"
            )
        return False

    def _opened(self, blob: Blob) -> tuple[bytes, bytes] | None:
        try:
            place = place_bytes(blob.place)
            return self._keyring.unseal(blob.sealed, place), place
        except Unavailable as error:
            if error.reason is Reason.KEY_UNAVAILABLE:
                raise
            self._left(blob, error)
            return None

    def _left(self, blob: Blob, error: Unavailable) -> bool:
        self._broken.add(blob.place)
        self._log.warning("keys.not_moved", place="/".join(blob.place), text=error.message)
        return False


def place_bytes(place: tuple[str, ...]) -> bytes:
    """The place that a blob is bound to, from where the store has it.

    Raises:
        Unavailable: this version knows no such place (STORE_UNAVAILABLE).
    """
    try:
        match place:
            case ("launch", launch_id, column):
                return launch_place(UUID(launch_id), column)
            case ("secret", name, version):
                return secret_place(name, int(version))
            case ("identity", name):
                return identity_place(name)
    except (ValueError, OverflowError):
        pass
    raise Unavailable(Reason.STORE_UNAVAILABLE, "a sealed secret is in a place that this version does not know")
