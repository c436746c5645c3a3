"""Asks each secret's own source: all secrets of one launch or none.

Sources are asked at the same time, with one limit for all. What a source says that has no answer goes to the owner's
log, with the secret's name there; the host's answer says that a secret is unavailable and no more.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from common.errors import Reason, SevattestError, Unavailable
from common.sev.secret import SecretEntry
from common.telemetry.log import SILENCE, Log
from verifier.documents.sources import FileSource, GeneratedSource, Source, StoredSource, VaultSource, source_name
from verifier.documents.workload import SecretSpec
from verifier.secrets.base import Asked, no_answer
from verifier.secrets.file import FileSecrets
from verifier.secrets.generated import GeneratedSecrets
from verifier.secrets.stored import StoredSecrets
from verifier.secrets.vault import VaultSecrets

# As long as one request to Vault may be configured to take; a call of the verifier's may last twice as long.
TIME_LIMIT = 30.0

_T = TypeVar("_T")


class Secrets:
    """The `SecretSource` over files, the store, Vault and the random generator."""

    def __init__(
        self,
        *,
        stored: StoredSecrets | None = None,
        vault: VaultSecrets | None = None,
        random: Callable[[int], bytes] = os.urandom,
        log: Log = SILENCE,
        time_limit: float = TIME_LIMIT,
    ) -> None:
        """Take the sources; secrets in one that is absent are unavailable.

        Args:
            stored: asks the store.
            vault: asks Vault; None where none is configured.
            random: what generated secrets are made of.
            log: the owner's.
            time_limit: seconds for all secrets of one launch together.
        """
        self._sources: dict[type[Source], Asked[Any] | None] = {
            FileSource: FileSecrets(),
            StoredSource: stored,
            VaultSource: vault,
            GeneratedSource: GeneratedSecrets(random),
        }
        self._log = log
        self._time_limit = time_limit

    async def sizes(self, specs: Sequence[SecretSpec]) -> tuple[int, ...]:
        """See `SecretSource`."""
        return await self._all(specs, lambda asked, source: asked.size(source))

    async def read(self, specs: Sequence[SecretSpec]) -> tuple[SecretEntry, ...]:
        """See `SecretSource`."""
        secrets = await self._all(specs, lambda asked, source: asked.read(source))
        return tuple(spec.entry(data) for spec, data in zip(specs, secrets, strict=True))

    async def _all(
        self, specs: Sequence[SecretSpec], question: Callable[[Asked[Any], Source], Awaitable[_T]]
    ) -> tuple[_T, ...]:
        if len(specs) == 1:
            answers = [await self._one(specs[0], question)]
        else:
            answers = await asyncio.gather(*(self._one(spec, question) for spec in specs))
        good = []
        for answer in answers:
            if isinstance(answer, SevattestError):
                raise answer
            good.append(answer)
        return tuple(good)

    async def _one(
        self, spec: SecretSpec, question: Callable[[Asked[Any], Source], Awaitable[_T]]
    ) -> _T | SevattestError:
        """One source's answer, or the error for the host once the owner was told: others may have more to tell."""
        asked = self._sources[type(spec.source)]
        try:
            if asked is None:
                raise no_answer("no such source is configured")
            if not asked.waits:
                return await question(asked, spec.source)
            async with asyncio.timeout(self._time_limit):
                return await question(asked, spec.source)
        except TimeoutError:
            error: SevattestError = no_answer(f"has not answered within {self._time_limit:g} s")
        except SevattestError as raised:
            error = raised
        self._log.error("source.unavailable", guid=str(spec.guid), **source_name(spec.source), error=error)
        if error.reason is not Reason.SECRET_UNAVAILABLE:
            return error
        told = Unavailable(Reason.SECRET_UNAVAILABLE, "a secret's source has no answer")
        told.__cause__ = error
        return told
