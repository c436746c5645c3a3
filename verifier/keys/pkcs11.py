"""A sealing key whose key file only opens inside of a PKCS#11 token.

Wrapped key file, 69 bytes: version u8 = 1 ‖ key id 8 ‖ nonce 12 ‖ AES-256-GCM ciphertext 32 and tag 16, under a key
that never leaves the token; associated data: version ‖ key id. What it opens to is a KEK as in `verifier.keys.file`,
with that key id, so blobs do not tell how their key is kept.

The token is asked from a thread of its own and never from the event loop: a chore (`keep_fresh`) asks again when half
of `keep` is over, so a token that answers is never waited for. One that does not leaves the kept key to run out; then
sealing and unsealing end with KEY_UNAVAILABLE until it answers again. `keep` is how long a verifier works on without
its token, and how long it takes until pulling the token stops it.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import NoReturn

from common.errors import InvalidInput, Reason, SevattestError, Unavailable
from common.private_file import write_private
from common.telemetry.log import Log
from verifier.keys.base import SealingKey
from verifier.keys.file import KEK_SIZE, KEY_FILE_HINT, KEY_ID_SIZE, FileKey, named, read_private_file
from verifier.keys.token import Pkcs11Settings, Token

_VERSION = 1
_NONCE_SIZE = 12
_TAG_SIZE = 16
_ASSOCIATED_SIZE = 1 + KEY_ID_SIZE
_HEADER_SIZE = _ASSOCIATED_SIZE + _NONCE_SIZE
WRAPPED_SIZE = _HEADER_SIZE + KEK_SIZE + _TAG_SIZE
PATIENCE_S = 10.0  # that a token may take to answer
_HINT = "sev-verifier keygen FILE --config FILE makes one"
RETRY_S = 2.0  # between two questions to a token that does not


class TokenKey:
    """The `SealingKey` over a wrapped key file and the token that opens it."""

    def __init__(
        self,
        wrapped: bytes,
        token: Token,
        *,
        keep: float,
        random: Callable[[int], bytes] = os.urandom,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take the file's content; the token is not asked yet, see `refresh`.

        Raises:
            InvalidInput: the content is no wrapped key (INVALID_CONFIGURATION).
        """
        if len(wrapped) != WRAPPED_SIZE or wrapped[0] != _VERSION:
            raise InvalidInput(
                Reason.INVALID_CONFIGURATION,
                f"is not a key of {WRAPPED_SIZE} bytes that a token wrapped",
                hint=_HINT,
            )
        self._wrapped = wrapped
        self._token = token
        self._keep = keep
        self._random = random
        self._monotonic = monotonic
        self._kept: tuple[FileKey, float] | None = None  # and until when
        self._asking: Future[FileKey] | None = None

    @property
    def key_id(self) -> bytes:
        """See `SealingKey`; known without the token."""
        return self._wrapped[1:_ASSOCIATED_SIZE]

    def __repr__(self) -> str:
        return f"TokenKey({self.key_id.hex()}, redacted)"

    @property
    def wrapped(self) -> bytes:
        """The file's content: only the token opens it."""
        return self._wrapped

    def seal(self, secret: bytes, place: bytes) -> bytes:
        """See `SealingKey`."""
        return self._key().seal(secret, place)

    def unseal(self, sealed: bytes, place: bytes) -> bytes:
        """See `SealingKey`."""
        return self._key().unseal(sealed, place)

    def _key(self) -> FileKey:
        if self._kept is not None:
            key, until = self._kept
            if self._monotonic() < until:
                return key
            self._kept = None
        # Callers read it: what is wrong with which token, and where its PIN lies, is in the owner's log (`keep_fresh`).
        raise Unavailable(Reason.KEY_UNAVAILABLE, "the sealing key is out of reach")

    async def refresh(self) -> None:
        """Ask the token, in a thread, and keep the key for `keep` seconds from now.

        Raises:
            Unavailable: it is gone, locked, refuses or does not answer (KEY_UNAVAILABLE); a key that is kept stays
                until its time is over.
        """
        asked = self._monotonic()
        if self._asking is None or self._asking.done():  # one that hangs is not asked a second time beside it
            self._asking = _in_a_thread(self._open)
        try:
            async with asyncio.timeout(PATIENCE_S):
                key = await asyncio.shield(asyncio.wrap_future(self._asking))
        except TimeoutError:
            raise Unavailable(Reason.KEY_UNAVAILABLE, "the key token does not answer") from None
        self._kept = (key, asked + self._keep)

    async def keep_fresh(self, log: Log) -> NoReturn:
        """Refresh for ever; says when the token is lost and when it is back."""
        lost = False
        while True:
            try:
                await self.refresh()
            except SevattestError as error:
                if not lost:
                    log.warning("keys.token_lost", sealing=self.key_id.hex(), text=error.message, keep=self._keep)
                lost = True
            else:
                if lost:
                    log.warning("keys.token_back", sealing=self.key_id.hex())
                lost = False
            await asyncio.sleep(min(RETRY_S, self._keep / 4) if lost else self._keep / 2)

    def _open(self) -> FileKey:
        wrapped = self._wrapped
        kek = self._token.decrypt(
            wrapped[_ASSOCIATED_SIZE:_HEADER_SIZE], wrapped[:_ASSOCIATED_SIZE], wrapped[_HEADER_SIZE:]
        )
        try:
            key = FileKey(kek, self._random)
        except InvalidInput:
            key = None
        if key is None or key.key_id != self.key_id:
            raise Unavailable(Reason.KEY_UNAVAILABLE, "the key token opens the key file to another key")
        return key


def _in_a_thread(ask: Callable[[], FileKey]) -> Future[FileKey]:
    """Call in a thread that no exit of the process waits for: a token's library may hang for ever."""
    future: Future[FileKey] = Future()

    def run() -> None:
        try:
            key = ask()
        except BaseException as error:  # noqa: BLE001 -- whatever it is, it is the asker's
            future.set_exception(error)
        else:
            future.set_result(key)

    threading.Thread(target=run, name="key-token", daemon=True).start()
    return future


def read_wrapped_key_file(path: Path, settings: Pkcs11Settings) -> TokenKey:
    """The key in a wrapped key file; the token is not asked yet.

    Raises:
        InvalidInput: there is no such file, others can use it, it is no wrapped key, or python-pkcs11 is not installed.
    """
    wrapped = read_private_file(path, setting="key_file", limit=WRAPPED_SIZE, hint=KEY_FILE_HINT)
    return named(path, lambda: TokenKey(wrapped, Token(settings), keep=settings.keep))


def read_any_key_file(path: Path, settings: Pkcs11Settings) -> SealingKey:
    """The key in a key file, plain or wrapped, as its size says: on the way from the one to the other, both are open.

    Raises:
        InvalidInput: there is no such file, others can use it, or it is neither.
    """
    content = read_private_file(path, setting="key_file", limit=WRAPPED_SIZE, hint=KEY_FILE_HINT)
    if len(content) == KEK_SIZE:
        return named(path, lambda: FileKey(content))
    return named(path, lambda: TokenKey(content, Token(settings), keep=settings.keep))


def write_wrapped_key_file(path: Path, settings: Pkcs11Settings, *, make_key: bool = False) -> bytes:
    """Make a key file of 32 random bytes that only the token can open; an existing file is never touched.

    Args:
        path: the file, mode 0600.
        settings: the token and the key in it.
        make_key: make the key in the token where there is none.

    Returns:
        The id of the new key, 8 bytes.

    Raises:
        InvalidInput: there is a file already, it cannot be made, or the key could leave the token.
        Unavailable: the token is gone, locked or refuses, or has no such key (KEY_UNAVAILABLE).
    """
    kek = os.urandom(KEK_SIZE)
    key_id = FileKey(kek).key_id
    associated, nonce = bytes((_VERSION,)) + key_id, os.urandom(_NONCE_SIZE)
    sealed = Token(settings).encrypt(nonce, associated, kek, make_key=make_key)
    write_private(path, associated + nonce + sealed)
    return key_id
