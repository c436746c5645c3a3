"""One request to Vault, in a thread, through hvac; imported only where the extra `vault` is installed."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import hvac.adapters  # type: ignore[import-untyped]  # ships no types
from hvac.api.secrets_engines import KvV2  # type: ignore[import-untyped]  # hvac has no types
from urllib3.exceptions import HTTPError
from urllib3.response import BaseHTTPResponse

from verifier.documents.sources import VaultSource
from verifier.secrets.base import no_answer

if TYPE_CHECKING:
    from verifier.secrets.vault import VaultSettings

# Vault keeps up to 1 MiB in a secret by default, and JSON may spell a byte as six.
BODY_MAX = 6 << 20
OK = 200
_CHUNK = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What Vault says.

    Attributes:
        status: of HTTP.
        body: at most `BODY_MAX` bytes; empty unless the status is 200.
    """

    status: int
    body: bytes = field(repr=False)


def ask(settings: VaultSettings, token: str, source: VaultSource) -> Answer:
    """Read one version of one secret.

    Raises:
        Unavailable: SECRET_UNAVAILABLE; the answer is too large, or comes too slowly.
        OSError, ValueError: there is no answer; the text may hold anything.
    """
    adapter = hvac.adapters.RawAdapter(
        base_uri=settings.address,
        token=token,
        verify=True if settings.ca is None else str(settings.ca),
        timeout=settings.timeout,
        allow_redirects=False,
        namespace=settings.namespace,
        ignore_exceptions=True,  # the status says it, and hvac's exceptions quote the body
    )
    # No proxy, CA bundle or .netrc of the environment's has a say in where the token goes.
    adapter.session.trust_env = False
    with adapter.session:
        answer: Answer = KvV2(_Bounded(adapter, settings.timeout)).read_secret_version(
            source.path, version=source.version, mount_point=source.mount, raise_on_deleted_version=True
        )
    return answer


class _Bounded:
    """hvac's adapter, as far as reading needs it, with an end to what is read."""

    def __init__(self, adapter: Any, timeout: float) -> None:
        self._adapter = adapter
        self._timeout = timeout

    def get(self, url: str, params: dict[str, int]) -> Answer:
        # requests' own timeout is for each read; somebody waits for the whole no longer than this.
        deadline = time.monotonic() + self._timeout
        with self._adapter.get(url=url, params=params, stream=True) as response:
            ok = response.status_code == OK
            return Answer(status=response.status_code, body=_body(response.raw, deadline) if ok else b"")


def _body(raw: BaseHTTPResponse, deadline: float) -> bytes:
    body = bytearray()
    try:
        # read1, for read waits until it has as much as it was asked for.
        while chunk := raw.read1(_CHUNK, decode_content=True):
            body += chunk
            if len(body) > BODY_MAX:
                raise no_answer("Vault's answer is too large")
            if time.monotonic() > deadline:
                raise no_answer("Vault's answer comes too slowly")
    except HTTPError as error:
        raise OSError("broken off") from error
    return bytes(body)
