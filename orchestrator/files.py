"""Files that are written whole or not at all: what stood there before stays until everything is complete on disk.

Several files are one act: a certificate never stands beside another one's key. What is no regular file, and what a
name like /dev/stdout says is open already, has nothing to be kept: it is written to as it is.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from secrets import token_hex

PUBLIC = 0o666  # less the umask, as for any file
PRIVATE = 0o600

_LINKS_MAX = 40  # as the kernel's MAXSYMLINKS (linux/namei.h)
_OPEN_FILE = re.compile(r"/proc/(\d+)(?:/task/\d+)?/fd/(\d+)")


@dataclass(frozen=True, kw_only=True)
class NewFile:
    """A file to be.

    Attributes:
        path: where; a symbolic link is followed, a device, pipe or open file is written to as it is.
        data: all of it.
        mode: its permissions, less the umask. A `PUBLIC` file keeps those and the owner of the one that it replaces,
            where the system lets us; a `PRIVATE` one never does, since the old one may have been open to others.
    """

    path: Path
    data: bytes = field(repr=False)
    mode: int = PUBLIC


def write_all(files: Sequence[NewFile]) -> None:
    """Write all of `files`, or leave everything as it was.

    Raises:
        OSError: names the file; nothing has changed.
    """
    with ExitStack() as stack:
        staged = [(stack.enter_context(_staged(file)), file) for file in files]
        replaced: list[tuple[Path, Path | None]] = []
        try:
            for temporary, file in staged:
                if temporary is None:
                    _write_stream(file)
                    continue
                target = place_of(file.path)
                # The last one needs no way back: a rename is done or not.
                if file is not files[-1]:
                    replaced.append((target, stack.enter_context(_kept(target))))
                _rename(temporary, target, file.path)
        except BaseException:
            for target, old in replaced:
                if old is None:
                    target.unlink(missing_ok=True)
                else:
                    old.replace(target)
            raise


def place_of(path: Path) -> Path:
    """Where a file stands or will stand: links followed.

    Raises:
        OSError: names the path; links lead round in a circle (ELOOP), or it cannot be reached.
    """
    with suppress(FileNotFoundError):
        path.stat()
    return Path(os.path.realpath(path))


@contextmanager
def _staged(file: NewFile) -> Iterator[Path | None]:
    """The file, complete and synced beside its place; None for what cannot be replaced. Gone afterwards if unused."""
    target = place_of(file.path)
    if file.path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(file.path))
    if (file.path.exists() and not file.path.is_file()) or _open_file(file.path):
        yield None
        return
    temporary = target.with_name(f".{target.name}.{token_hex(4)}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, file.mode)
    except OSError as error:
        error.filename = str(file.path)  # the one that was asked for
        raise
    try:
        _fill(descriptor, file, target)
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _fill(descriptor: int, file: NewFile, target: Path) -> None:
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(file.data)
            stream.flush()
            if file.mode == PUBLIC:
                _look_like(descriptor, target)
            os.fsync(descriptor)
    except OSError as error:
        error.filename = str(file.path)  # what writes and syncs knows no name
        raise


def _look_like(descriptor: int, target: Path) -> None:
    """Give a new file the owner and permissions of the one that it replaces, as far as the system lets us."""
    with suppress(OSError):
        old = target.stat()
        with suppress(OSError):
            os.fchown(descriptor, old.st_uid, old.st_gid)
        os.fchmod(descriptor, old.st_mode & 0o777)


def _open_file(path: Path) -> tuple[str, str] | None:
    """Process and descriptor where a path names an open file, as /dev/stdout does; None for all others."""
    for _ in range(_LINKS_MAX):
        path = Path(os.path.realpath(path.parent)) / path.name
        if found := _OPEN_FILE.fullmatch(str(path)):
            return found[1], found[2]
        if not path.is_symlink():
            break
        path = path.parent / path.readlink()
    return None


def _write_stream(file: NewFile) -> None:
    """Write to what cannot be replaced. An open file goes on where it is, and loses nothing."""
    try:
        opened = _open_file(file.path)
        if opened and opened[0] == str(os.getpid()):
            descriptor = os.dup(int(opened[1]))
        else:
            descriptor = os.open(file.path, os.O_WRONLY | os.O_APPEND | os.O_NOCTTY | os.O_CLOEXEC)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(file.data)
    except OSError as error:
        error.filename = str(file.path)
        raise


@contextmanager
def _kept(target: Path) -> Iterator[Path | None]:
    """A second name for what stands at `target`, in case that it must come back; None where nothing does."""
    old = target.with_name(f".{target.name}.{token_hex(4)}.old")
    try:
        os.link(target, old)
    except FileNotFoundError:
        yield None
        return
    except OSError as error:
        error.filename, error.filename2 = str(target), None
        raise
    try:
        yield old
    finally:
        old.unlink(missing_ok=True)


def _rename(temporary: Path, target: Path, asked: Path) -> None:
    try:
        temporary.replace(target)
    except OSError as error:
        error.filename, error.filename2 = str(asked), None
        raise
