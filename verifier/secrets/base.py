"""Where a secret comes from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from common.sev.secret import SecretEntry
from verifier.documents.workload import SecretSpec


class SecretSource(Protocol):
    """Reads the secrets of one launch, all of them or none."""

    async def sizes(self, specs: Sequence[SecretSpec]) -> tuple[int, ...]:
        """How many bytes each secret has now, without reading it.

        Raises:
            Unavailable: a source has no answer (SECRET_UNAVAILABLE).
        """
        ...

    async def read(self, specs: Sequence[SecretSpec]) -> tuple[SecretEntry, ...]:
        """The table entries, in order. A generated secret is new with each call.

        Raises:
            Unavailable: a source has no answer (SECRET_UNAVAILABLE).
        """
        ...
