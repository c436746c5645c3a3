"""The documents' part of `check-config`: the folder, the files that workloads name, and whether secrets would fit.

Only what lies on this disk is looked at. Documents and secrets in the store are not: a name that leads nowhere is a
warning, which an applied document may answer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from common.clock import SystemClock
from common.errors import InvalidInput, SevattestError
from verifier.config import Config
from verifier.documents.sources import FileSource, GeneratedSource, Source, VaultSource
from verifier.documents.text import InvalidDocument
from verifier.documents.workload import Workload
from verifier.launches.steps import require_room
from verifier.library.artefacts import ArtefactShelf, stamp
from verifier.library.documents import Entry, snapshot
from verifier.library.folder import read_folder
from verifier.library.prepared import prepare
from verifier.library.warnings import overdue, warnings_for

_OTHERS_READ = 0o044


@dataclass(kw_only=True)
class Findings:
    """What was found.

    Attributes:
        problems: what stops the verifier or one of its workloads.
        warnings: what is allowed and deserves a second look.
        workloads: how many workloads have a version in force.
        documents: how many documents there are.
    """

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    workloads: int = 0
    documents: int = 0


def check_documents(config: Config, findings: Findings) -> None:
    """Look at the folder of documents and all that it names."""
    try:
        entries = read_folder(config.documents)
    except InvalidDocument as error:
        findings.problems += error.problems
        return
    documents = snapshot(0, entries)
    findings.workloads, findings.documents = len(documents.workloads), len(entries)
    if not documents.workloads and config.admin is None:
        findings.warnings.append(f"documents: {config.documents} holds no workload: nothing can be launched")
    shelf, seen = ArtefactShelf(), set[tuple[str, str]]()
    for entry in documents.entries:  # of one name, the newest comes first
        if entry.document is None:  # the folder's entries were read
            continue
        older = (entry.kind, entry.name) in seen
        seen.add((entry.kind, entry.name))
        if isinstance(entry.document, Workload):
            # Older versions serve explanations only: what is amiss with their files stops nothing.
            problems = findings.warnings if older else findings.problems
            problems += [f"{entry.file}: {each}" for each in _usable(entry, entry.document, shelf, config, findings)]
        if not older:
            warnings = (*warnings_for(entry.document, documents), *overdue(entry.document, SystemClock().now()))
            findings.warnings += [f"{entry.file}: {each}" for each in warnings]


def _usable(entry: Entry, workload: Workload, shelf: ArtefactShelf, config: Config, findings: Findings) -> list[str]:
    problems = []
    prepared = prepare(workload, shelf)
    if prepared.unusable is not None:
        problems.append(f"spec.measure: {prepared.unusable}")
    sizes = []
    for index, secret in enumerate(workload.secrets):
        path = f"spec.secrets[{index}].source"
        try:
            sizes.append(_least_size(secret.source))
        except InvalidInput as error:
            problems.append(f"{path}.file: {error.message}")
        if isinstance(secret.source, VaultSource) and config.vault is None:
            problems.append(f"{path}.vault: the configuration has no [vault]")
        if isinstance(secret.source, FileSource) and _others_read(Path(secret.source.path)):
            findings.warnings.append(f"{entry.file}: {path}.file: {secret.source.path} can be read by others")
    if prepared.unusable is None and len(sizes) == len(workload.secrets):
        try:
            require_room(workload.table_size(sizes), prepared.secret_area)
        except SevattestError as error:
            problems.append(f"spec.secrets: {error.message}")
    return problems


def _least_size(source: Source) -> int:
    """Bytes of a secret, as far as this disk tells: a secret elsewhere has one byte at least."""
    if isinstance(source, FileSource):
        return stamp(Path(source.path))[2]
    return source.size if isinstance(source, GeneratedSource) else 1


def _others_read(path: Path) -> bool:
    return path.is_file() and bool(path.stat().st_mode & _OTHERS_READ)
