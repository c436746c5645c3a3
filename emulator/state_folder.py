"""The folder that a software platform lives in: names, who has it open, private files written atomically.

sev.sock         the device socket, while the platform is served
ask_ark.cert     ASK || ARK of this platform: the root that a verifier has to name
kds/<ID>.cert    the CEK as its key service would hand it out; ID is upper-case hex, 128 digits
chip/            what is burnt into the chip: made once, never changed
identity.json    what PEK_GEN and its like change: PEK, OCA, PDH, owner
lock             held by the serving process
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

from emulator.errors import StateFolderUnusable


class StateFolder:
    """Paths of one platform's folder; makes the folder (0700) when it is missing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.socket = path / "sev.sock"
        self.ask_ark = path / "ask_ark.cert"
        self.kds = path / "kds"
        self.chip = path / "chip"
        self.identity = path / "identity.json"
        self._lock: int | None = None

    def make(self) -> None:
        """Make the folder if it is missing."""
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)

    def lock(self) -> None:
        """Claim the folder for this process, until `unlock` or its end.

        Raises:
            StateFolderUnusable: another process serves it.
        """
        handle = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(handle)
            raise StateFolderUnusable(f"another process serves the platform in {self.path}") from None
        self._lock = handle

    def sweep(self) -> None:
        """Remove what a killed process left half-written, private keys among it; the folder must be locked."""
        unfinished = tuple(f".{path.name}." for path in (self.chip, self.identity, self.ask_ark))
        litter = [path for path in self.path.iterdir() if path.name.startswith(unfinished)]
        if self.kds.is_dir():
            litter += self.kds.glob(".*.cert.*")
        for path in litter:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    def unlock(self) -> None:
        """Give the folder back; does nothing when it is not held."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def write_file(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Replace `path` with `data` at once: a crash leaves the old file or the new one, on the disk."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
