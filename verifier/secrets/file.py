"""Secrets from files, and those that are made for one launch.

A file is read anew for each release: whoever rotates it needs no reload. Its name goes to the owner's log only; the
host's answer says that a secret is unavailable and no more.
"""

from __future__ import annotations

import asyncio
import errno
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from common.errors import Reason, Unavailable
from common.sev.abi import PACKET_MAX_SIZE
from common.sev.secret import SecretEntry
from common.telemetry.log import SILENCE, Log
from verifier.documents.workload import ATTESTED_SIZE, SecretSpec

_T = TypeVar("_T")


class FileSecrets:
    """The `SecretSource` over files and the random generator."""

    def __init__(self, random: Callable[[int], bytes] = os.urandom, log: Log = SILENCE) -> None:
        """Take the generator's source of random bytes, and the owner's log."""
        self._random = random
        self._log = log

    async def sizes(self, specs: Sequence[SecretSpec]) -> tuple[int, ...]:
        """See `SecretSource`."""
        return await asyncio.to_thread(lambda: tuple(self._asked(spec, _size, ATTESTED_SIZE) for spec in specs))

    async def read(self, specs: Sequence[SecretSpec]) -> tuple[SecretEntry, ...]:
        """See `SecretSource`."""
        return await asyncio.to_thread(
            lambda: tuple(spec.entry(self._asked(spec, _read, self._random(ATTESTED_SIZE))) for spec in specs)
        )

    def _asked(self, spec: SecretSpec, ask: Callable[[Path], _T], generated: _T) -> _T:
        if spec.file is None:
            return generated
        try:
            return ask(spec.file)
        except OSError as error:
            self._log.error("source.unavailable", file=str(spec.file), error=error)
            raise Unavailable(Reason.SECRET_UNAVAILABLE, "a secret's source has no answer") from error


def _size(path: Path) -> int:
    status = path.stat()
    _require_content(status)
    return status.st_size


def _read(path: Path) -> bytes:
    # O_NONBLOCK: a pipe in the file's place must not hold the thread.
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
