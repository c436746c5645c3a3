"""What the owner's side asks of the library of documents: snapshots of all that is on file, and texts, checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Protocol

from verifier.documents.workload import version_order
from verifier.launches.gather import Documents
from verifier.library.library import Prepared


class Kind(StrEnum):
    """The kinds of document, as `kind` spells them. The values are stored: they are for ever."""

    WORKLOAD = "Workload"
    GRANT = "Grant"
    PLATFORM = "Platform"
    REVOCATION = "Revocation"


@dataclass(frozen=True, kw_only=True)
class Filed:
    """One version of one document, whatever its kind.

    Attributes:
        kind: what it is.
        name: its name.
        version: as its metadata says.
        json: the whole document as JSON, defaults written out.
        sha256: of its text, lower-case hex.
        file: that it is from; None for one that was applied.
        apply_time: when it was applied; None for one from a file, and for one that is not on file.
        warnings: what deserves a second look.
    """

    kind: Kind
    name: str
    version: str
    json: str
    sha256: str
    file: str | None = None
    apply_time: datetime | None = None
    warnings: tuple[str, ...] = ()

    @property
    def order(self) -> tuple[tuple[int, int, str], ...]:
        """Sorts versions of one document: the newest is the greatest."""
        return version_order(self.version)


class Snapshot(Documents, Protocol):
    """All documents at one moment: what decisions ask of them, and what their owner does."""

    def filed(self, kind: Kind) -> Sequence[Filed]:
        """All versions of all documents of a kind, in any order."""
        ...

    async def prepared(self, name: str) -> Prepared | None:
        """The workload in force, its artefacts measured; None for an unknown name.

        Raises:
            InvalidInput: it cannot be used now, in the owner's words (INVALID_CONFIGURATION).
        """
        ...


class DocumentLibrary(Protocol):
    """The library of documents."""

    async def current(self) -> Snapshot:
        """All that is on file now.

        Raises:
            Unavailable: the store has no answer.
        """
        ...

    async def supposed(self, texts: Sequence[bytes]) -> Snapshot:
        """All that is on file now with some documents in place of those of their kind and name; nothing is changed.

        Args:
            texts: the documents, YAML, or JSON where the first character is `{`.

        Raises:
            InvalidInput: with everything that is wrong with them.
            Unavailable: the store has no answer.
        """
        ...

    async def checked(self, text: bytes) -> Filed:
        """The document that a text spells, were it put beside those on file; nothing is changed.

        Raises:
            InvalidInput: with everything that is wrong with it.
            Unavailable: the store has no answer.
        """
        ...
