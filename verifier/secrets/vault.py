"""Secrets in HashiCorp Vault or OpenBao: a field of a secret in the key-value engine, version 2, only ever read.

The token's file is read anew for each request, so that an agent of Vault's own may renew it. TLS is always verified,
nothing is redirected, and whatever Vault says instead of the secret ends as a sentence that quotes none of it: an
error's text, like a library's exception, may hold the token or the secret.
"""

from __future__ import annotations

import asyncio
import base64
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import urlsplit

import msgspec

from common.errors import InvalidInput, Reason, Unavailable
from common.private_file import read_private
from common.sev.abi import PACKET_MAX_SIZE
from verifier.documents.sources import VaultSource
from verifier.secrets.base import no_answer

if TYPE_CHECKING:
    from verifier.secrets.vault_client import Answer

# A token of Vault's own has about 100 bytes, one of a batch some hundred.
TOKEN_MAX = 4096
# Requests under way at once. A pool of its own: a Vault that does not answer holds up nothing but secrets in Vault.
_THREADS = 8
_TOKEN = re.compile(rb"[!-~]+")


@dataclass(frozen=True, kw_only=True)
class VaultSettings:
    """Where Vault is and how it is asked.

    Attributes:
        address: `https://HOST:PORT`.
        token_file: holds the token; ours or root's, for nobody else.
        ca: PEM, the CA of its certificate; None takes the system's.
        namespace: of the enterprise edition.
        timeout: seconds that a request may take.
    """

    address: str
    token_file: Path
    ca: Path | None = None
    namespace: str | None = None
    timeout: float = 5.0

    def __post_init__(self) -> None:
        """Refuse an address that would send the token in clear, or that holds more than a place.

        Raises:
            InvalidInput: INVALID_CONFIGURATION.
        """
        try:
            url = urlsplit(self.address)
            good = (
                url.scheme == "https" and url.hostname and (url.port is None or url.port > 0) and "@" not in url.netloc
            )
        except ValueError:
            good = False
        if not good or url.path.strip("/") or url.query or url.fragment or not self.address.isascii():
            raise InvalidInput(Reason.INVALID_CONFIGURATION, "vault.address: must be https://HOST:PORT")


class VaultSecrets:
    """Asks Vault."""

    waits: ClassVar[bool] = True

    def __init__(self, settings: VaultSettings) -> None:
        """Take the settings; nothing is read or asked yet.

        Raises:
            InvalidInput: INVALID_CONFIGURATION; the extra `vault` is not installed.
        """
        try:
            from verifier.secrets.vault_client import ask  # noqa: PLC0415 -- an extra
        except ImportError as error:
            raise InvalidInput(
                Reason.INVALID_CONFIGURATION,
                "vault: needs the extra sevattest[vault]",
                hint="pip install 'sevattest[vault]'",
            ) from error
        self._ask = ask
        self._settings = settings
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="vault")

    async def size(self, source: VaultSource) -> int:
        """See `Asked`. Vault has no other way to say it, so the secret is read and dropped."""
        return len(await self.read(source))

    async def read(self, source: VaultSource) -> bytes:
        """See `Asked`."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._settings.timeout):
                answer = await loop.run_in_executor(self._pool, self._answer, source)
        except TimeoutError:
            raise no_answer(f"Vault has not answered within {self._settings.timeout:g} s") from None
        return _secret(answer, source)

    def _answer(self, source: VaultSource) -> Answer:
        try:
            return self._ask(self._settings, self._token(), source)
        except Unavailable:
            raise
        except (OSError, ValueError) as error:
            # Only its type: a library's text may quote headers or the answer.
            raise no_answer(f"Vault cannot be asked ({type(error).__name__})") from None

    def _token(self) -> str:
        try:
            token = read_private(self._settings.token_file, TOKEN_MAX).strip()
        except InvalidInput as error:
            raise no_answer(f"token_file: {error.message}") from error
        if not _TOKEN.fullmatch(token):
            raise no_answer("token_file: holds no token, which is one word")
        return token.decode("ascii")


class _Metadata(msgspec.Struct):
    version: int
    deletion_time: str = ""
    destroyed: bool = False


class _Version(msgspec.Struct):
    data: dict[str, Any] | None
    metadata: _Metadata


class _Body(msgspec.Struct):
    data: _Version


def _secret(answer: Answer, source: VaultSource) -> bytes:
    """The secret in Vault's answer."""
    if answer.status != 200:
        raise no_answer(f"Vault answers {answer.status}")
    try:
        found = msgspec.json.decode(answer.body, type=_Body).data
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise no_answer("Vault's answer is not one of the key-value engine, version 2") from None
    if found.data is None or found.metadata.destroyed or found.metadata.deletion_time:
        raise no_answer("that version is deleted")
    if source.version not in (None, found.metadata.version):
        raise no_answer("Vault answers with another version")
    text = found.data.get(source.field)
    if not isinstance(text, str):
        raise no_answer("has no such field of text")
    try:
        data = base64.b64decode(text, validate=True) if source.base64 else text.encode()
    except ValueError:  # binascii's own, or text that is not ASCII
        raise no_answer("the field is not base64") from None
    if not data:
        raise no_answer("the field is empty")
    return data[: PACKET_MAX_SIZE + 1]
