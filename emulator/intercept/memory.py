"""Another process's memory by its addresses: process_vm_readv(2) and process_vm_writev(2), without ptrace.

Allowed for a descendant of the same user, also where the kernel restricts ptrace to those (Yama, ptrace_scope=1).
"""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Callable

from emulator.errors import KernelRefused

PATH_MAX = 4096  # linux/limits.h, with the NUL
_PAGE = 4096
_CHUNK = 256  # of a path: most are shorter
_ADDRESS_END = 1 << 64


class _IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def _transfer(name: str) -> ctypes._NamedFuncPointer:
    function = ctypes.CDLL(None, use_errno=True)[name]
    vector = ctypes.POINTER(_IoVec)
    function.argtypes = (ctypes.c_int, vector, ctypes.c_ulong, vector, ctypes.c_ulong, ctypes.c_ulong)
    function.restype = ctypes.c_ssize_t
    return function


_readv, _writev = _transfer("process_vm_readv"), _transfer("process_vm_writev")


class Memory:
    """The memory of one thread's process.

    Args:
        thread: its number.
        waits: whether that thread still waits for an answer. One that was killed meanwhile may have left its number to
            a stranger, into whose memory nothing is written.
    """

    def __init__(self, thread: int, waits: Callable[[], bool] = lambda: True) -> None:
        self._thread = thread
        self._waits = waits

    def read(self, address: int, size: int) -> bytes:
        """Exactly `size` bytes, as copy_from_user.

        Raises:
            KernelRefused: EFAULT; not all of them are readable, or the process is gone.
        """
        if not size:
            return b""
        buffer = bytearray(size)
        if self._move(_readv, address, buffer) != size:
            raise KernelRefused(errno.EFAULT)
        return bytes(buffer)

    def write(self, address: int, data: bytes) -> None:
        """Write all of it, as copy_to_user.

        Raises:
            KernelRefused: EFAULT; not all of it is writable, or the process is gone.
        """
        if data and (not self._waits() or self._move(_writev, address, bytearray(data)) != len(data)):
            raise KernelRefused(errno.EFAULT)

    def path(self, address: int) -> bytes | None:
        """The C string at this address, as the kernel takes a path; None where it cannot be read or is too long."""
        text = b""
        while len(text) < PATH_MAX:
            # What follows a shorter string may be another page, which need not be there.
            size = min(_CHUNK, _PAGE - address % _PAGE, PATH_MAX - len(text))
            try:
                piece, end, _ = self.read(address, size).partition(b"\0")
            except KernelRefused:
                return None
            text += piece
            if end:
                return text
            address += size
        return None

    def _move(self, function: ctypes._NamedFuncPointer, address: int, buffer: bytearray) -> int:
        """How many bytes were moved; -1 for none. It stops at the first page that is not there."""
        if address + len(buffer) > _ADDRESS_END:
            return -1
        here = _IoVec(ctypes.addressof(ctypes.c_char.from_buffer(buffer)), len(buffer))
        there = _IoVec(address, len(buffer))
        return int(function(self._thread, ctypes.byref(here), 1, ctypes.byref(there), 1, 0))
