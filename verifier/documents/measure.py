"""What a document says is measured: artefacts and the shapes they may be launched in, or listed launch digests."""

from __future__ import annotations

import re
from pathlib import Path

from common.sev.abi import DIGEST_SIZE, PACKET_MAX_SIZE
from common.sev.digest.cpus import CpuType, parse_cpu
from common.sev.digest.vmsa import VCPUS_MAX, Flavour
from common.sev.errors import ParseError
from verifier.documents.form_workload import DigestForm, MeasureForm, SpecForm
from verifier.documents.problems import HEX32, Problems
from verifier.documents.workload import DIGESTS_MAX, Artefacts, ListedDigest

_RANGE = re.compile(r"(\d{1,3})-(\d{1,3})", re.ASCII)
_LABEL_MAX = 128
_SECRET_AREA_MIN = 32


class MeasureReader:
    """Reads `spec.measure`, `spec.digests` and `spec.secret_area`."""

    def __init__(self, spec: SpecForm, folder: Path, problems: Problems) -> None:
        self._spec = spec
        self._folder = folder
        self._problems = problems

    def artefacts(self, *, es: bool) -> Artefacts | None:
        """The files and shapes; None where digests are listed.

        Args:
            es: whether the policy asks for SEV-ES, so that registers are measured.
        """
        form, path = self._spec.measure, "spec.measure"
        if form is None:
            if self._spec.digests is None:
                self._problems.add("spec", "needs measure (artefacts) or digests")
            return None
        if self._spec.digests is not None:
            self._problems.add("spec", "has both measure and digests: which counts would be a guess")
        if self._spec.secret_area is not None:
            self._problems.add("spec.secret_area", "goes with digests: a measured firmware says it itself")
        if form.kernel is None and (form.initrd is not None or form.cmdline is not None):
            self._problems.add(path, "has an initrd or a command line but no kernel: they would not be measured")
        if form.cmdline is not None and "\0" in form.cmdline:
            self._problems.add(f"{path}.cmdline", "holds a NUL")
        vcpus, cpus, flavours = self._shapes(form, es=es)
        return Artefacts(
            firmware=self._problems.file(f"{path}.firmware", self._folder, form.firmware),
            kernel=self._optional(f"{path}.kernel", form.kernel),
            initrd=self._optional(f"{path}.initrd", form.initrd),
            cmdline=None if form.cmdline is None else form.cmdline.encode(),
            vcpus=vcpus,
            cpus=cpus,
            flavours=flavours,
        )

    def _optional(self, where: str, text: str | None) -> Path | None:
        return None if text is None else self._problems.file(where, self._folder, text)

    def _shapes(
        self, form: MeasureForm, *, es: bool
    ) -> tuple[tuple[int, ...], tuple[CpuType, ...], tuple[Flavour, ...]]:
        path = "spec.measure"
        vcpus, cpus, flavours = self._vcpus(form), self._cpus(form), self._flavours(form)
        if not es:
            if form.vcpus or form.cpus or form.flavours:
                self._problems.add(path, "lists vcpus, cpus or flavours, but without SEV-ES nothing measures them")
            return (), (), ()
        if not form.vcpus:
            self._problems.add(f"{path}.vcpus", "lists no number of vCPUs: for SEV-ES it is measured")
        if not form.cpus:
            self._problems.add(f"{path}.cpus", "lists no CPU type: for SEV-ES it is measured")
        if (count := len(vcpus) * len(cpus) * len(flavours)) > DIGESTS_MAX:
            self._problems.add(path, f"spans {count} launch digests, at most {DIGESTS_MAX} are frozen for a launch")
        return vcpus, cpus, flavours

    def _vcpus(self, form: MeasureForm) -> tuple[int, ...]:
        path = "spec.measure.vcpus"
        numbers: list[int] = []
        for index, item in enumerate(form.vcpus):
            match = _RANGE.fullmatch(item) if isinstance(item, str) else None
            first, last = (int(match[1]), int(match[2])) if match else (item, item)
            if isinstance(first, int) and isinstance(last, int) and 1 <= first <= last <= VCPUS_MAX:
                numbers += range(first, last + 1)
            else:
                self._problems.add(f"{path}[{index}]", f'must be 1 to {VCPUS_MAX}, or a range as in "1-8"')
        self._problems.refuse_repeats(path, numbers)
        return tuple(numbers)

    def _cpus(self, form: MeasureForm) -> tuple[CpuType, ...]:
        path = "spec.measure.cpus"
        cpus: dict[int, CpuType] = {}
        for index, text in enumerate(form.cpus):
            try:
                cpu = parse_cpu(text)
            except ParseError as error:
                self._problems.add(f"{path}[{index}]", error.message)
            else:
                # Two names of one processor give one digest; the first name stays.
                cpus.setdefault(cpu.signature, cpu)
        self._problems.refuse_repeats(path, form.cpus)
        return tuple(cpus.values())

    def _flavours(self, form: MeasureForm) -> tuple[Flavour, ...]:
        if form.flavours == "all":
            return tuple(Flavour)
        path = "spec.measure.flavours"
        flavours: list[Flavour] = []
        for index, text in enumerate(form.flavours):
            try:
                flavours.append(Flavour(text))
            except ValueError:
                self._problems.add(f"{path}[{index}]", f"must be one of {', '.join(Flavour)}; or write all")
        self._problems.refuse_repeats(path, flavours)
        # What QEMU makes by default of the machine types that are in use.
        return tuple(flavours) or (Flavour.LEGACY,)

    def digests(self) -> tuple[ListedDigest, ...]:
        """The listed digests; none where artefacts are measured."""
        items, path = self._spec.digests, "spec.digests"
        if items is None:
            return ()
        if not 1 <= len(items) <= DIGESTS_MAX:
            self._problems.add(path, f"lists {len(items)} launch digests, must be 1 to {DIGESTS_MAX}")
        area = self._spec.secret_area
        if area is not None and not _SECRET_AREA_MIN <= area <= PACKET_MAX_SIZE:
            self._problems.add("spec.secret_area", f"must be {_SECRET_AREA_MIN} to {PACKET_MAX_SIZE} bytes")
        digests = []
        for index, item in enumerate(items):
            form = item if isinstance(item, DigestForm) else DigestForm(digest=item, label=f"digest {index + 1}")
            if not HEX32.fullmatch(form.digest):
                self._problems.add(f"{path}[{index}]", f"must be {2 * DIGEST_SIZE} lower-case hex digits")
            elif not 1 <= len(form.label) <= _LABEL_MAX:
                self._problems.add(f"{path}[{index}].label", f"must be 1 to {_LABEL_MAX} characters")
            else:
                digests.append(ListedDigest(digest=bytes.fromhex(form.digest), label=form.label))
        self._problems.refuse_repeats(path, [digest.digest.hex() for digest in digests])
        return tuple(digests)
