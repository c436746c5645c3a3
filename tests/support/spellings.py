"""How a secret may show in a log line, a message or a file: raw, escaped, in hex, in base64, forwards and backwards."""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

# Pages that were never written; a database's files are full of them, and no secret has so many zeros.
_NOTHING = bytes(512)


def spellings(secret: bytes) -> Iterator[bytes]:
    """Every spelling; in base64 also as it looks in the middle of something longer."""
    for value in (secret, secret[::-1]):
        yield value
        yield repr(value)[2:-1].encode()
        yield value.hex().encode()
        yield value.hex().upper().encode()
        for shift in range(3):
            text = base64.b64encode(bytes(shift) + value)[4 if shift else 0 : -4]
            yield text
            yield text.replace(b"+", b"-").replace(b"/", b"_")


def shown_in(secret: bytes, *places: str | bytes) -> list[bytes]:
    """The spellings of a secret that stand in any of the places."""
    shown = [place.encode() if isinstance(place, str) else place for place in places]
    return [spelling for spelling in spellings(secret) if any(spelling in place for place in shown)]


def leaks(secrets: Mapping[str, bytes], places: Mapping[str, bytes]) -> list[str]:
    """Which of the named secrets show in which of the named places, in any spelling."""
    found = []
    for where, place in places.items():
        dense = place.replace(_NOTHING, b"")
        for name, secret in secrets.items():
            if any(spelling in dense for spelling in set(spellings(secret))):
                found.append(f"{name} in {where}")
    return found


def planted(secret: bytes) -> Iterator[tuple[str, bytes]]:
    """A secret in every spelling, in the middle of something else, by other means than it is looked for by."""
    for direction, value in (("forwards", secret), ("backwards", bytes(reversed(secret)))):
        yield f"{direction}, raw", b"<" + value + b">"
        yield f"{direction}, hex", b"0x" + binascii.hexlify(value) + b";"
        yield f"{direction}, HEX", binascii.hexlify(value).upper()
        yield f"{direction}, as Python writes it", repr(b"<" + value + b">").encode()
        for before in (b"", b"x", b"xy"):
            for after in (b"", b"z", b"zz"):
                for encode in (base64.b64encode, base64.urlsafe_b64encode):
                    text = encode(before + value + after)
                    yield f"{direction}, {encode.__name__} after {before!r}, before {after!r}", text
                    yield f"{direction}, {encode.__name__} after {before!r}, before {after!r}, bare", text.rstrip(b"=")


def files_in(*folders: Path, but: Iterable[Path] = ()) -> dict[str, bytes]:
    """All files in the folders as they are now, each content once, but for those that are meant to hold secrets.

    Args:
        folders: looked through with all that is below them.
        but: files, and folders with all that is below them, that are left out.
    """
    left_out, seen, files = tuple(but), set[bytes](), dict[str, bytes]()
    for path in sorted(path for folder in folders for path in folder.rglob("*")):
        if any(path.is_relative_to(each) for each in left_out):
            continue
        try:
            content = path.read_bytes() if path.is_file() else b""
        except FileNotFoundError:
            continue  # a database at work makes files and takes them away
        digest = hashlib.sha256(content).digest()
        if content and digest not in seen:
            seen.add(digest)
            files[str(path)] = content
    return files
