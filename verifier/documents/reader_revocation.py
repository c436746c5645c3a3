"""From the form of a Revocation to a `Revocation`, or to everything that is wrong with it."""

from __future__ import annotations

from common.sev.errors import ParseError
from common.sev.measurement import FirmwareVersion
from verifier.documents.form_revocation import RevocationForm, RevokedFirmwareForm, RevokedWorkloadForm
from verifier.documents.generations import GENERATIONS
from verifier.documents.problems import HEX32, HEX64, Problems
from verifier.documents.revocation import Revocation, RevokedFirmware, RevokedWorkload
from verifier.documents.text import InvalidDocument


def read_revocation(form: RevocationForm, *, sha256: str, source: str) -> Revocation:
    """The revocation that a form describes.

    Args:
        form: the filled-in form.
        sha256: of the document's text, lower-case hex.
        source: the document's name in messages.

    Raises:
        InvalidDocument: with every problem that was found.
    """
    problems, spec = Problems(), form.spec
    problems.metadata(form.metadata)
    problems.reason("spec.why", spec.why)
    if not (spec.chips or spec.ceks or spec.generations or spec.firmware or spec.ocas or spec.workloads):
        problems.add("spec", "revokes nothing: list chips, ceks, generations, firmware, ocas or workloads")
    chips = problems.digits("spec.chips", spec.chips, HEX64, "must be a chip's id: 128 lower-case hex digits")
    ceks = problems.digits("spec.ceks", spec.ceks, HEX32, "must be a CEK's fingerprint: 64 lower-case hex digits")
    ocas = problems.digits("spec.ocas", spec.ocas, HEX32, "must be an OCA's fingerprint: 64 lower-case hex digits")
    for index, name in enumerate(spec.generations):
        _generation(f"spec.generations[{index}]", name, problems)
    problems.refuse_repeats("spec.generations", spec.generations)
    firmware = tuple(_firmware(f"spec.firmware[{index}]", each, problems) for index, each in enumerate(spec.firmware))
    workloads = tuple(
        _workload(f"spec.workloads[{index}]", each, problems) for index, each in enumerate(spec.workloads)
    )
    if problems.found:
        raise InvalidDocument(*problems.found)
    return Revocation(
        name=form.metadata.name,
        version=form.metadata.version,
        sha256=sha256,
        source=source,
        why=spec.why.strip(),
        chips=chips,
        ceks=ceks,
        generations=frozenset(spec.generations),
        firmware=firmware,
        ocas=ocas,
        workloads=workloads,
    )


def _generation(path: str, name: str, problems: Problems) -> None:
    if name not in GENERATIONS:
        problems.add(path, f"must be one of {', '.join(GENERATIONS)}")


def _firmware(path: str, form: RevokedFirmwareForm, problems: Problems) -> RevokedFirmware:
    _generation(f"{path}.generation", form.generation, problems)
    if not form.versions and form.below is None:
        problems.add(path, "revokes nothing: list versions, or write below")
    versions = [_version(f"{path}.versions[{index}]", text, problems) for index, text in enumerate(form.versions)]
    problems.refuse_repeats(f"{path}.versions", form.versions)
    below = None if form.below is None else _version(f"{path}.below", form.below, problems)
    return RevokedFirmware(
        generation=form.generation,
        versions=frozenset(each for each in versions if each is not None),
        below=below,
    )


def _version(path: str, text: str, problems: Problems) -> FirmwareVersion | None:
    try:
        return FirmwareVersion.parse(text)
    except ParseError as error:
        problems.add(path, error.message)
        return None


def _workload(path: str, form: RevokedWorkloadForm, problems: Problems) -> RevokedWorkload:
    return RevokedWorkload(
        name=problems.name(f"{path}.name", form.name),
        versions=None if form.versions == "any" else problems.versions(f"{path}.versions", form.versions),
    )
