"""A small disk in a mount name space of its own: it can be filled and made read-only under a process that uses it.

A process that does nothing holds the name space and ends with its standard input; others are entered into it.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

_UNSHARE = ("unshare", "--user", "--map-root-user", "--mount")
_TIMEOUT_S = 30.0


@dataclass(frozen=True, kw_only=True)
class PrivateDisk:
    """The disk, which only those who entered see.

    Attributes:
        folder: where it is.
        enter: a command that becomes another one in there.
    """

    folder: Path
    enter: Sequence[str]

    def run(self, *words: str) -> bool:
        """Run a command in there; whether it went well."""
        return (
            subprocess.run([*self.enter, *words], capture_output=True, check=False, timeout=_TIMEOUT_S).returncode == 0
        )

    def fill(self) -> None:
        """Leave no free byte."""
        assert not self.run(
            "dd", "if=/dev/zero", f"of={self.folder / 'ballast'}", "oflag=append", "conv=notrunc", "bs=4k"
        )

    def make_room(self) -> None:
        """Undo `fill`."""
        assert self.run("rm", str(self.folder / "ballast"))

    def protect(self, folder: Path) -> None:
        """Make a folder of the disk read-only for whoever opens anything in it from now on."""
        assert self.run("mount", "--bind", str(folder), str(folder))
        assert self.run("mount", "-o", "remount,bind,ro", str(folder))

    def unprotect(self, folder: Path) -> None:
        """Make it writable again."""
        assert self.run("mount", "-o", "remount,bind,rw", str(folder))


@contextmanager
def private_disk(folder: Path, size: int) -> Iterator[PrivateDisk]:
    """A disk of `size` bytes at `folder`; skips where nobody may mount one."""
    folder.mkdir()
    script = 'mount -t tmpfs -o size="$1" tmpfs "$2" && echo ready && exec cat'
    try:
        holder = subprocess.Popen(
            [*_UNSHARE, "sh", "-c", script, "sh", str(size), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
    except FileNotFoundError:
        pytest.skip("no unshare on this machine: install the Debian package `util-linux`")
    try:
        assert holder.stdout is not None
        if holder.stdout.readline() != "ready\n":
            pytest.skip("this machine lets nobody mount a file system in a name space of their own")
        enter = ("nsenter", "--target", str(holder.pid), "--user", "--mount")
        yield PrivateDisk(folder=folder, enter=enter)
    finally:
        holder.communicate(timeout=_TIMEOUT_S)
