"""Secrets that the owner put into the verifier's store, sealed to their name and version."""

from __future__ import annotations

import asyncio
from typing import ClassVar, Protocol

from verifier.documents.sources import StoredSource
from verifier.keys.base import SealingKey, secret_place
from verifier.secrets.base import no_answer
from verifier.store.rows import StoredSecret


class SecretRows(Protocol):
    """What is asked of the store; `verifier.store.base.Store` is this."""

    async def secret(self, name: str, version: int | None) -> StoredSecret | None:
        """One version of a secret, or the newest."""
        ...


class StoredSecrets:
    """Asks the store. What it answers is believed as far as it opens: a row in another's place does not."""

    waits: ClassVar[bool] = True

    def __init__(self, store: SecretRows, sealing: SealingKey) -> None:
        """Take the store and the key that opens its blobs."""
        self._store = store
        self._sealing = sealing

    async def size(self, source: StoredSource) -> int:
        """See `Asked`; the store's word, without opening the secret."""
        return (await self._row(source)).size

    async def read(self, source: StoredSource) -> bytes:
        """See `Asked`."""
        row = await self._row(source)
        # By the name that was asked for, never by the row's own.
        version = row.version if source.version is None else source.version
        # In a thread: a key in a token may take its time.
        return await asyncio.to_thread(self._sealing.unseal, row.sealed, secret_place(source.name, version))

    async def _row(self, source: StoredSource) -> StoredSecret:
        row = await self._store.secret(source.name, source.version)
        if row is None:
            raise no_answer("is not in the store")
        return row
