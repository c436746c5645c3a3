"""Firmware images, kernels and initrds on disk: measured in one pass, and again when the file changes.

Files are read in chunks, so memory does not grow with an initrd. A file counts as unchanged while its device, inode,
size and both of its times are; it is the owner's own disk, so this finds replacement, not malice.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from common.errors import InvalidInput, Reason
from common.sev.digest.compute import MeasuredFirmware, hash_chunks, measure_firmware
from common.sev.errors import ParseError

_T = TypeVar("_T")
_CHUNK = 1 << 20

Stamp = tuple[int, int, int, int, int]


def unusable(message: str) -> InvalidInput:
    """The error for something on the owner's disk that cannot be used as it is."""
    return InvalidInput(Reason.INVALID_CONFIGURATION, message)


def stamp(path: Path) -> Stamp:
    """What tells a changed file: device, inode, size, times of modification and of change in nanoseconds.

    Raises:
        InvalidInput: there is no such regular file.
    """
    try:
        return _stamp(path, path.stat())
    except OSError as error:
        raise unusable(f"{path}: {_words(error)}") from error


class ArtefactShelf:
    """Measurements of files, each kept until its file changes. Blocking: call it from a thread."""

    def __init__(self) -> None:
        self._firmwares: dict[Path, tuple[Stamp, MeasuredFirmware]] = {}
        self._hashes: dict[Path, tuple[Stamp, bytes]] = {}

    def firmware(self, path: Path) -> MeasuredFirmware:
        """The measured image in a file.

        Raises:
            InvalidInput: the file cannot be read, changes while it is read, or is no firmware image.
        """
        return _kept(self._firmwares, path, measure_firmware)

    def sha256(self, path: Path) -> bytes:
        """SHA-256 of a file, 32 bytes.

        Raises:
            InvalidInput: the file cannot be read, or changes while it is read.
        """
        return _kept(self._hashes, path, hash_chunks)


def _kept(kept: dict[Path, tuple[Stamp, _T]], path: Path, measure: Callable[[Iterator[bytes]], _T]) -> _T:
    known = kept.get(path)
    if known is not None and known[0] == stamp(path):
        return known[1]
    try:
        # O_NONBLOCK: a pipe in the file's place must not hold the thread.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            before = _stamp(path, os.fstat(fd))
            value = measure(iter(lambda: os.read(fd, _CHUNK), b""))
            after = _stamp(path, os.fstat(fd))
        finally:
            os.close(fd)
    except OSError as error:
        raise unusable(f"{path}: {_words(error)}") from error
    except ParseError as error:
        raise unusable(f"{path}: {error.message}") from error
    if before != after:
        raise unusable(f"{path}: changed while it was measured")
    kept[path] = (after, value)
    return value


def _stamp(path: Path, status: os.stat_result) -> Stamp:
    if not stat.S_ISREG(status.st_mode):
        raise unusable(f"{path}: is not a regular file")
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _words(error: OSError) -> str:
    text = error.strerror or "cannot be read"
    return text[:1].lower() + text[1:]
