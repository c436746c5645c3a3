"""The owner's set of workloads in memory: which version is in force, what it allows, and all that is on file.

A set is replaced as a whole: a folder with one bad document changes nothing. A workload whose artefacts are missing or
do not fit stays in the set, unusable, with the reason; the others go on. Artefacts are looked at again whenever a
launch of their workload begins.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from common.errors import InvalidInput, SevattestError
from common.sev.digest.compute import LaunchShape, MeasuredFirmware
from common.sev.explain import Catalogue, Expected
from common.telemetry.log import Log
from verifier.appraisal.reference import Reference, Terms, listed_references, measured_references, shapes
from verifier.documents.workload import Artefacts, Workload
from verifier.library.artefacts import ArtefactShelf, Stamp, stamp, unusable
from verifier.library.folder import read_folder

# Sets of files that were replaced on disk: still known neighbours for explanations.
EARLIER_MAX = 32


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """One version of a workload with its artefacts measured.

    Attributes:
        workload: the document.
        references: what it allows; empty where it is unusable.
        secret_area: bytes that its firmware reserves for secrets, 0 for none.
        stamps: the files as they were when they were measured.
        unusable: why it cannot be launched now; None where it can.
        firmware: the measured image.
        kernel: SHA-256 of the kernel.
        initrd: SHA-256 of the initrd.
        allowed: the shapes behind `references`.
        label: what explanations call its artefacts.
    """

    workload: Workload
    references: tuple[Reference, ...] = ()
    secret_area: int = 0
    stamps: tuple[Stamp, ...] = ()
    unusable: str | None = None
    firmware: MeasuredFirmware | None = None
    kernel: bytes | None = None
    initrd: bytes | None = None
    allowed: tuple[LaunchShape, ...] = ()
    label: str = ""


class Library:
    """All versions of all workloads, prepared."""

    def __init__(self, folder: Path, log: Log) -> None:
        """Remember where the documents are; nothing is read before `load`."""
        self._folder = folder
        self._log = log
        self._shelf = ArtefactShelf()
        self._sets: Mapping[str, Sequence[Prepared]] = {}
        self._earlier: list[Prepared] = []
        self._lock = asyncio.Lock()

    async def load(self) -> None:
        """Read the folder and measure every artefact; put the new set into force.

        Raises:
            InvalidInput: a document is bad, with every problem; the old set stays in force.
        """
        async with self._lock:
            self._sets = await asyncio.to_thread(self._read)
        for prepared in self._all():
            workload = prepared.workload
            for warning in workload.warnings:
                self._log.warning("workload.warning", workload=workload.name, version=workload.version, text=warning)
            if prepared.unusable is not None:
                self._log.error(
                    "workload.unusable", workload=workload.name, version=workload.version, text=prepared.unusable
                )
        self._log.info("workloads.loaded", workloads=len(self._sets), documents=sum(map(len, self._sets.values())))

    def _read(self) -> Mapping[str, Sequence[Prepared]]:
        return {
            name: tuple(prepare(workload, self._shelf) for workload in versions)
            for name, versions in read_folder(self._folder).items()
        }

    def document(self, name: str) -> Workload | None:
        """The newest version of a workload as its document has it; None for an unknown name."""
        versions = self._sets.get(name)
        return versions[0].workload if versions else None

    async def in_force(self, name: str) -> Prepared | None:
        """The newest version of a workload, its artefacts as they are on disk now; None for an unknown name.

        Raises:
            InvalidInput: the workload cannot be used now (INVALID_CONFIGURATION); the log says why.
        """
        versions = self._sets.get(name)
        if not versions:
            return None
        prepared = versions[0]
        if not await asyncio.to_thread(_unchanged, prepared):
            prepared = await self._again(name, prepared)
        if prepared.unusable is not None:
            self._log.error(
                "workload.unusable", workload=name, version=prepared.workload.version, text=prepared.unusable
            )
            raise unusable("the workload cannot be used now, the owner's log says why")
        return prepared

    async def _again(self, name: str, old: Prepared) -> Prepared:
        async with self._lock:
            versions = self._sets.get(name, ())
            if not versions or versions[0] is not old:
                # Somebody else was faster, or a new set came in between.
                return versions[0] if versions else old
            new = await asyncio.to_thread(prepare, old.workload, self._shelf)
            self._sets = {**self._sets, name: (new, *versions[1:])}
            if old.unusable is None and old.references != new.references:
                self._earlier = [replace(old, label=f"{old.label} (files since replaced)"), *self._earlier]
                del self._earlier[EARLIER_MAX:]
                self._log.warning("workload.files_changed", workload=name, version=old.workload.version)
            return new

    def _all(self) -> Iterator[Prepared]:
        for versions in self._sets.values():
            yield from versions

    def expected(self, terms: Terms) -> tuple[Expected, ...]:
        """The shapes behind frozen digests; empty where digests were listed or the files are no longer known."""
        for prepared in (*self._all(), *self._earlier):
            if prepared.workload.sha256 == terms.document and prepared.references == terms.references:
                return _expected(prepared)
        return ()

    def catalogue(self) -> Catalogue:
        """Everything on file: all artefacts of all versions of all workloads, each under its workload and version."""
        known = [each for each in (*self._all(), *self._earlier) if each.workload.artefacts is not None]
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


def prepare(workload: Workload, shelf: ArtefactShelf) -> Prepared:
    """A workload with its artefacts measured, or with the reason why it is unusable. Blocking."""
    prepared = Prepared(workload=workload, label=f"{workload.name} {workload.version}")
    if workload.artefacts is None:
        return replace(prepared, references=listed_references(workload.digests), secret_area=workload.secret_area or 0)
    try:
        return _measure(prepared, workload.artefacts, shelf)
    except SevattestError as error:
        return replace(prepared, unusable=error.message)


def _measure(prepared: Prepared, artefacts: Artefacts, shelf: ArtefactShelf) -> Prepared:
    stamps = tuple(stamp(path) for path in artefacts.files)
    firmware = shelf.firmware(artefacts.firmware)
    kernel = None if artefacts.kernel is None else shelf.sha256(artefacts.kernel)
    initrd = None if artefacts.initrd is None else shelf.sha256(artefacts.initrd)
    try:
        allowed = shapes(artefacts, firmware, kernel, initrd)
    except InvalidInput as error:
        raise unusable(f"{artefacts.firmware}: {error.message}") from error
    area = firmware.footer.secret_area
    return replace(
        prepared,
        references=measured_references(allowed),
        secret_area=0 if area is None else area.size,
        stamps=stamps,
        firmware=firmware,
        kernel=kernel,
        initrd=initrd,
        allowed=allowed,
    )


def _unchanged(prepared: Prepared) -> bool:
    """Whether the files are those that were measured. An unusable workload is always looked at again."""
    artefacts = prepared.workload.artefacts
    if artefacts is None:
        return True
    if prepared.unusable is not None:
        return False
    try:
        return tuple(stamp(path) for path in artefacts.files) == prepared.stamps
    except InvalidInput:
        return False


def _expected(prepared: Prepared) -> tuple[Expected, ...]:
    artefacts = prepared.workload.artefacts
    if artefacts is None:
        return ()
    label = prepared.label
    return tuple(
        Expected(
            shape=shape,
            firmware=label,
            kernel=None if prepared.kernel is None else label,
            initrd=None if prepared.initrd is None else label,
            cmdline=None if artefacts.cmdline is None else label,
        )
        for shape in prepared.allowed
    )
