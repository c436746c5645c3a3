"""Composition root of `sevattest platform run`: a program, its calls, its signals, its end.

Signals that are sent to the supervisor go to the program, or, after its end, to what it left behind. What a terminal
sends has reached the program already. The supervisor ends when nobody is left under the filter, and as the program did:
with its exit code or by its signal.
"""

from __future__ import annotations

import ctypes
import os
import resource
import select
import signal
import struct
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from common.errors import Reason, Unavailable
from emulator.device_client import CommandFailed, Device
from emulator.intercept import filter as call_filter
from emulator.intercept.calls import NEVER, REQUESTS, Calls
from emulator.intercept.link import Link
from emulator.intercept.processes import children_of
from emulator.intercept.seccomp import Listener
from emulator.intercept.spawn import spawn
from emulator.state_folder import StateFolder

_PASSED_ON = (
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
)
_CAUGHT = (*_PASSED_ON, signal.SIGCHLD)
_SIGINFO = struct.Struct("<Iii116x")  # struct signalfd_siginfo (linux/signalfd.h): number, errno, code
_SI_KERNEL = 0x80  # asm-generic/siginfo.h: sent by the kernel, for a terminal
_SIGSET_SIZE = 128


def run(program: str, arguments: Sequence[str], *, state: Path, flavour: str) -> int:
    """Run a program on the platform that is served in `state`; returns its exit code, or dies by its signal.

    Args:
        program: path of its file.
        arguments: its words, the first is its name.
        state: the platform's folder.
        flavour: which save areas SEV-ES guests have (`emulator.vmsa`).

    Raises:
        Unavailable: no platform is served there.
        InvalidInput: the program cannot be executed.
        PlatformFailed: the kernel does not let calls be intercepted.
    """
    socket = StateFolder(state).socket
    try:
        Device(socket, writable=False).close()
    except (OSError, CommandFailed) as error:
        raise Unavailable(
            Reason.PLATFORM_UNAVAILABLE,
            f"no platform is served in {state}",
            hint=f"sevattest platform serve --state {state}",
        ) from error
    signal.pthread_sigmask(signal.SIG_BLOCK, _CAUGHT)
    child = spawn(program, arguments, call_filter.program(REQUESTS, NEVER))
    listener = Listener(child.listener)
    calls = Calls(listener, Link(socket), flavour=flavour)
    try:
        status = _Loop(child.process, listener, calls).run()
    finally:
        calls.close()
        listener.close()
    return _end_as(status)


class _Loop:
    """Until nobody is left under the filter."""

    def __init__(self, process: int, listener: Listener, calls: Calls) -> None:
        self._process = process
        self._listener = listener
        self._calls = calls
        self._status: int | None = None

    def run(self) -> int:
        """The program's status, as waitpid(2) tells it."""
        signals = _signal_descriptor()
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        poll.register(signals, select.POLLIN)
        try:
            while True:
                for descriptor, event in poll.poll():
                    if descriptor == signals:
                        self._signal(os.read(signals, _SIGINFO.size))
                    elif event & select.POLLIN:
                        call = self._listener.receive()
                        if call is not None:
                            self._calls.take(call)
                    else:  # hung up
                        return self._last_status()
        finally:
            os.close(signals)

    def _signal(self, info: bytes) -> None:
        number, _, code = _SIGINFO.unpack(info)
        if number == signal.SIGCHLD:
            self._reap(os.WNOHANG)
        elif self._status is not None:
            for orphan in children_of(os.getpid()):
                _send(orphan, number)
        elif code != _SI_KERNEL or os.getpgid(self._process) != os.getpgrp():
            _send(self._process, number)

    def _reap(self, options: int) -> None:
        """Take the status of each child that has ended: the program's, and of those that it left behind."""
        with suppress(ChildProcessError):
            while self._status is None or options:
                process, status = os.waitpid(-1, options)
                if process == self._process:
                    self._status = status
                elif not process:
                    break

    def _last_status(self) -> int:
        self._reap(0)
        self._reap(os.WNOHANG)
        return self._status or 0


def _signal_descriptor() -> int:
    """A descriptor to read caught signals from, which say whose they are; a handler would not."""
    mask = bytearray(_SIGSET_SIZE)
    for number in _CAUGHT:
        mask[(number - 1) // 8] |= 1 << (number - 1) % 8
    descriptor: int = ctypes.CDLL(None, use_errno=True).signalfd(-1, bytes(mask), os.O_CLOEXEC)
    if descriptor < 0:
        raise OSError(ctypes.get_errno(), "signalfd")
    return descriptor


def _send(process: int, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.kill(process, number)


def _end_as(status: int) -> int:
    """End as the program did."""
    if not os.WIFSIGNALED(status):
        return os.waitstatus_to_exitcode(status)
    number = os.WTERMSIG(status)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the core was the program's
    if number != signal.SIGKILL:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (number,))
    os.kill(os.getpid(), number)
    return 128 + number  # not reached
