"""The owner's documents in memory, and the artefacts that its workloads measure.

A folder is replaced as a whole: one with one bad document changes nothing. The store's documents are read anew whenever
their revision is another than the snapshot's, so a decision that asks for `current` judges by what is in force then.
What is read and is not as it was sealed (`verifier.library.sealed`) stops everything until a later look finds it well.
A workload whose artefacts are missing or do not fit stays on file, unusable, with the reason; the others go on.
Artefacts are looked at again whenever a launch of their workload begins.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from common.sev.explain import Catalogue, Expected
from common.telemetry.log import Log
from verifier.appraisal import authority
from verifier.appraisal.reference import Terms
from verifier.documents.text import InvalidDocument
from verifier.documents.workload import Workload
from verifier.library.applied import DocumentRows, read_row
from verifier.library.artefacts import ArtefactShelf, unusable
from verifier.library.documents import Documents, Entry, snapshot
from verifier.library.folder import read_folder
from verifier.library.prepared import Prepared, prepare
from verifier.library.sealed import DocumentSeal, not_sealed, step_back
from verifier.store.rows import DocumentRow, DocumentSet

# Sets of files that were replaced on disk: still known neighbours for explanations.
EARLIER_MAX = 32


async def _nothing(_documents: Documents) -> None:
    pass


class Library:
    """All versions of all documents, and all workloads prepared."""

    def __init__(
        self,
        folder: Path,
        rows: DocumentRows,
        seal: DocumentSeal,
        log: Log,
        *,
        before: Callable[[Documents], Awaitable[None]] = _nothing,
    ) -> None:
        """Remember where the documents are; nothing is read before `load`.

        Args:
            folder: the owner's files, and what relative paths in applied documents are relative to.
            rows: what the owner applied.
            seal: on it.
            log: the owner's.
            before: is awaited with each new snapshot before it is in force; decisions wait for it, so it has an end.
        """
        self._before = before
        self._folder = folder
        self._rows = rows
        self._seal = seal
        self._log = log
        self._shelf = ArtefactShelf()
        self._files: tuple[Entry, ...] = ()
        self._applied: Mapping[DocumentRow, Entry] = {}
        self._documents: Documents | None = None
        self._seen: DocumentSet | None = None  # the last that was sealed: nothing older is believed
        self._problem: str | None = None  # why what was read last cannot be used
        self._prepared: Mapping[str, Prepared] = {}  # by the SHA-256 of the document
        self._earlier: list[Prepared] = []
        self._lock = asyncio.Lock()

    @property
    def documents(self) -> Documents | None:
        """The snapshot that is in force; None before the first was read. Who decides asks for `current`."""
        return self._documents

    def unusable(self) -> Counter[str]:
        """How many documents of each kind must not be used, as far as they were looked at; workloads in force only."""
        if self._documents is None:
            return Counter()
        in_force = (self._prepared.get(versions[0].sha256) for versions in self._documents.workloads.values())
        lacking = sum(each is not None and each.unusable is not None for each in in_force)
        return Counter(kind for kind, _ in self._documents.unusable) + Counter({"Workload": lacking})

    @property
    def folder(self) -> Path:
        """What relative paths in applied documents are relative to."""
        return self._folder

    async def load(self) -> Documents:
        """Read the folder and the store, and measure every artefact; put the new snapshot into force.

        Raises:
            InvalidInput: a file is bad, with every problem, or has the name of an applied document; the old snapshot
                stays in force.
            Unavailable: the store has no answer; the old snapshot stays in force. Or what is in the store is not as it
                was sealed (DOCUMENTS_NOT_SEALED), and nothing is in force until it is.
        """
        async with self._lock:
            files = await asyncio.to_thread(read_folder, self._folder)
            revision, applied = await self._read_rows()
            documents = await asyncio.to_thread(snapshot, revision, (*files, *applied.values()))
            _require_distinct(documents)
            prepared = await asyncio.to_thread(self._prepare, documents, {})
            await self._before(documents)
            self._files, self._applied = files, applied
            return self._put(documents, prepared)

    async def current(self, revision: int | None = None) -> Documents:
        """What is on file now: the same snapshot as long as the store's revision is the same.

        Args:
            revision: the store's, where it was just read.

        Raises:
            InvalidInput: no set was in force yet, and none can be now (INVALID_CONFIGURATION); the log says why.
            Unavailable: the store has no answer, or what is in it was found not to be as it was sealed
                (DOCUMENTS_NOT_SEALED).
        """
        if self._problem is not None:
            raise not_sealed()
        known = self._documents
        if known is None:
            try:
                return await self.load()
            except InvalidDocument as error:
                # Callers read it: what the owner's files are called and hold is in the log, with the next sweep.
                raise unusable("the owner's documents cannot be used now, the owner's log says why") from error
        if revision is None:
            revision = await self._rows.revision()
        return known if revision == known.revision else await self.look()

    async def look(self) -> Documents:
        """Read what is in the store again, whatever its revision: who writes rows need not write that.

        Raises:
            InvalidInput, Unavailable: see `load`.
        """
        if self._documents is None:
            return await self.load()
        async with self._lock:
            revision, applied = await self._read_rows()
            if revision == self._documents.revision:
                return self._documents
            documents = await asyncio.to_thread(snapshot, revision, (*self._files, *applied.values()))
            prepared = await asyncio.to_thread(self._prepare, documents, self._prepared)
            await self._before(documents)
            self._applied = applied
            return self._put(documents, prepared)

    def likely_grant(self, workload: str, caller: str, named: str | None) -> str | None:
        """The name of the grant that a launch will spend, by what was on file at the last look; None for none.

        Nothing is decided by it: it says what to read from the store along with the documents' revision.
        """
        known = self._documents
        versions = () if known is None else known.workloads.get(workload, ())
        if known is None or not versions:
            return None
        return authority.likely(workload=versions[0], caller=caller, named=named, grants=known.grants)

    async def _read_rows(self) -> tuple[int, Mapping[DocumentRow, Entry]]:
        found = await self._rows.documents()
        await self._require_sealed(found)
        return found.revision, await asyncio.to_thread(self._read, found.rows)

    async def _require_sealed(self, found: DocumentSet) -> None:
        """Note a set that is sealed; say once what is wrong with another."""
        problem = await asyncio.to_thread(self._seal.problem, found)
        if problem is None and self._seen is not None:
            problem = step_back(self._seen, found)
        if problem != self._problem:
            counts = {"revision": found.revision, "documents": len(found.rows)}
            if problem is None:
                self._log.info("documents.sealed_again", **counts)
            else:
                self._log.error("documents.not_sealed", **counts, text=problem)
        self._problem = problem
        if problem is not None:
            raise not_sealed()
        self._seen = replace(found, rows=())

    def _read(self, rows: Sequence[DocumentRow]) -> Mapping[DocumentRow, Entry]:
        known = self._applied
        return {row: known.get(row) or read_row(row, self._folder) for row in rows}

    def _prepare(self, documents: Documents, known: Mapping[str, Prepared]) -> Mapping[str, Prepared]:
        return {
            workload.sha256: known.get(workload.sha256) or prepare(workload, self._shelf)
            for versions in documents.workloads.values()
            for workload in versions
        }

    def _put(self, documents: Documents, prepared: Mapping[str, Prepared]) -> Documents:
        """Put a snapshot into force, and log what is new and amiss in it."""
        for sha256, each in prepared.items():
            if self._prepared.get(sha256) is each:
                continue
            workload = each.workload
            for warning in workload.warnings:
                self._log.warning("workload.warning", workload=workload.name, version=workload.version, text=warning)
            if each.unusable is not None:
                self._log_unusable(each)
        for (kind, name), problem in documents.unusable.items():
            self._log.error("document.unusable", kind=kind, name=name, text=problem)
        self._documents, self._prepared = documents, prepared
        self._log.info(
            "documents.loaded",
            revision=documents.revision,
            documents=len(documents.entries),
            workloads=len(documents.workloads),
        )
        return documents

    def _log_unusable(self, prepared: Prepared) -> None:
        workload = prepared.workload
        self._log.error(
            "workload.unusable", workload=workload.name, version=workload.version, text=prepared.unusable or ""
        )

    async def in_force(self, documents: Documents, name: str) -> Prepared | None:
        """The version of a workload that a snapshot has in force, its artefacts as they are on disk now.

        Returns:
            None for an unknown name.

        Raises:
            InvalidInput: the workload cannot be used now (INVALID_CONFIGURATION); the log says why.
        """
        workload = documents.workload(name)
        if workload is None:
            return None
        prepared = await self.prepared(workload)
        if prepared.unusable is not None:
            self._log_unusable(prepared)
            raise unusable("the workload cannot be used now, the owner's log says why")
        return prepared

    async def prepared(self, workload: Workload) -> Prepared:
        """A workload with its artefacts as they are on disk now; of one that is not on file nothing is kept."""
        known = self._prepared.get(workload.sha256)
        if known is None:
            return await asyncio.to_thread(prepare, workload, self._shelf)
        # On the event loop: a few looks at a local disk, for which a thread costs thirty times as much.
        if known.unchanged:
            return known
        return await self._again(known)

    async def _again(self, old: Prepared) -> Prepared:
        sha256, workload = old.workload.sha256, old.workload
        async with self._lock:
            if self._prepared.get(sha256) is not old:
                # Somebody else was faster, or a new set came in between.
                return self._prepared.get(sha256, old)
            new = await asyncio.to_thread(prepare, workload, self._shelf)
            self._prepared = {**self._prepared, sha256: new}
            if old.unusable is None and old.references != new.references:
                self._earlier = [replace(old, label=f"{old.label} (files since replaced)"), *self._earlier]
                del self._earlier[EARLIER_MAX:]
                self._log.warning("workload.files_changed", workload=workload.name, version=workload.version)
            return new

    def _all(self) -> Iterator[Prepared]:
        yield from self._prepared.values()
        yield from self._earlier

    def expected(self, terms: Terms) -> tuple[Expected, ...]:
        """The shapes behind frozen digests; empty where digests were listed or the files are no longer known."""
        for prepared in self._all():
            if prepared.workload.sha256 == terms.document and prepared.references == terms.references:
                return prepared.expected
        return ()

    def catalogue(self) -> Catalogue:
        """Everything on file: all artefacts of all versions of all workloads, each under its workload and version."""
        known = [each for each in self._all() if each.workload.artefacts is not None]
        return Catalogue(
            firmwares={each.label: each.firmware for each in known if each.firmware is not None},
            kernels={each.label: each.kernel for each in known if each.kernel is not None},
            initrds={each.label: each.initrd for each in known if each.initrd is not None},
            cmdlines={
                each.label: each.workload.artefacts.cmdline
                for each in known
                if each.workload.artefacts is not None and each.workload.artefacts.cmdline is not None
            },
        )


def _require_distinct(documents: Documents) -> None:
    """Refuse a folder that repeats what was applied: at start and at SIGHUP somebody is there to read why."""
    both = {(each.kind, each.name): each for each in documents.entries if each.file and each.problem is not None}
    if both:
        raise InvalidDocument(
            *(f"{each.file}: metadata: {each.kind} {each.name} {each.problem}" for each in both.values())
        )
