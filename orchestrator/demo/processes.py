"""Processes that a demonstration or a test starts: each says one line when it is ready, each is ended by its own pid.

Standard output carries the ready line (`NAME: serving on WHERE`), standard error goes to a log file. The processes get
a session of their own, so that Ctrl-C in the terminal reaches only the demonstration, which then ends them in order.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from common.errors import PlatformFailed, Reason

_READY = ": serving on "
_STOP_SECONDS = 5.0


def script(name: str) -> list[str]:
    """The command of one of this distribution's scripts: the one beside the interpreter, or its module.

    Args:
        name: `sevattest`, `sev-host-agent` or `sev-verifier`.
    """
    beside = Path(sys.executable).parent / name
    if beside.is_file():
        return [str(beside)]
    module = {"sevattest": "orchestrator.cli", "sev-host-agent": "host_agent.cli", "sev-verifier": "verifier.cli"}[name]
    return [sys.executable, "-c", f"import sys; from {module} import main; sys.exit(main())"]


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Lets a signal wait until a process that is just being started is written down.

    An exception out of a signal handler between the fork and the assignment would lose the process for ever.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # handlers run in the main thread, and only it may set them
        return
    arrived: list[int] = []
    ends = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, lambda number, _frame: arrived.append(number)) for number in ends}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for caught in arrived:
            signal.raise_signal(caught)


class Service:
    """One process that serves until it is stopped.

    Attributes:
        name: for messages and the log file's name.
        where: what the ready line named: an address or a path; empty before it is ready.
    """

    def __init__(self, name: str, command: Sequence[str], *, logs: Path, environ: Mapping[str, str]) -> None:
        self.name = name
        self.where = ""
        self._command = list(command)
        self._environ = dict(environ)
        self._log = logs / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The process's id.

        Raises:
            RuntimeError: it was not started.
        """
        if self._process is None:
            raise RuntimeError(f"{self.name} was not started")
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the process is there."""
        return self._process is not None and self._process.poll() is None

    def start(self, settings: Mapping[str, str] | None = None) -> None:
        """Start the process; does not wait for it.

        Args:
            settings: variables for this start only.
        """
        self.where = ""
        with self._log.open("ab") as log, signals_held():
            self._process = subprocess.Popen(  # noqa: S603 -- our own scripts, no shell
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**self._environ, **(settings or {})},
                start_new_session=True,
            )

    def wait_ready(self, timeout: float = 30.0) -> str:
        """Wait for the ready line, which comes once in a process's life; whoever asks again is told what it said.

        Returns:
            Where the process serves.

        Raises:
            PlatformFailed: it ended, or said nothing in time.
        """
        process = self._process
        if process is None or process.stdout is None:
            raise PlatformFailed(Reason.INTERNAL, f"{self.name} was not started")
        if self.where and self.running:
            return self.where
        line = b""
        ends = time.monotonic() + timeout
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not selector.select(max(0.0, ends - time.monotonic())):
                    raise PlatformFailed(Reason.INTERNAL, f"{self.name} was not ready within {timeout:g} s")
                if not (data := os.read(process.stdout.fileno(), 4096)):
                    process.wait()
                    raise PlatformFailed(
                        Reason.INTERNAL, f"{self.name} ended with {process.returncode}: {self.last_words()}"
                    )
                line += data
        text = line.decode(errors="replace").strip()
        if _READY not in text:
            raise PlatformFailed(Reason.INTERNAL, f"{self.name} said {text!r} instead of where it serves")
        self.where = text.split(_READY, 1)[1]
        return self.where

    def last_words(self) -> str:
        """The last line of the log."""
        with contextlib.suppress(OSError):
            lines = self._log.read_text(errors="replace").strip().splitlines()
            if lines:
                return lines[-1]
        return "no words"

    def stop(self) -> None:
        """End the process as an operator would (SIGTERM), by force when it takes too long."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End the process as a crash would (SIGKILL)."""
        self._end(signal.SIGKILL)

    def _end(self, how: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(how)  # no effect on a process that has ended
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


def end_machine(pid_file: Path, marker: str) -> bool:
    """End the machine that wrote its id to `pid_file`, if it is still the same process.

    The agent leaves a running guest alone when it stops, so whoever asked for the guest ends it.

    Args:
        pid_file: where the machine's wrapper wrote its process id.
        marker: must be part of the process's command line: an id may have gone to another process meanwhile.

    Returns:
        Whether there was a machine to end.
    """
    pid = machine_pid(pid_file, marker)
    if pid is None:
        return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
        ends = time.monotonic() + _STOP_SECONDS
        while machine_pid(pid_file, marker) is not None:
            if time.monotonic() > ends:
                os.kill(pid, signal.SIGKILL)
                break
            time.sleep(0.01)
    return True


def machine_pid(pid_file: Path, marker: str) -> int | None:
    """The id of the machine that wrote it to `pid_file`, None when it runs no more."""
    with contextlib.suppress(OSError, ValueError):
        pid = int(pid_file.read_text())
        if not _is_zombie(pid) and marker.encode() in _command_line(pid):
            return pid
    return None


def _is_zombie(pid: int) -> bool:
    # The state follows the command's name, which is in parentheses and may hold anything.
    return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] == b"Z"


def _command_line(pid: int) -> bytes:
    path = Path(f"/proc/{pid}/cmdline")
    for _ in range(50):
        if line := path.read_bytes():
            return line
        time.sleep(0.002)  # it is empty for a moment while a process becomes another program
    return b""
