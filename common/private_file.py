"""Small files that hold a secret: read only where nobody else could, made for their owner alone."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from common.errors import InvalidInput, Reason


def read_private(path: Path, most: int) -> bytes:
    """What is in a file that belongs to us (or to root) and that nobody else can use.

    Args:
        path: the file; a symbolic link is followed, and what it leads to is judged.
        most: bytes that it may have.

    Raises:
        InvalidInput: INVALID_CONFIGURATION; there is no such file, others can use it, or it is larger. The message
            starts with the path and holds nothing of the content.
    """
    try:
        # O_NONBLOCK: a pipe in the file's place must not hold us.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise _unusable(path, (error.strerror or "cannot be opened").lower()) from error
    try:
        status = os.fstat(fd)
        mode = stat.S_IMODE(status.st_mode)
        if not stat.S_ISREG(status.st_mode):
            raise _unusable(path, "is not a regular file")
        if status.st_uid not in (os.geteuid(), 0):
            raise _unusable(path, "belongs to another user")
        if mode & 0o077:
            raise _unusable(path, f"can be used by others (mode {mode:04o})", hint=f"chmod 0400 {path}")
        data = os.read(fd, most + 1)
    except OSError as error:
        raise _unusable(path, (error.strerror or "cannot be read").lower()) from error
    finally:
        os.close(fd)
    if len(data) > most:
        raise _unusable(path, f"has more than {most} bytes")
    return data


def write_private(path: Path, data: bytes) -> None:
    """Make a file, mode 0600, durable when this returns; a file that exists is never touched.

    Raises:
        InvalidInput: INVALID_CONFIGURATION; there is one already, or it cannot be made. Nothing is left behind.
    """
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except FileExistsError:
        raise _unusable(path, "exists, and is never overwritten") from None
    except OSError as error:
        raise _unusable(path, (error.strerror or "cannot be made").lower()) from error
    try:
        os.fchmod(fd, 0o600)
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(fd, rest) :]
        os.fsync(fd)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise _unusable(path, (error.strerror or "cannot be written").lower()) from error
    finally:
        os.close(fd)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _unusable(path: Path, what: str, **fields: str) -> InvalidInput:
    return InvalidInput(Reason.INVALID_CONFIGURATION, f"{path}: {what}", **fields)
