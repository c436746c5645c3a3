"""A document before it is kept: everything that can be said against it, and everything that deserves a second look."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from common.errors import InvalidInput, Reason, WrongState
from common.versions import version_order
from verifier.documents.platform import KnownPlatform
from verifier.documents.sources import FileSource, StoredSource
from verifier.documents.text import InvalidDocument
from verifier.documents.workload import Workload
from verifier.library.applied import read_applied
from verifier.library.artefacts import stamp
from verifier.library.documents import Documents, Entry, supposed
from verifier.library.prepared import Prepared
from verifier.library.warnings import superseded_by, warnings_for

HasSecret = Callable[[str, int | None], Awaitable[bool]]


class DocumentLibrary(Protocol):
    """What the owner's side asks of `verifier.library.library.Library`."""

    @property
    def folder(self) -> Path:
        """What relative paths in applied documents are relative to."""
        ...

    async def current(self) -> Documents:
        """What is on file now.

        Raises:
            Unavailable: the store has no answer.
        """
        ...

    async def look(self) -> Documents:
        """What is on file now, read anew whatever its revision.

        Raises:
            Unavailable: the store has no answer.
        """
        ...

    async def prepared(self, workload: Workload) -> Prepared:
        """A workload with its artefacts as they are on disk now."""
        ...


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A document that could be kept.

    Attributes:
        entry: the document, not on file yet.
        revision: of the documents that it was looked at beside.
        warnings: what deserves a second look.
        newer: the version that would stay in force in its place; empty where none would.
    """

    entry: Entry
    revision: int
    warnings: tuple[str, ...]
    newer: str = ""


async def check_document(library: DocumentLibrary, text: bytes, *, is_json: bool, has_secret: HasSecret) -> Checked:
    """Look at a document that somebody wants to apply.

    Args:
        library: what is on file.
        text: the document.
        is_json: whether it is JSON; else YAML.
        has_secret: whether the store has a secret of this name, in this version or (None) any.

    Raises:
        InvalidDocument: with every problem that was found, artefacts that cannot be measured included.
        WrongState: a file has this kind and name, the version is on file in another spelling or with other content, or
            another platform has the same chip (DOCUMENT_CONFLICT).
        Unavailable: the store has no answer.
    """
    documents = await library.current()
    document = await asyncio.to_thread(read_applied, text, is_json=is_json, folder=library.folder)
    entry = supposed(document, text, is_json=is_json)
    _require_free(entry, documents)
    secrets: list[str] = []
    if isinstance(document, Workload):
        prepared = await library.prepared(document)
        if prepared.unusable is not None:
            raise InvalidDocument(f"spec.measure: {prepared.unusable}")
        secrets = await _secrets(document, has_secret)
    if newer := documents.newer(entry):
        return Checked(entry=entry, revision=documents.revision, warnings=superseded_by(newer), newer=newer)
    beside = documents.supposing([*documents.versions(entry.kind, entry.name), entry])
    return Checked(entry=entry, revision=documents.revision, warnings=(*secrets, *warnings_for(document, beside)))


def _require_free(entry: Entry, documents: Documents) -> None:
    for other in documents.versions(entry.kind, entry.name):
        if other.file:
            raise _conflict(f"{entry.kind} {entry.name} is in the folder, in {other.file}: change it there")
        if version_order(other.version) == version_order(entry.version) and (
            other.version != entry.version or other.text != entry.text
        ):
            raise _conflict(
                f"{entry.kind} {entry.name} {other.version} is on file with another text: "
                "give it another metadata.version"
            )
    if isinstance(entry.document, KnownPlatform):
        for platform in documents.platforms.values():
            if platform.fingerprint == entry.document.fingerprint and platform.name != entry.name:
                raise _conflict(f"spec.cek: is the chip of platform {platform.name} already")


def _conflict(message: str) -> WrongState:
    return WrongState(Reason.DOCUMENT_CONFLICT, message)


async def _secrets(workload: Workload, has_secret: HasSecret) -> list[str]:
    warnings = []
    for index, secret in enumerate(workload.secrets):
        path, source = f"spec.secrets[{index}].source", secret.source
        if isinstance(source, StoredSource) and not await has_secret(source.name, source.version):
            version = "" if source.version is None else f" in version {source.version}"
            warnings.append(f"{path}.stored: there is no secret {source.name}{version}")
        elif isinstance(source, FileSource):
            try:
                await asyncio.to_thread(stamp, Path(source.path))
            except InvalidInput as error:
                warnings.append(f"{path}.file: {error.message}")
    return warnings
