"""Launches on disk: one folder each, with the launch's record and the files that its machine is given.

Why folders and not a database: a machine needs a private folder anyway (session, GODH, socket, log); the record then
stands and falls with what it describes, there is exactly one writer for each, and an operator reads it with `cat`.

A record is replaced atomically: written to a new file, fsynced, renamed, and the folder fsynced. So after a kill -9 or
a power cut at any point there is the old record or the new one, whole. A folder without a record belongs to no launch
(the first record is written before anything is started, and removed before the rest): it is swept away at the start.
This layer knows bytes and ids only; what a record says is `launches/launch.py`'s business.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from uuid import UUID

from common.errors import InvalidInput, Reason, Unavailable
from common.ids import canonical_uuid

RECORD = "record.json"
_NEW_RECORD = "record.json.new"
_LAUNCHES = "launches"
_LOCK = "lock"
_RECORD_MAX = 1 << 20  # bytes; a record is some two kilobytes


class LaunchFolders:
    """The folders under `state_dir/launches`, held by one process at a time.

    All calls block on the disk; on an event loop they belong into a thread.
    """

    def __init__(self, state_dir: Path) -> None:
        self._state_dir = state_dir
        self._root = state_dir / _LAUNCHES
        self._lock: int | None = None

    def open(self) -> None:
        """Make the folders and take them for this process.

        Raises:
            InvalidInput: `INVALID_CONFIGURATION`; they cannot be made, or another process has them.
        """
        try:
            self._state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._root.mkdir(mode=0o700, exist_ok=True)
            # An existing folder may be open to others; what QEMU is given must not be.
            self._root.chmod(0o700)
            lock = os.open(self._state_dir / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise _unusable(self._state_dir, error) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            raise InvalidInput(
                Reason.INVALID_CONFIGURATION,
                f"state_dir: another sev-host-agent uses {self._state_dir}",
                key="state_dir",
            ) from error
        self._lock = lock

    def close(self) -> None:
        """Let another process have the folders."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def folder(self, launch: UUID) -> Path:
        """Where the launch's files are."""
        return self._root / str(launch)

    def records(self) -> Iterator[tuple[UUID, Path, bytes]]:
        """Every record, with its path; folders that belong to no launch are removed on the way.

        Raises:
            InvalidInput: `INVALID_CONFIGURATION`; a record cannot be read. Names the file.
        """
        for folder in sorted(self._root.iterdir()):
            launch = canonical_uuid(folder.name)
            if launch is None or not folder.is_dir():
                continue
            record = folder / RECORD
            try:
                with record.open("rb") as file:
                    data = file.read(_RECORD_MAX + 1)
            except FileNotFoundError:
                self.remove(launch)
                continue
            except OSError as error:
                raise _unusable(record, error) from error
            (folder / _NEW_RECORD).unlink(missing_ok=True)
            yield launch, record, data

    def save(self, launch: UUID, record: bytes) -> None:
        """Replace the launch's record; it is on the disk when this returns. Makes the folder where there is none.

        Raises:
            Unavailable: `STORE_UNAVAILABLE`; the old record stands, if there was one.
        """
        folder = self.folder(launch)
        made = False
        try:
            made = _make(folder)
            descriptor = os.open(
                folder / _NEW_RECORD, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
            )
            with open(descriptor, "wb") as file:  # noqa: PTH123 -- from a descriptor
                file.write(record)
                file.flush()
                os.fsync(file.fileno())
            (folder / _NEW_RECORD).replace(folder / RECORD)
            _sync(folder)
            if made:
                _sync(self._root)
        except OSError as error:
            if made:
                _remove(folder)  # nobody knows of a launch that was never written down
            raise Unavailable(
                Reason.STORE_UNAVAILABLE, f"the launch's record cannot be written: {error.strerror or error}"
            ) from error

    def clear(self, launch: UUID, *, keep: Collection[str]) -> None:
        """Remove the launch's files, but for its record and those named in `keep`. Failing to is no error."""
        try:
            entries = list(os.scandir(self.folder(launch)))
        except OSError:
            return
        for entry in entries:
            if entry.name != RECORD and entry.name not in keep:
                _remove(Path(entry.path))

    def remove(self, launch: UUID) -> None:
        """Remove the launch, its record first. Failing to is no error: the next start sweeps what is left."""
        folder = self.folder(launch)
        try:
            (folder / RECORD).unlink(missing_ok=True)
            _sync(folder)
        except OSError:
            return
        _remove(folder)


def _make(folder: Path) -> bool:
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        return False
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unusable(path: Path, error: OSError) -> InvalidInput:
    return InvalidInput(Reason.INVALID_CONFIGURATION, f"state_dir: {path}: {error.strerror or error}", key="state_dir")
