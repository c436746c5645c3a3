"""Processes that outlive the agent: known by pid and start time, watched, and ended.

Our own are held at a gate first, and ended with their family. Somebody else's are adopted by pid, and get signals
through their pidfd alone: nothing else is known to be theirs.

Linux facts used, all from proc(5), pidfd_open(2), setsid(2): a process's start time survives execve; a pidfd stays
bound to one process and becomes readable when it ends; a session keeps its id while a member lives.
"""

from __future__ import annotations

import asyncio
import errno
import os
import select
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from common.errors import PlatformFailed, Reason, Unavailable
from host_agent.hypervisors.base import MachineId

# The shell waits for one line on its stdin and becomes the program; if the agent dies first, it reads the end of the
# pipe and is gone. The program's stdin is empty.
_GATE = 'read -r go || exit 125; exec "$@" </dev/null'
_SHELL = "/bin/sh"
_MARKER = "SEV_HOST_AGENT_LAUNCH"  # in the environment of the machine and of everything that it starts
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
# What belongs to the agent alone and would only confuse the machine's program.
_NOT_INHERITED = ("NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "WATCHDOG_USEC", "WATCHDOG_PID")
_NOT_INHERITED_PREFIXES = ("SEVATTEST_", "GRPC_")
_NO_ROOM = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})  # the kernel has not looked at all
_SWEEPS = 20  # rounds over /proc for a family that forks while it is being ended
_SWEEP_PAUSE = 0.01  # seconds between them


@dataclass(frozen=True, kw_only=True)
class _Stat:
    state: str
    session: int
    start_time: int


class _Outliving(subprocess.Popen[bytes]):
    """A child that is meant to go on when the agent ends, so its object's end is no occasion for a warning."""

    def __del__(self) -> None:
        """Say nothing."""


class Process:
    """One process of one boot, and if it is ours the session that it leads.

    Must be made on the event loop that watches it.
    """

    def __init__(self, identity: MachineId, pidfd: int, marker: str | None, child: _Outliving | None) -> None:
        self.identity = identity
        self._pidfd: int | None = pidfd
        self._marker = marker
        self._child = child
        self._gone = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(pidfd, self._on_exit)

    @classmethod
    def spawn(cls, argv: Sequence[str], *, folder: Path, log: BinaryIO, marker: str) -> Process:
        """A process that will become `argv` when its gate opens, leader of its own session, in `folder`.

        Args:
            argv: program and arguments.
            folder: its working directory.
            log: takes its stdout and stderr.
            marker: names the launch in its environment, by which `end` knows its family.

        Raises:
            PlatformFailed: `HYPERVISOR_FAILED`; the kernel refuses.
        """
        child = None
        try:
            boot = boot_id()
            # The child closes every descriptor but these: a listening socket that leaked into a machine would keep the
            # port taken after the agent's end.
            child = _Outliving(
                [_SHELL, "-c", _GATE, "sev-host-agent", *argv],
                cwd=folder,
                env=_environment(marker),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            # A child that nobody has waited for cannot be gone.
            stat = _read_stat(child.pid)
            pidfd = os.pidfd_open(child.pid)
        except OSError as error:
            if child is not None:
                with child:  # or it would stay a zombie
                    child.kill()
            raise PlatformFailed(
                Reason.HYPERVISOR_FAILED, f"no process can be started: {error.strerror or error}"
            ) from error
        identity = MachineId(pid=child.pid, start_time=stat.start_time if stat else 0, boot_id=boot)
        return cls(identity, pidfd, marker, child)

    @classmethod
    def attach(cls, identity: MachineId, *, marker: str | None) -> Process | None:
        """The process that `identity` names, if it still exists and is the same; None for any other with its pid.

        Args:
            identity: as it was written down.
            marker: of its launch; None for a process that was adopted.

        Raises:
            Unavailable: `PLATFORM_UNAVAILABLE`; the kernel does not say whether it exists.
        """
        seen = None if identity.boot_id != boot_id() else _look_at(identity.pid)
        if seen is None:
            return None
        # The descriptor is bound to whatever had the pid just now; only if that is ours may anything be sent to it.
        pidfd, stat = seen
        if stat.start_time != identity.start_time:
            os.close(pidfd)
            return None
        return cls(identity, pidfd, marker, None)

    @classmethod
    def adopt(cls, pid: int) -> Process | None:
        """Somebody else's process, whatever has this pid now; None where there is none.

        The caller must see, after this, that it is still the one that was meant.

        Raises:
            Unavailable: `PLATFORM_UNAVAILABLE`; the kernel does not say whether there is one.
        """
        boot, seen = boot_id(), _look_at(pid)
        if seen is None:
            return None
        pidfd, stat = seen
        return cls(MachineId(pid=pid, start_time=stat.start_time, boot_id=boot), pidfd, None, None)

    @property
    def alive(self) -> bool:
        """It has not ended."""
        if self._pidfd is None:
            return not self._gone.is_set()
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return not poll.poll(0)

    @property
    def exit_code(self) -> int | None:
        """Its exit code, negative for a signal's number, where it was our child and has ended."""
        return None if self._child is None else self._child.poll()

    def open_gate(self) -> None:
        """Let it become its program. Of a process that has died meanwhile, or passed before, nothing is expected."""
        if self._child is not None and self._child.stdin is not None and not self._child.stdin.closed:
            with suppress(OSError):
                self._child.stdin.write(b"\n")
                self._child.stdin.flush()
            with suppress(OSError):
                self._child.stdin.close()

    async def wait_gone(self) -> None:
        """Return when it has ended."""
        await self._gone.wait()

    async def end(self, grace: float) -> None:
        """End it, and its session if it is ours: SIGTERM, `grace` seconds, SIGKILL; return when all are gone.

        Raises:
            Unavailable: `PLATFORM_UNAVAILABLE`; the kernel does not let go of it, for example in a hung driver.
        """
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self.alive:
                self._signal(number)
                with suppress(TimeoutError):
                    async with asyncio.timeout(grace):
                        await self._gone.wait()
        if self.alive:
            raise Unavailable(Reason.PLATFORM_UNAVAILABLE, "the machine was killed, and its process does not end")
        if self._marker is not None:
            await end_family(self.identity.pid, self._marker)

    def close(self) -> None:
        """Stop watching; the process goes on."""
        if self._pidfd is not None:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = None
        if self._child is not None and self._child.stdin is not None:
            with suppress(OSError):
                self._child.stdin.close()

    def _on_exit(self) -> None:
        if self._pidfd is not None:
            self._loop.remove_reader(self._pidfd)
        if self._child is not None:
            self._child.poll()  # or it would stay a zombie
        self._gone.set()

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError, PermissionError):
            if self._marker is not None:
                # While its leader, which the pidfd watches, lives, the group's number is ours.
                os.killpg(self.identity.pid, number)
            elif self._pidfd is not None:
                signal.pidfd_send_signal(self._pidfd, number)


async def end_family(session: int | None, marker: str) -> None:
    """Kill what a process that has ended left behind.

    Args:
        session: the session that it led; by this number alone another's processes could be meant. None for whatever
            has the mark, also in sessions of its own.
        marker: of its launch, which its descendants carry in their environment.
    """
    for _ in range(_SWEEPS):
        members = [pid for pid in _pids() if _is_family(pid, session, marker)]
        if not members:
            return
        for pid in members:
            _kill_member(pid, session, marker)
        await asyncio.sleep(_SWEEP_PAUSE)


def boot_id() -> str:
    """Which run of the kernel this is."""
    return _BOOT_ID.read_text(encoding="utf-8").strip()


def _look_at(pid: int) -> tuple[int, _Stat] | None:
    """A pidfd on whatever has this pid, and what that is; None where nothing has it that lives.

    Raises:
        Unavailable: the kernel does not say; who takes it for gone would give up a guest that runs.
    """
    try:
        pidfd = os.pidfd_open(pid)
        try:
            stat = _read_stat(pid)
        except OSError:
            os.close(pidfd)
            raise
    except (ValueError, OverflowError):
        return None
    except OSError as error:
        if error.errno not in _NO_ROOM:
            return None
        raise Unavailable(
            Reason.PLATFORM_UNAVAILABLE, f"the process {pid} cannot be looked for: {error.strerror}"
        ) from error
    if stat is None or stat.state in "ZX":
        os.close(pidfd)
        return None
    return pidfd, stat


def _is_family(pid: int, session: int | None, marker: str) -> bool:
    try:
        stat = _read_stat(pid)
        if stat is None or session not in {None, stat.session} or stat.state in "ZX":
            return False
        environment = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False
    return f"{_MARKER}={marker}".encode() in environment.split(b"\0")


def _kill_member(pid: int, session: int | None, marker: str) -> None:
    with suppress(OSError):
        pidfd = os.pidfd_open(pid)
        try:
            # Looked at once more: the descriptor is bound to whatever has the pid by now.
            if _is_family(pid, session, marker):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        finally:
            os.close(pidfd)


def _environment(marker: str) -> Mapping[str, str]:
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in _NOT_INHERITED and not name.startswith(_NOT_INHERITED_PREFIXES)
    }
    return {**inherited, _MARKER: marker}


def _pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _read_stat(pid: int) -> _Stat | None:
    try:
        line = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise
        return None
    # The command's name is in parentheses and may hold anything; the last one ends it. Then come fields 3, 4, …
    fields = line[line.rfind(b")") + 1 :].split()
    return _Stat(state=fields[0].decode(), session=int(fields[3]), start_time=int(fields[19]))
