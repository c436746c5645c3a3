"""A workload with its artefacts measured, or with the reason why it cannot be launched now."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from common.errors import InvalidInput, SevattestError
from common.sev.digest.compute import LaunchShape, MeasuredFirmware
from common.sev.explain import Expected
from verifier.appraisal.reference import Reference, Terms, freeze, listed_references, measured_references, shapes
from verifier.documents.workload import Artefacts, Workload
from verifier.library.artefacts import ArtefactShelf, Stamp, stamp, unusable


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
    _terms: dict[tuple[str, bool], Terms] = field(default_factory=dict, init=False, compare=False, repr=False)

    def terms(self, generation: str, *, recognized: bool) -> Terms:
        """The terms of a launch on a platform of `generation`, which the workload allows: the same for all of them.

        Args:
            generation: the platform's.
            recognized: whether the owner named this very chip.
        """
        terms = self._terms.get((generation, recognized))
        if terms is None:
            terms = self._terms[generation, recognized] = freeze(
                self.workload,
                generation=generation,
                references=self.references,
                secret_area=self.secret_area,
                recognized=recognized,
            )
        return terms

    @property
    def unchanged(self) -> bool:
        """Whether the files are those that were measured. An unusable workload is always looked at again."""
        artefacts = self.workload.artefacts
        if artefacts is None:
            return True
        if self.unusable is not None:
            return False
        try:
            return self.stamps == tuple(stamp(path) for path in artefacts.files)
        except InvalidInput:
            return False

    @property
    def expected(self) -> tuple[Expected, ...]:
        """The shapes, each with what its parts are called; empty where digests are listed."""
        artefacts = self.workload.artefacts
        if artefacts is None:
            return ()
        return tuple(
            Expected(
                shape=shape,
                firmware=self.label,
                kernel=None if self.kernel is None else self.label,
                initrd=None if self.initrd is None else self.label,
                cmdline=None if artefacts.cmdline is None else self.label,
            )
            for shape in self.allowed
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
