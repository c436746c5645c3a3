"""The folder of documents: every `*.yaml`, `*.yml` and `*.json` in it, read as one set or not at all."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from common.versions import version_order
from verifier.documents.platform import KnownPlatform
from verifier.documents.reader import kind_of, read_document
from verifier.documents.text import TEXT_MAX, InvalidDocument
from verifier.library.documents import Entry

SUFFIXES = (".yaml", ".yml", ".json")
# Names per file, for a set that a person can still look after.
FILES_MAX = 10_000


def read_folder(folder: Path) -> tuple[Entry, ...]:
    """All versions of all documents in the folder.

    Raises:
        InvalidDocument: with every problem of every document; nothing of the set is usable then.
    """
    problems: list[str] = []
    entries: dict[tuple[str, str, object], Entry] = {}
    for path in _files(folder):
        try:
            entry = _entry(path)
        except InvalidDocument as error:
            problems += [f"{path.name}: {problem}" for problem in error.problems]
            continue
        place = (entry.kind, entry.name, version_order(entry.version))
        if (other := entries.get(place)) is not None:
            problems.append(
                f"{path.name}: metadata: {entry.name} {entry.version} is in {other.file} already, as {other.version}"
            )
        entries[place] = entry
    problems += _repeated_chips(tuple(entries.values()))
    if problems:
        raise InvalidDocument(*problems)
    return tuple(entries.values())


def _entry(path: Path) -> Entry:
    text, is_json = _text(path), path.suffix == ".json"
    document = read_document(text, is_json=is_json, folder=path.parent, source=path.name)
    return Entry(
        kind=kind_of(document),
        name=document.name,
        version=document.version,
        text=text,
        is_json=is_json,
        file=path.name,
        apply_time=None,
        document=document,
    )


def _repeated_chips(entries: tuple[Entry, ...]) -> list[str]:
    """A problem for each platform document in force whose chip another one has, too."""
    newest: dict[str, Entry] = {}
    for entry in sorted(entries, key=lambda each: version_order(each.version)):
        if entry.kind == "Platform":
            newest[entry.name] = entry
    problems, chips = [], dict[str, Entry]()
    for entry in sorted(newest.values(), key=lambda each: each.file):
        assert isinstance(entry.document, KnownPlatform)  # noqa: S101 -- the folder's entries were read
        other = chips.setdefault(entry.document.fingerprint, entry)
        if other is not entry:
            problems.append(f"{entry.file}: spec.cek: is the chip of {other.name} already, in {other.file}")
    return problems


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
