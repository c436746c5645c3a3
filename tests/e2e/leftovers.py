"""That a run leaves nothing behind: its processes by their mark, its files by their folder.

Everything that a run starts inherits one environment variable, which names the run's folder; everything that it writes
is in that folder, which is also the run's folder for temporary files.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path

MARK = "SEV_E2E_RUN"
_WAIT_SECONDS = 5.0
# pytest's own folder, made by pytest-xdist whether or not a test wants one.
_PYTEST_OWN = "pytest-of-"


def begin() -> Path:
    """Make the run's folder, and mark this process and all that it starts from now on."""
    # Not below a longer path: sockets come into it, and a socket's path has at most 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="e2e-"))
    os.environ[MARK] = os.environ["TMPDIR"] = str(folder)
    tempfile.tempdir = None  # it was looked up before
    return folder


def end(folder: Path) -> list[str]:
    """What is left of the run; then it is ended and removed.

    Processes may be on their way out, so they have a few seconds.
    """
    ends = time.monotonic() + _WAIT_SECONDS
    while (left := processes(folder)) and time.monotonic() < ends:
        time.sleep(0.05)
    found = [f"process {pid}: {words}" for pid, words in left.items()]
    found += [f"file {path}" for path in sorted(folder.iterdir()) if not path.name.startswith(_PYTEST_OWN)]
    for pid in left:
        _end(pid, folder)
    shutil.rmtree(folder, ignore_errors=True)
    os.environ.pop(MARK, None)
    os.environ.pop("TMPDIR", None)
    tempfile.tempdir = None
    return found


def _end(pid: int, folder: Path) -> None:
    with contextlib.suppress(OSError):
        descriptor = os.pidfd_open(pid)
        try:
            # Looked at once more: the descriptor is bound to whatever has the id by now.
            if pid in processes(folder):
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        finally:
            os.close(descriptor)


def processes(folder: Path) -> dict[int, str]:
    """The processes that carry the mark of the run, with their command lines; this one is not among them."""
    mark = f"{MARK}={folder}".encode()
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        # It may be somebody else's, or end while it is looked at.
        with contextlib.suppress(OSError):
            if mark in (entry / "environ").read_bytes().split(b"\0"):
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return found
