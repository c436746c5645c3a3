"""seccomp user notification: a filter for this process, and the listener that its notifications come out of.

Source: linux/seccomp.h, linux/prctl.h. x86-64 only.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from contextlib import suppress
from fcntl import ioctl
from typing import NamedTuple

from emulator.intercept.filter import INSTRUCTION

_SYS_SECCOMP = 317  # asm/unistd_64.h
_SET_MODE_FILTER = 1
_FLAG_NEW_LISTENER = 1 << 3
# Without it a signal takes a notified call back and the kernel starts it anew: the PSP would see it twice.
_FLAG_WAIT_KILLABLE_RECV = 1 << 5
_PR_SET_NO_NEW_PRIVS = 38

NOTIF_RECV = 0xC0502100
NOTIF_SEND = 0xC0182101
NOTIF_ID_VALID = 0x40082102
NOTIF_ADDFD = 0x40182103
_CONTINUE = 1
_ADDFD_SEND = 2

# struct seccomp_notif with its struct seccomp_data, struct seccomp_notif_resp, struct seccomp_notif_addfd
NOTIF = struct.Struct("<QIIiIQ6Q")
NOTIF_RESP = struct.Struct("<QqiI")
NOTIF_ADDFD_STRUCT = struct.Struct("<QIIII")

_libc = ctypes.CDLL(None, use_errno=True)


class _SockFprog(ctypes.Structure):
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_char_p))


class Notification(NamedTuple):
    """A system call that waits for its answer.

    Attributes:
        id: the kernel's cookie.
        thread: who called (a thread id).
        syscall: its number.
        arguments: six registers.
    """

    id: int
    thread: int
    syscall: int
    arguments: tuple[int, ...]


def install(program: bytes, *, wait_killable: bool = True) -> int:
    """Put this thread and all that it becomes or starts under a filter, for ever; returns the listener's descriptor.

    Privileges can no longer be gained by exec, which is the kernel's price for a filter without root.

    Args:
        program: BPF instructions.
        wait_killable: whether only a fatal signal ends the wait for an answer; False shows in a test what that is for.

    Raises:
        OSError: EINVAL on kernels before 5.19; EBUSY under a filter that has a listener already.
    """
    if _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise _last_error()
    filters = _SockFprog(len(program) // INSTRUCTION.size, program)
    flags = _FLAG_NEW_LISTENER | (_FLAG_WAIT_KILLABLE_RECV if wait_killable else 0)
    listener: int = _libc.syscall(_SYS_SECCOMP, _SET_MODE_FILTER, flags, ctypes.byref(filters))
    if listener < 0:
        raise _last_error()
    return listener


class Listener:
    """The supervisor's end of a filter. Answers may be given from any thread.

    When it is closed, by `close` or by the end of the process, every call that waits and every later one is ENOSYS.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def fileno(self) -> int:
        """For select(2): readable when a call waits, hung up when nobody is left under the filter."""
        return self._descriptor

    def receive(self) -> Notification | None:
        """The next call that waits; None when its caller was killed meanwhile."""
        buffer = bytearray(NOTIF.size)  # the kernel wants zeros
        try:
            ioctl(self._descriptor, NOTIF_RECV, buffer)
        except OSError as error:
            if error.errno in {errno.ENOENT, errno.EINTR}:
                return None
            raise
        cookie, thread, _, syscall, _, _, *arguments = NOTIF.unpack(buffer)
        return Notification(cookie, thread, syscall, tuple(arguments))

    def is_valid(self, call: Notification) -> bool:
        """Whether the caller still waits, so that what was read by its thread id was its own."""
        try:
            ioctl(self._descriptor, NOTIF_ID_VALID, struct.pack("<Q", call.id))
        except OSError:
            return False
        return True

    def answer(self, call: Notification, error: int = 0) -> None:
        """Let the call return 0, or -1 with this errno."""
        self._send(call, -error, 0)

    def go_on(self, call: Notification) -> None:
        """Let the kernel carry out the call as if nobody had been asked."""
        self._send(call, 0, _CONTINUE)

    def give(self, call: Notification, descriptor: int, *, cloexec: bool) -> None:
        """Let the call return a new descriptor for the file that is open here as `descriptor`.

        Raises:
            OSError: the caller has no room for it (EMFILE).
        """
        flags = os.O_CLOEXEC if cloexec else 0
        request = NOTIF_ADDFD_STRUCT.pack(call.id, _ADDFD_SEND, descriptor, 0, flags)
        try:
            ioctl(self._descriptor, NOTIF_ADDFD, request)
        except OSError as error:
            if error.errno != errno.ENOENT:  # killed while it waited
                raise

    def close(self) -> None:
        """Give up; see the class."""
        os.close(self._descriptor)

    def _send(self, call: Notification, error: int, flags: int) -> None:
        with suppress(FileNotFoundError):  # killed while it waited
            ioctl(self._descriptor, NOTIF_SEND, NOTIF_RESP.pack(call.id, 0, error, flags))


def _last_error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))
