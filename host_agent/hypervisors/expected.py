"""Which machine a launch waits for, and whether a process is that one: what is asked before it is believed or ended.

The first line of `launch.cfg`, a comment to QEMU, says for which launch the file is, and in which boot and since when a
machine is waited for. So the note comes and goes with the file itself, and an agent that restarts reads it again.

Who listens at the machine's place is no proof: the kernel tells who called listen(2) (SO_PEERCRED), which can be a
manager that hands the socket on, or systemd. The guest's machine began after the file was asked for and was told to
read it. Sources: unix(7), proc(5) for stat, cmdline and status; clock_gettime(2), whose CLOCK_BOOTTIME is the clock of
a process's start time.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from uuid import UUID

from host_agent.hypervisors.base import MachineId
from host_agent.hypervisors.process import boot_id

_HEAD = re.compile(r"# sevattest launch ([0-9a-f-]{36}) boot ([0-9a-f-]{36}) since ([0-9]{1,19})\n")
_HEAD_MAX = 256  # bytes
_READS = frozenset({b"-readconfig", b"--readconfig"})


@dataclass(frozen=True, kw_only=True)
class Expected:
    """A machine that is to come.

    Attributes:
        file: `launch.cfg`, absolute, as the machine's command line names it.
        launch: the launch that it is for.
        boot_id: of the kernel's run in which it was asked for.
        since: clock ticks since boot; the machine begins later.
    """

    file: Path
    launch: UUID
    boot_id: str
    since: int

    @classmethod
    def from_now(cls, file: Path, launch: UUID) -> Expected:
        """One that is asked for now; called before anything is started or written."""
        ticks = int(time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK"))
        return cls(file=file, launch=launch, boot_id=boot_id(), since=ticks)

    @classmethod
    def read(cls, file: Path, launch: UUID) -> Expected | None:
        """The one that a former run of the agent asked for; None where none can come any more.

        That is where the file is gone, or another launch's, or left over from before the host went down.
        """
        try:
            descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            return None
        try:
            head = _HEAD.match(os.read(descriptor, _HEAD_MAX).decode("ascii", errors="replace"))
        except OSError:
            return None
        finally:
            os.close(descriptor)
        if head is None or head[1] != str(launch) or head[2] != boot_id():
            return None
        return cls(file=file, launch=launch, boot_id=head[2], since=int(head[3]))

    @property
    def head(self) -> str:
        """The first line of the file."""
        return f"# sevattest launch {self.launch} boot {self.boot_id} since {self.since}\n"

    def objection(self, found: MachineId) -> str | None:
        """Why the process `found` is not the machine; None where it is.

        The caller holds a pidfd on it, and asks whether it lives after this.
        """
        if found.pid in {1, os.getpid(), *_ancestors()}:
            return "is the agent's own, or one that the agent runs under"
        if found.boot_id != self.boot_id or found.start_time < self.since:
            return "began before the launch"
        if not _reads(found.pid, self.file):
            return f"was not started with -readconfig {self.file}"
        return None


def _reads(pid: int, file: Path) -> bool:
    """Whether the command line of a process has QEMU read `file`."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    named = [value for option, value in pairwise(words) if option in _READS and value.startswith(b"/")]
    # The agent's own path and the operator's may differ by a link, as /var/run and /run do.
    return any(os.path.realpath(value) == os.path.realpath(os.fsencode(file)) for value in named)


def _ancestors() -> Iterator[int]:
    """Pids of the agent's parent, its parent, and so on."""
    pid = os.getppid()
    while pid > 0:
        yield pid
        try:
            status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return
        parent = re.search(r"^PPid:\t(\d+)$", status, re.MULTILINE)
        pid = int(parent[1]) if parent else 0
