"""What of a serving verifier is exchanged at SIGHUP and by owners: its sealing keys, and the chips that are denied."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from contextlib import suppress
from typing import Any

from common.errors import InvalidInput, Reason
from common.telemetry.log import Log
from verifier import parts
from verifier.appraisal.revoked import join
from verifier.config import Config
from verifier.keys.base import SealingKey
from verifier.keys.keyring import Keyring
from verifier.keys.pkcs11 import TokenKey
from verifier.launches.platforms import DenyList
from verifier.library.documents import Documents
from verifier.store.base import Store

# Decisions wait for it when an owner revokes chips by their ids.
RESOLVE_WITHIN_S = 5.0

Spawn = Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]


class Keys:
    """The sealing keys in use.

    Attributes:
        ring: all of them as one.
        changed: set when there are others; whoever re-wraps clears it.
    """

    def __init__(self, config: Config, store: Store, log: Log, spawn: Spawn) -> None:
        """Read the key files; nothing is asked of a token yet.

        Raises:
            InvalidInput: INVALID_CONFIGURATION.
        """
        self._store, self._log, self._spawn = store, log, spawn
        self._pkcs11 = config.pkcs11
        self._keys = parts.sealing_keys(config)
        self.ring = Keyring(self._keys[0], self._keys[1:])
        self.changed = asyncio.Event()
        self._refreshers: dict[TokenKey, asyncio.Task[None]] = {}

    async def open(self) -> None:
        """Have each key opened, and see that all that is stored has its key among them.

        Raises:
            InvalidInput: something is sealed under another key (INVALID_CONFIGURATION).
            Unavailable: the token or the store has no answer.
        """
        for key in parts.token_keys(self._keys):
            await key.refresh()
        await self._require_all_that_is_stored(self._keys)

    def keep_fresh(self) -> None:
        """Have the token asked for its keys again and again, and for those no more that are not in use."""
        tokens = set(parts.token_keys(self._keys))
        for gone in self._refreshers.keys() - tokens:
            self._refreshers.pop(gone).cancel()
        for key in tokens - self._refreshers.keys():
            self._refreshers[key] = self._spawn(key.keep_fresh(self._log))

    async def reload(self, config: Config) -> None:
        """Put other keys in place, once each of them opens and all that is stored has its key among them.

        Raises:
            InvalidInput: as for `open`; the keys stay what they were.
            Unavailable: as for `open`; the keys stay what they were.
        """
        # A key that the token has opened is not asked for again, unless its file was wrapped anew or the token is
        # reached in another way: what was opened before would say nothing of how it opens from now on.
        same_token = config.pkcs11 == self._pkcs11
        known = {key.wrapped: key for key in parts.token_keys(self._keys)} if same_token else {}
        keys = tuple(
            known.get(key.wrapped, key) if isinstance(key, TokenKey) else key for key in parts.sealing_keys(config)
        )
        for key in parts.token_keys(keys):
            if key.wrapped not in known:
                await key.refresh()
        await self._require_all_that_is_stored(keys)
        self.ring.reload(keys[0], keys[1:])
        self._keys, self._pkcs11 = keys, config.pkcs11
        self.keep_fresh()
        self.changed.set()

    async def _require_all_that_is_stored(self, keys: Iterable[SealingKey]) -> None:
        known = frozenset(key.key_id for key in keys)
        strange = await self._store.sealing_keys() - known
        if strange:
            missing, given = (", ".join(sorted(key.hex() for key in some)) for some in (strange, known))
            raise InvalidInput(
                Reason.INVALID_CONFIGURATION,
                f"key_file: what is stored is sealed under another key ({missing}) than the configured {given}",
                hint="name that key file in older_key_files; it is needed until everything is sealed under the new one",
            )


class Denied:
    """The chips that the configuration or a revocation denies.

    Attributes:
        chips: the list.
        changed: set when there are new ones; whoever asks the key service about them clears it.
    """

    def __init__(self, config: Config, resolve: Callable[[frozenset[str]], Coroutine[Any, Any, object]] | None) -> None:
        """Deny what the configuration does.

        Args:
            config: the configuration.
            resolve: asks the key service for the keys behind chips' ids; None where there is none.
        """
        self.chips = DenyList()
        self.changed = asyncio.Event()
        self._resolve = resolve
        self._configured = config.platforms.denied_chips
        self._revoked: frozenset[str] = frozenset()
        self._unasked: frozenset[str] = frozenset()  # denied by their ids, and the key service was not asked yet

    def configure(self, config: Config) -> None:
        """Deny what another configuration does."""
        self._configured = config.platforms.denied_chips
        self._deny()

    async def revoke(self, documents: Documents) -> None:
        """Have the chips of the owner's revocations known by their keys too, as those of the configuration are.

        Before the documents count: a host can leave its chip's id out. What the key service does not answer in time is
        left to the chore. Who is cancelled meanwhile leaves it to whoever looks at the documents next.
        """
        self._revoked = join(documents.revocations.values()).chips
        self._deny()
        if (asked := self._unasked) and self._resolve is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(RESOLVE_WITHIN_S):
                    await self._resolve(asked)
            self._unasked -= asked  # not those that came meanwhile, of a SIGHUP

    def _deny(self) -> None:
        new = self.chips.set_owners({*self._configured, *self._revoked})
        if new:
            self._unasked |= new
            self.changed.set()
