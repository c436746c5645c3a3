"""Secrets from files on the verifier's own disk, read anew each time: whoever rotates one needs no reload.

They are small and local, and read on the event loop: a thread for each costs thirty times what reading costs.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from typing import ClassVar, TypeVar

from common.sev.abi import PACKET_MAX_SIZE
from verifier.documents.sources import FileSource
from verifier.secrets.base import no_answer

_T = TypeVar("_T")


class FileSecrets:
    """Asks files."""

    waits: ClassVar[bool] = False

    async def size(self, source: FileSource) -> int:
        """See `Asked`."""
        return _asked(_size, source)

    async def read(self, source: FileSource) -> bytes:
        """See `Asked`."""
        return _asked(_read, source)


def _asked(ask: Callable[[str], _T], source: FileSource) -> _T:
    try:
        return ask(source.path)
    except OSError as error:
        raise no_answer((error.strerror or "cannot be read").lower()) from error


def _size(path: str) -> int:
    status = os.stat(path)  # noqa: PTH116 -- a path that was checked; this is done for each launch
    _require_content(status)
    return status.st_size


def _read(path: str) -> bytes:
    # O_NONBLOCK: a pipe in the file's place must not hold everybody up.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        _require_content(os.fstat(fd))
        return os.read(fd, PACKET_MAX_SIZE + 1)
    finally:
        os.close(fd)


def _require_content(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
    if status.st_size == 0:
        raise OSError(errno.ENODATA, "empty")
