"""The folder of documents: every `*.yaml`, `*.yml` and `*.json` in it, read as one set or not at all."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path

from verifier.documents.reader import parse_workload
from verifier.documents.text import TEXT_MAX, InvalidDocument
from verifier.documents.workload import Workload, version_order

SUFFIXES = (".yaml", ".yml", ".json")
# Names per file, for a set that a person can still look after.
FILES_MAX = 10_000


def read_folder(folder: Path) -> Mapping[str, Sequence[Workload]]:
    """All versions of all workloads, newest first.

    Raises:
        InvalidDocument: with every problem of every document; nothing of the set is usable then.
    """
    problems: list[str] = []
    by_name: dict[str, dict[object, Workload]] = {}
    for path in _files(folder):
        try:
            workload = parse_workload(_text(path), is_json=path.suffix == ".json", folder=path.parent, source=path.name)
        except InvalidDocument as error:
            problems += [f"{path.name}: {problem}" for problem in error.problems]
            continue
        versions = by_name.setdefault(workload.name, {})
        order = version_order(workload.version)
        if (other := versions.get(order)) is not None:
            problems.append(
                f"{path.name}: metadata: {workload.name} {workload.version} is in {other.source} already, "
                f"as {other.version}"
            )
        versions[order] = workload
    if problems:
        raise InvalidDocument(*problems)
    return {
        name: tuple(sorted(versions.values(), key=lambda each: version_order(each.version), reverse=True))
        for name, versions in by_name.items()
    }


def _files(folder: Path) -> list[Path]:
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise InvalidDocument(f"documents: {folder}: {(error.strerror or 'cannot be read').lower()}") from error
    files = [path for path in entries if path.suffix in SUFFIXES and not path.name.startswith(".")]
    if len(files) > FILES_MAX:
        raise InvalidDocument(f"documents: {folder} holds more than {FILES_MAX} documents")
    return files


def _without_waiting(path: str, flags: int) -> int:
    """A pipe in the file's place must not hold the process."""
    return os.open(path, flags | os.O_NONBLOCK)


def _text(path: Path) -> bytes:
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise InvalidDocument("is not a regular file")
            return file.read(TEXT_MAX + 1)
    except OSError as error:
        raise InvalidDocument((error.strerror or "cannot be read").lower()) from error
