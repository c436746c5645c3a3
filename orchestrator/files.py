"""Files that are written whole or not at all: what stood there before stays until everything is complete on disk.

Several files are one act: a certificate never stands beside another one's key.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from secrets import token_hex

PUBLIC = 0o666  # less the umask, as for any file
PRIVATE = 0o600


@dataclass(frozen=True, kw_only=True)
class NewFile:
    """A file to be.

    Attributes:
        path: where; a symbolic link is followed, a device or pipe is written to as it is.
        data: all of it.
        mode: its permissions, less the umask.
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
                    file.path.write_bytes(file.data)
                    continue
                target = file.path.resolve()
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


@contextmanager
def _staged(file: NewFile) -> Iterator[Path | None]:
    """The file, complete and synced beside its place; None for what cannot be replaced. Gone afterwards if unused."""
    if file.path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(file.path))
    if file.path.exists() and not file.path.is_file():
        yield None
        return
    target = file.path.resolve()
    temporary = target.with_name(f".{target.name}.{token_hex(4)}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, file.mode)
    except OSError as error:
        error.filename = str(file.path)  # the one that was asked for
        raise
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(file.data)
            stream.flush()
            os.fsync(descriptor)
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


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
