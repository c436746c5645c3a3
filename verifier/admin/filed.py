"""Documents as their owner sees them: every version, where it is from, written out, and what deserves a second look."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path

from common.errors import Reason, WrongState
from common.versions import version_order
from verifier.documents.platform import KnownPlatform
from verifier.documents.text import spelled_as_json
from verifier.documents.workload import Workload
from verifier.library.applied import read_applied
from verifier.library.documents import Documents, Entry, supposed
from verifier.library.warnings import superseded_by, warnings_for


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
        json: the whole document as JSON, defaults written out; empty where it cannot be read.
        sha256: of its text, lower-case hex.
        file: that it is from; empty for one that was applied.
        apply_time: when it was applied; None for one from a file, and for one that is not on file.
        warnings: what deserves a second look.
        newer: the version that is in force in its place; empty where none is. It is kept then and decides nothing.
    """

    kind: Kind
    name: str
    version: str
    json: str
    sha256: str
    file: str = ""
    apply_time: datetime | None = None
    warnings: tuple[str, ...] = ()
    newer: str = ""

    @property
    def order(self) -> tuple[tuple[int, int, str], ...]:
        """Sorts versions of one document: the newest is the greatest."""
        return version_order(self.version)


def filed(entry: Entry, beside: Documents | None = None, *, newer: str = "") -> Filed:
    """A library's entry as its owner sees it.

    Args:
        entry: the version of a document.
        beside: what is on file, for the warnings about names that lead nowhere and the like; without it, none of them.
        newer: the version that takes its place (`Documents.newer`), where `beside` does not say it.
    """
    document = entry.document
    warnings: tuple[str, ...] = ()
    if beside is not None:
        newer = beside.newer(entry)
    if newer:
        warnings = superseded_by(newer)
    elif document is not None and beside is not None:
        warnings = warnings_for(document, beside)
    elif isinstance(document, Workload):
        warnings = document.warnings
    if entry.problem is not None:
        warnings = (entry.problem, *warnings)
    return Filed(
        kind=Kind(entry.kind),
        name=entry.name,
        version=entry.version,
        json="" if document is None else entry.written_out(),
        sha256=entry.sha256,
        file=entry.file,
        apply_time=entry.apply_time,
        warnings=warnings,
        newer=newer,
    )


def read_text(text: bytes, folder: Path) -> Entry:
    """The document that a text spells, not on file yet. Blocking.

    Raises:
        InvalidDocument: with everything that is wrong with it.
    """
    document = read_applied(text, is_json=spelled_as_json(text), folder=folder)
    return supposed(document, text, is_json=spelled_as_json(text))


def supposing(documents: Documents, entries: Sequence[Entry]) -> Documents:
    """The snapshot with these in place of all documents of their kinds and names.

    Raises:
        WrongState: one would not be in force, as a newer version is; or two platforms would be of the same chip, and
            then nothing could be judged (DOCUMENT_CONFLICT).
    """
    changed = documents.supposing(entries)
    for entry in entries:
        if newer := documents.newer(entry) or changed.newer(entry):
            raise WrongState(
                Reason.DOCUMENT_CONFLICT,
                f"{entry.kind} {entry.name} {entry.version} would NOT be in force, {newer} is: "
                "give it a newer metadata.version",
            )
        for other in changed.platforms.values():
            mine = entry.document
            if isinstance(mine, KnownPlatform) and mine.fingerprint == other.fingerprint and mine.name != other.name:
                raise WrongState(
                    Reason.DOCUMENT_CONFLICT,
                    f"Platform {other.name} is on file for the chip of Platform {mine.name}",
                )
    return changed
