"""A sealing key from a file of 32 random bytes (the key-encryption key, KEK).

Sealed blob: version u8 = 1 ‖ key id 8 ‖ nonce 12 ‖ AES-256-GCM ciphertext and tag. Each place (`verifier.keys.base`)
has a key of its own, HKDF-SHA-256(KEK, info = "sevattest row" ‖ place), so no key ever sees more than a few blobs and
random nonces do not run out. Associated data: "sevattest" ‖ version ‖ key id ‖ place: who can write to the database
can move no blob to another row, column or format.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from common.errors import InvalidInput, Reason, Unavailable
from common.mac import Macs, hmac_sha256
from common.private_file import write_private

KEK_SIZE = 32
KEY_ID_SIZE = 8
_VERSION = 1
_NONCE_SIZE = 12
_TAG_SIZE = 16
_HASH_SIZE = 32
_HEADER_SIZE = 1 + KEY_ID_SIZE + _NONCE_SIZE
_Key = TypeVar("_Key")


class FileKey:
    """The `SealingKey` over 32 bytes that were read from a file."""

    def __init__(self, kek: bytes, random: Callable[[int], bytes] = os.urandom) -> None:
        """Take over the key-encryption key.

        Raises:
            InvalidInput: it has another size, or is all zero.
        """
        if len(kek) != KEK_SIZE:
            raise InvalidInput(
                Reason.INVALID_CONFIGURATION, f"must hold {KEK_SIZE} bytes, not {len(kek)}", hint=KEY_FILE_HINT
            )
        if not any(kek):
            raise InvalidInput(Reason.INVALID_CONFIGURATION, "is all zero", hint=KEY_FILE_HINT)
        # HKDF (RFC 5869) begins with the same step for all places: without a salt, an HMAC under zeros.
        self._macs = Macs(hmac_sha256(bytes(_HASH_SIZE), kek))
        self._random = random
        self._key_id = self._derive(b"sevattest key id")[:KEY_ID_SIZE]

    @property
    def key_id(self) -> bytes:
        """See `SealingKey`."""
        return self._key_id

    def __repr__(self) -> str:
        return f"FileKey({self._key_id.hex()}, redacted)"

    def _derive(self, info: bytes) -> bytes:
        """HKDF-SHA-256(KEK, info), the one block of 32 bytes."""
        return self._macs.of(info + b"\1")

    def _place(self, place: bytes) -> tuple[AESGCM, bytes]:
        return (
            AESGCM(self._derive(b"sevattest row" + place)),
            b"sevattest" + bytes((_VERSION,)) + self._key_id + place,
        )

    def seal(self, secret: bytes, place: bytes) -> bytes:
        """See `SealingKey`."""
        cipher, associated = self._place(place)
        nonce = self._random(_NONCE_SIZE)
        return bytes((_VERSION,)) + self._key_id + nonce + cipher.encrypt(nonce, secret, associated)

    def unseal(self, sealed: bytes, place: bytes) -> bytes:
        """See `SealingKey`."""
        if sealing_key_id(sealed) != self._key_id:
            raise Unavailable(Reason.STORE_UNAVAILABLE, "a sealed secret was sealed under another key file")
        cipher, associated = self._place(place)
        try:
            return cipher.decrypt(sealed[1 + KEY_ID_SIZE : _HEADER_SIZE], sealed[_HEADER_SIZE:], associated)
        except InvalidTag:
            raise Unavailable(
                Reason.STORE_UNAVAILABLE, "a sealed secret does not open: the store was changed"
            ) from None


def sealing_key_id(sealed: bytes) -> bytes:
    """The id of the key that a blob was sealed under, 8 bytes.

    Raises:
        Unavailable: the blob is in no form that this version knows (STORE_UNAVAILABLE).
    """
    if len(sealed) < _HEADER_SIZE + _TAG_SIZE or sealed[0] != _VERSION:
        raise Unavailable(Reason.STORE_UNAVAILABLE, "a sealed secret is not in a form that this version knows")
    return sealed[1 : 1 + KEY_ID_SIZE]


# Whoever misses a key must look for its copy first: a new one opens nothing.
KEY_FILE_HINT = "put it back from its copy; only where nothing is stored yet, sev-verifier keygen makes a new one"


def read_key_file(path: Path) -> FileKey:
    """The key in a file that belongs to us (or to root) and that nobody else can read.

    Raises:
        InvalidInput: there is no such file, others can read it, or it does not hold 32 bytes.
    """
    content = read_private_file(path, setting="key_file", limit=KEK_SIZE, hint=KEY_FILE_HINT)
    return named(path, lambda: FileKey(content))


def named(path: Path, make: Callable[[], _Key]) -> _Key:
    """The key that `make` makes of a key file's content.

    Raises:
        InvalidInput: what `make` raised, naming the file.
    """
    try:
        return make()
    except InvalidInput as error:
        raise InvalidInput(error.reason, f"key_file: {path} {error.message}", **error.fields) from error


def write_key_file(path: Path) -> bytes:
    """Make a key file of 32 random bytes, mode 0600; an existing file is never touched.

    Returns:
        The id of the new key, 8 bytes.

    Raises:
        InvalidInput: there is a file already, or it cannot be made; nothing is left behind.
    """
    kek = os.urandom(KEK_SIZE)
    write_private(path, kek)
    return FileKey(kek).key_id


def read_private_file(path: Path, *, setting: str, limit: int, hint: str) -> bytes:
    """A file that belongs to us (or to root) and that nobody else can use; one byte more than `limit` at the most.

    Args:
        path: the file.
        setting: what the configuration calls it.
        limit: bytes that it may have.
        hint: how to make such a file.

    Raises:
        InvalidInput: there is no such file, or others can use it.
    """

    def unusable(why: str, **fields: str) -> InvalidInput:
        return InvalidInput(Reason.INVALID_CONFIGURATION, f"{setting}: {path}{why}", **fields)

    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise unusable(f": {error.strerror}", hint=hint) from error
    try:
        status = os.fstat(fd)
        mode = stat.S_IMODE(status.st_mode)
        if not stat.S_ISREG(status.st_mode):
            raise unusable(" is not a regular file")
        if status.st_uid not in (os.geteuid(), 0):
            raise unusable(" belongs to another user")
        if mode & 0o077:
            raise unusable(f" can be used by others (mode {mode:04o})", hint=f"chmod 0400 {path}")
        return os.read(fd, limit + 1)
    except OSError as error:
        raise unusable(f": {error.strerror}") from error
    finally:
        os.close(fd)
