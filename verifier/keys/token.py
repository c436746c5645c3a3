"""What is asked of a PKCS#11 token: an AES key in it that wraps key-encryption keys and never leaves it.

Needs the extra `pkcs11` (python-pkcs11), imported when a token is first asked. All calls here block; they are for
threads and for commands. A token's library is one for the whole process, so one call at a time starts it anew, asks,
and leaves: that is what finds a token gone, and what finds it back.

A few wrong PINs lock a token for good, and a machine repeats what it does. So within a process a PIN that a token
refused is tried once, whoever asks; a start that ends with it has an exit code by which no supervisor starts it again;
and the last try that a token has left is never used, whatever was accepted before: the token counts for all processes,
replicas and restarts, and no file of ours could, since a container and replicas on a PostgreSQL keep none.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from common.errors import InvalidInput, Reason, Unavailable
from verifier.keys.file import read_private_file

if TYPE_CHECKING:
    from pkcs11 import Session

PIN_MAX = 256  # bytes of a PIN file; PKCS#11 tokens take fewer
_KEY_BITS = 256
_IN_USE = threading.Lock()
_REFUSED: set[_PinFile] = set()  # of the process, as the library is: which PINs a token refused. Guarded by `_IN_USE`.


@dataclass(frozen=True, kw_only=True)
class _PinFile:
    """A token, and the file with its PIN as it stands: whatever replaces or touches it makes another one of it."""

    module: Path
    token: str
    path: Path
    device: int
    inode: int
    modified: int
    size: int


@dataclass(frozen=True, kw_only=True)
class Pkcs11Settings:
    """Where the wrapping key is.

    Attributes:
        module: the token's library.
        token: the token's label.
        key: label of the AES key in it.
        pin_file: holds the user PIN, readable by its owner alone.
        keep: seconds that an unwrapped key may be used before the token must have been asked again.
    """

    module: Path
    token: str
    key: str
    pin_file: Path
    keep: float = 60.0


class PinRefused(Unavailable):
    """The token refuses the PIN, or has one try left: nothing is tried again before somebody has looked.

    Whatever starts a command again by itself can tell by its exit code.
    """

    exit_code = 5


class Token:
    """A token, asked for one thing at a time."""

    def __init__(self, settings: Pkcs11Settings) -> None:
        """Take note of where it is; it is not asked yet.

        Raises:
            InvalidInput: python-pkcs11 is not installed (INVALID_CONFIGURATION).
        """
        _pkcs11()
        self._settings = settings

    def decrypt(self, nonce: bytes, associated: bytes, sealed: bytes) -> bytes:
        """Open what `encrypt` sealed.

        Raises:
            Unavailable: the token or its key is gone, locked or does not open it (KEY_UNAVAILABLE); `PinRefused`
                where it refuses the PIN.
        """
        from pkcs11 import Mechanism  # noqa: PLC0415 -- an extra
        from pkcs11.mechanisms import GCMParams  # noqa: PLC0415 -- an extra

        with self._session() as session:
            parameters = GCMParams(nonce, associated)
            return bytes(self._key(session).decrypt(sealed, mechanism=Mechanism.AES_GCM, mechanism_param=parameters))

    def encrypt(self, nonce: bytes, associated: bytes, secret: bytes, *, make_key: bool) -> bytes:
        """Seal with AES-256-GCM under the key in the token; ciphertext and 16 bytes of tag.

        Args:
            nonce: 12 bytes, never used before.
            associated: what belongs to it.
            secret: what to seal.
            make_key: make the key where there is none.

        Raises:
            Unavailable: the token or its key is gone or locked (KEY_UNAVAILABLE); `PinRefused` as in `decrypt`.
            InvalidInput: the key can be taken out of the token (INVALID_CONFIGURATION).
        """
        from pkcs11 import Attribute, KeyType, Mechanism, MechanismFlag  # noqa: PLC0415 -- an extra
        from pkcs11.mechanisms import GCMParams  # noqa: PLC0415 -- an extra

        with self._session(rw=make_key) as session:
            if make_key and not self._keys(session):
                session.generate_key(
                    KeyType.AES,
                    _KEY_BITS,
                    label=self._settings.key,
                    store=True,
                    capabilities=MechanismFlag.ENCRYPT | MechanismFlag.DECRYPT,
                    template={Attribute.SENSITIVE: True, Attribute.EXTRACTABLE: False},
                )
            key = self._key(session)
            if key[Attribute.EXTRACTABLE] or not key[Attribute.SENSITIVE] or key.key_length != _KEY_BITS:
                raise InvalidInput(
                    Reason.INVALID_CONFIGURATION,
                    f"the key {self._settings.key} is not an AES-256 key that cannot leave the token",
                    hint="--make-key makes one under a label that is free",
                )
            parameters = GCMParams(nonce, associated)
            return bytes(key.encrypt(secret, mechanism=Mechanism.AES_GCM, mechanism_param=parameters))

    def _key(self, session: Session) -> Any:
        keys = self._keys(session)
        if len(keys) != 1:
            raise self._away(f"has {f'{len(keys)} AES keys' if keys else 'no AES key'} {self._settings.key}")
        return keys[0]

    def _keys(self, session: Session) -> list[Any]:
        from pkcs11 import Attribute, KeyType, ObjectClass  # noqa: PLC0415 -- an extra

        # To the end: a search that is left open fails when it is thrown away, after the session.
        return list(
            session.get_objects(
                {
                    Attribute.CLASS: ObjectClass.SECRET_KEY,
                    Attribute.KEY_TYPE: KeyType.AES,
                    Attribute.LABEL: self._settings.key,
                }
            )
        )

    @contextmanager
    def _session(self, *, rw: bool = False) -> Iterator[Session]:
        pkcs11 = _pkcs11()
        settings = self._settings
        with _IN_USE:
            stands, pin = self._pin()
            try:
                library = self._library()
                library.reinitialize()
                token = library.get_token(token_label=settings.token)
                # A PIN that was accepted here may have been changed since, and replicas may have used the other tries.
                if token.flags & pkcs11.TokenFlag.USER_PIN_FINAL_TRY:
                    raise self._refused("has one try left for the PIN, which is not used; log in once by its own tool")
                with token.open(rw=rw, user_pin=pin) as session:
                    yield session
            except (pkcs11.PinIncorrect, pkcs11.PinInvalid, pkcs11.PinLenRange, pkcs11.PinLocked) as error:
                _REFUSED.add(stands)
                raise self._refused("refuses the PIN") from error
            except pkcs11.NoSuchToken as error:
                raise self._away("is not there") from error
            except pkcs11.PKCS11Error as error:  # its text may be anything; its class tells enough
                raise self._away(f"does not do it ({type(error).__name__})") from error

    def _library(self) -> Any:
        pkcs11 = _pkcs11()
        path = self._settings.module
        try:
            return pkcs11.lib(str(path))
        except pkcs11.PKCS11Error as error:
            if type(error) is not pkcs11.PKCS11Error:  # the library was loaded, and has said it itself
                raise
            what = "is no PKCS#11 library" if path.exists() else "no such file or directory"
            raise Unavailable(Reason.KEY_UNAVAILABLE, f"pkcs11.module: {path}: {what}") from error

    def _pin(self) -> tuple[_PinFile, str]:
        """How the PIN's file stands, and the PIN."""
        settings = self._settings
        path = settings.pin_file
        try:
            status = path.stat()
            stands = _PinFile(
                module=settings.module,
                token=settings.token,
                path=path,
                device=status.st_dev,
                inode=status.st_ino,
                modified=status.st_mtime_ns,
                size=status.st_size,
            )
            if stands in _REFUSED:
                raise self._refused("refused the PIN; it is not tried again until the file with it changes")
            content = read_private_file(
                path,
                setting="pkcs11.pin_file",
                limit=PIN_MAX,
                hint="it holds the user PIN, and nobody else can read it",
            )
            return stands, _pin_in(path, content)
        except InvalidInput as error:
            raise Unavailable(Reason.KEY_UNAVAILABLE, error.message) from error
        except OSError as error:
            raise Unavailable(
                Reason.KEY_UNAVAILABLE, f"pkcs11.pin_file: {path}: {os.strerror(error.errno or 0)}"
            ) from error

    def _refused(self, what: str) -> PinRefused:
        return PinRefused(Reason.KEY_UNAVAILABLE, f"the key token {self._settings.token} {what}")

    def _away(self, what: str) -> Unavailable:
        return Unavailable(Reason.KEY_UNAVAILABLE, f"the key token {self._settings.token} {what}")


def _pin_in(path: Path, content: bytes) -> str:
    """The PIN in a file; what can be none is refused here, since the token would count it as a try."""
    line = content.removesuffix(b"\r\n" if content.endswith(b"\r\n") else b"\n")
    if not line or len(content) > PIN_MAX:
        why = f"has more than {PIN_MAX} bytes" if line else "is empty"
        raise Unavailable(Reason.KEY_UNAVAILABLE, f"pkcs11.pin_file: {path} {why}")
    try:
        return line.decode()
    except UnicodeDecodeError:
        raise Unavailable(Reason.KEY_UNAVAILABLE, f"pkcs11.pin_file: {path} is not UTF-8") from None


def _pkcs11() -> ModuleType:
    try:
        import pkcs11  # noqa: PLC0415 -- an extra
    except ImportError as error:
        raise InvalidInput(
            Reason.INVALID_CONFIGURATION,
            "pkcs11: needs the extra sevattest[pkcs11]",
            hint="pip install 'sevattest[pkcs11]'",
        ) from error
    return pkcs11
