"""One immutable snapshot of everything that the owner has on file, from the folder and from the store.

Of several versions of a document the newest is in force. A document that cannot be read (a newer version's form, on the
store that both use) takes the place of nothing: an older version is not put in its stead. What cannot be read fails
closed. An unreadable workload or grant cannot be used; an unreadable revocation or platform document, which may forbid
anything, stops everything until it is readable or deleted: nothing is begun and nothing released, and nothing is spent.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from types import MappingProxyType

from common.errors import InvalidInput, Reason
from common.versions import version_order
from verifier.appraisal.revoked import Revocations, join
from verifier.documents.grant import Grant
from verifier.documents.platform import KnownPlatform
from verifier.documents.reader import Document, kind_of, written_out
from verifier.documents.revocation import Revocation
from verifier.documents.workload import Workload

_STOPPING = ("Platform", "Revocation")
_TWICE = "is both in the folder and applied: take one away"
_UNREADABLE = "the owner's documents cannot be used now, the owner's log says why"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One version of one document, whether it can be read or not.

    Attributes:
        kind: `Workload`, `Grant`, `Platform` or `Revocation`.
        name: its name.
        version: its version.
        text: the document.
        is_json: whether the text is JSON and not YAML.
        file: the file that it is from; empty for one that was applied.
        apply_time: when it was applied; None for a file.
        document: what it says; None where it cannot be read.
        problem: why it cannot be read, or must not be used.
    """

    kind: str
    name: str
    version: str
    text: bytes = field(repr=False)
    is_json: bool
    file: str
    apply_time: datetime | None
    document: Document | None
    problem: str | None = None

    @property
    def sha256(self) -> str:
        """Of the text, lower-case hex."""
        return hashlib.sha256(self.text).hexdigest()

    def written_out(self) -> str:
        """The document as JSON, its defaults written out.

        Raises:
            InvalidDocument: it cannot be read.
        """
        return written_out(self.text, is_json=self.is_json)


@dataclass(frozen=True, kw_only=True)
class Documents:
    """What is on file, at one revision of the store's documents.

    The mappings hold what is readable. Decisions use the methods, which refuse what is not.

    Attributes:
        revision: of the store's documents.
        entries: all versions of all documents: by kind, by name, the newest first.
        workloads: all versions by name, newest first, the first in force.
        grants: those in force, by name.
        platforms: those in force, by name.
        revocations: those in force, by name.
        unusable: why the newest version of a (kind, name) must not be used.
    """

    revision: int
    entries: tuple[Entry, ...]
    workloads: Mapping[str, tuple[Workload, ...]]
    grants: Mapping[str, Grant]
    platforms: Mapping[str, KnownPlatform]
    revocations: Mapping[str, Revocation]
    unusable: Mapping[tuple[str, str], str]

    def require_judgeable(self) -> None:
        """Return if nothing that may forbid anything is unreadable.

        Raises:
            InvalidInput: a revocation or a platform document cannot be read (INVALID_CONFIGURATION).
        """
        if any(kind in _STOPPING for kind, _ in self.unusable):
            raise _refused()

    def workload(self, name: str) -> Workload | None:
        """The version in force; None for an unknown name.

        Raises:
            InvalidInput: it cannot be read (INVALID_CONFIGURATION).
        """
        self._require_usable("Workload", name)
        versions = self.workloads.get(name)
        return versions[0] if versions else None

    def withdrawn(self, workload: str) -> bool:
        """Whether no document of this workload is on file any more, not even one that cannot be read."""
        return workload not in self.workloads and ("Workload", workload) not in self.unusable

    def grant(self, name: str) -> Grant | None:
        """The version in force; None for an unknown name.

        Raises:
            InvalidInput: it cannot be read (INVALID_CONFIGURATION).
        """
        self._require_usable("Grant", name)
        return self.grants.get(name)

    def platform_of(self, fingerprint: str) -> KnownPlatform | None:
        """The platform document of a chip; None where there is none.

        Args:
            fingerprint: of its CEK, lower-case hex.

        Raises:
            InvalidInput: some platform document cannot be read, or two are of this chip (INVALID_CONFIGURATION).
        """
        self.require_judgeable()
        found = self._by_chip.get(fingerprint, ())
        if len(found) > 1:
            raise _refused()
        return found[0] if found else None

    @cached_property
    def revoked(self) -> Revocations:
        """All revocations in force, as one value.

        Raises:
            InvalidInput: one cannot be read (INVALID_CONFIGURATION).
        """
        self.require_judgeable()
        return join(self.revocations.values())

    @cached_property
    def _by_chip(self) -> Mapping[str, Sequence[KnownPlatform]]:
        found: dict[str, list[KnownPlatform]] = defaultdict(list)
        for platform in self.platforms.values():
            found[platform.fingerprint].append(platform)
        return found

    def _require_usable(self, kind: str, name: str) -> None:
        if (kind, name) in self.unusable:
            raise _refused()

    def versions(self, kind: str, name: str) -> tuple[Entry, ...]:
        """All versions of a document, newest first."""
        return tuple(each for each in self.entries if (each.kind, each.name) == (kind, name))

    def newer(self, entry: Entry) -> str:
        """The version that takes the place of this one, on file or not; empty where none does.

        Also one that cannot be read: an older version is not put in its stead.
        """
        newest = self._newest.get((entry.kind, entry.name), entry.version)
        return newest if version_order(newest) > version_order(entry.version) else ""

    @cached_property
    def _newest(self) -> Mapping[tuple[str, str], str]:
        # Of one name, the newest comes first.
        return {(each.kind, each.name): each.version for each in reversed(self.entries)}

    def supposing(self, entries: Iterable[Entry]) -> Documents:
        """The snapshot as it would be with these in place of all documents of their kinds and names."""
        supposed = tuple(entries)
        places = {(each.kind, each.name) for each in supposed}
        kept = (each for each in self.entries if (each.kind, each.name) not in places)
        return snapshot(self.revision, (*kept, *supposed))


def snapshot(revision: int, entries: Iterable[Entry]) -> Documents:
    """The snapshot of these documents.

    Where a kind and name is both in the folder and in the store, neither counts: which was meant would be a guess.
    """
    by_name: dict[tuple[str, str], list[Entry]] = defaultdict(list)
    for entry in entries:
        by_name[entry.kind, entry.name].append(entry)
    unusable: dict[tuple[str, str], str] = {}
    in_force: list[Document] = []
    workloads: dict[str, tuple[Workload, ...]] = {}
    ordered: list[Entry] = []
    for (kind, name), found in sorted(by_name.items()):
        versions = sorted(found, key=lambda each: (version_order(each.version), each.version), reverse=True)
        if len({each.file == "" for each in versions}) > 1:
            versions = [replace(each, problem=_TWICE) for each in versions]
        ordered += versions
        newest = versions[0]
        if newest.problem is not None or newest.document is None:
            unusable[kind, name] = newest.problem or "cannot be read"
            continue
        in_force.append(newest.document)
        if kind == "Workload":
            workloads[name] = tuple(each.document for each in versions if isinstance(each.document, Workload))
    return Documents(
        revision=revision,
        entries=tuple(ordered),
        workloads=MappingProxyType(workloads),
        grants=MappingProxyType({each.name: each for each in in_force if isinstance(each, Grant)}),
        platforms=MappingProxyType({each.name: each for each in in_force if isinstance(each, KnownPlatform)}),
        revocations=MappingProxyType({each.name: each for each in in_force if isinstance(each, Revocation)}),
        unusable=MappingProxyType(unusable),
    )


def supposed(document: Document, text: bytes, *, is_json: bool) -> Entry:
    """The entry of a document that is not on file."""
    return Entry(
        kind=kind_of(document),
        name=document.name,
        version=document.version,
        text=text,
        is_json=is_json,
        file="",
        apply_time=None,
        document=document,
    )


def _refused() -> InvalidInput:
    return InvalidInput(Reason.INVALID_CONFIGURATION, _UNREADABLE)
