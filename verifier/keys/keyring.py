"""Several sealing keys as one: one seals, all of them open. That is how one key gives way to the next while serving."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from common.errors import InvalidInput, Reason, Unavailable
from verifier.keys.base import SealingKey
from verifier.keys.file import sealing_key_id


@dataclass(frozen=True)
class _Keys:
    sealing: SealingKey
    by_id: dict[bytes, SealingKey]


class Keyring:
    """The `SealingKey` that opens what any of its keys sealed, and seals under one of them."""

    def __init__(self, sealing: SealingKey, others: Iterable[SealingKey] = ()) -> None:
        """Take the key that seals and those that only open.

        Raises:
            InvalidInput: two of them are the same key.
        """
        self._keys = _collect(sealing, others)

    def reload(self, sealing: SealingKey, others: Iterable[SealingKey] = ()) -> None:
        """Put other keys in place of all, at once: no call sees half of them.

        Raises:
            InvalidInput: two of them are the same key; the keys stay what they were.
        """
        self._keys = _collect(sealing, others)

    @property
    def key_id(self) -> bytes:
        """The id of the key that seals; see `SealingKey`."""
        return self._keys.sealing.key_id

    @property
    def key_ids(self) -> frozenset[bytes]:
        """The ids of all keys: what the store holds under others can be opened by nobody here."""
        return frozenset(self._keys.by_id)

    def __repr__(self) -> str:
        others = sorted(key.hex() for key in self.key_ids - {self.key_id})
        return f"Keyring({self.key_id.hex()}, opens {others}, redacted)"

    def seal(self, secret: bytes, place: bytes) -> bytes:
        """See `SealingKey`."""
        return self._keys.sealing.seal(secret, place)

    def unseal(self, sealed: bytes, place: bytes) -> bytes:
        """See `SealingKey`."""
        key_id = sealing_key_id(sealed)
        key = self._keys.by_id.get(key_id)
        if key is None:
            raise Unavailable(
                Reason.STORE_UNAVAILABLE, f"a sealed secret was sealed under another key file ({key_id.hex()})"
            )
        return key.unseal(sealed, place)


def _collect(sealing: SealingKey, others: Iterable[SealingKey]) -> _Keys:
    by_id = {sealing.key_id: sealing}
    for key in others:
        if key.key_id in by_id:
            raise InvalidInput(
                Reason.INVALID_CONFIGURATION, f"key_file: the key {key.key_id.hex()} is named more than once"
            )
        by_id[key.key_id] = key
    return _Keys(sealing=sealing, by_id=by_id)
