"""A child that runs a program under the filter, and the listener that it hands to us before it becomes the program.

Not `subprocess`: the filter is the child's own, and the first call that it stops may be the program's first.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import struct
from collections.abc import Sequence
from typing import NamedTuple

from common.errors import InvalidInput, PlatformFailed, Reason
from emulator.intercept.seccomp import install

# linux/prctl.h
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36

_FAILURE = struct.Struct("<Bi")  # at which step, errno
_FILTER, _EXEC = range(2)
# Python ignores these, and what is ignored stays so over exec.
_UNIGNORED = (signal.SIGPIPE, signal.SIGXFSZ)

_prctl = ctypes.CDLL(None, use_errno=True).prctl


class Child(NamedTuple):
    """The program.

    Attributes:
        process: its process id.
        listener: the descriptor of its filter's listener.
    """

    process: int
    listener: int


def spawn(program: str, arguments: Sequence[str], instructions: bytes) -> Child:
    """Start a program under a filter. It dies (SIGKILL) with this process, whose other descendants come to it.

    Args:
        program: path of its file.
        arguments: its words, the first is its name.
        instructions: the filter.

    Raises:
        InvalidInput: the program cannot be executed.
        PlatformFailed: the kernel does not take the filter.
    """
    # Whom it leaves behind stays our descendant, whose memory we may read; and ours to wait for.
    _prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    parent = os.getpid()
    process = os.fork()
    if not process:
        ours.close()
        _become(program, arguments, instructions, theirs, parent)
    theirs.close()
    with ours:
        first, descriptors, _, _ = socket.recv_fds(ours, _FAILURE.size, 1)
        # The end of the file comes with exec, an earlier message with its failure.
        failure = ours.recv(_FAILURE.size) if descriptors else first
    if not failure and descriptors:
        return Child(process, descriptors[0])
    for descriptor in descriptors:
        os.close(descriptor)
    os.waitpid(process, 0)
    step, number = _FAILURE.unpack(failure or _FAILURE.pack(_FILTER, 0))
    if step == _EXEC:
        raise InvalidInput(Reason.INVALID_ARGUMENT, f"{program}: {os.strerror(number).lower()}")
    raise PlatformFailed(
        Reason.INTERNAL,
        f"the kernel does not let calls be intercepted: {os.strerror(number).lower()}",
        hint="it must be Linux 5.19 or newer with seccomp user notification, and not already under `platform run`",
    )


def _become(program: str, arguments: Sequence[str], instructions: bytes, home: socket.socket, parent: int) -> None:
    """In the child: report, and become the program. Never returns."""
    step = _FILTER
    try:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)  # it died before it could be told
        for number in _UNIGNORED:
            signal.signal(number, signal.SIG_DFL)
        # From here on nothing may open a file: the supervisor does not answer yet.
        listener = install(instructions)
        socket.send_fds(home, [b"\0"], [listener])
        os.close(listener)
        step = _EXEC
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        os.execv(program, list(arguments))  # noqa: S606 -- the program that the user named
    except OSError as error:
        home.send(_FAILURE.pack(step, error.errno or 0))
    finally:
        os._exit(127)
