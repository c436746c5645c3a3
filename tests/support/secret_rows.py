"""A store's half of stored secrets and of generated ones, in memory: versions count up and are never used twice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from uuid import UUID

from common.errors import SevattestError
from verifier.store.rows import StoredSecret


@dataclass
class SecretRowsInMemory:
    """Behaves as a `Store` does in these methods.

    Attributes:
        rows: what is kept, by name and version; a test that plays somebody who can write to the database edits it.
        kept: what was made for launches, sealed.
        fails: raised by the next questions, as a store raises that is down.
    """

    rows: dict[tuple[str, int], StoredSecret] = field(default_factory=dict)
    kept: dict[UUID, bytes] = field(default_factory=dict)
    fails: SevattestError | None = None
    _last: dict[str, int] = field(default_factory=dict)

    def put(self, name: str, seal: Callable[[int], bytes], size: int) -> int:
        """Keep a new version; nothing is changed where `seal` raises."""
        version = self._last.get(name, 0) + 1
        sealed = seal(version)
        self._last[name] = version
        now = datetime.now(UTC)
        self.rows[name, version] = StoredSecret(name=name, version=version, sealed=sealed, size=size, create_time=now)
        return version

    def delete(self, name: str) -> None:
        """Erase all versions."""
        for place in [place for place in self.rows if place[0] == name]:
            del self.rows[place]

    async def secret(self, name: str, version: int | None) -> StoredSecret | None:
        """One version of a secret, or the newest."""
        if self.fails is not None:
            raise self.fails
        if version is None:
            version = max((number for known, number in self.rows if known == name), default=0)
        return self.rows.get((name, version))

    async def generated(self, launch_id: UUID) -> bytes | None:
        """What was made for a launch, sealed."""
        return self.kept.get(launch_id)
