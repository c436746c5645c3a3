"""The filter: which system calls the supervisor is asked about, as a classic BPF program for seccomp(2). Pure.

Everything else is allowed, in particular calls of another ABI (32-bit, x32), which the supervisor does not speak; but
what must never reach a real PSP is ENOTTY there. The kernel remembers which system calls are always allowed, so they
cost nothing.

Sources: linux/seccomp.h, linux/filter.h, linux/bpf_common.h, linux/audit.h, linux/prctl.h, asm/unistd_64.h,
asm/unistd_32.h, asm/unistd_x32.h.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterable

# asm/unistd_64.h
SYS_OPEN = 2
SYS_IOCTL = 16
SYS_CREAT = 85
SYS_PRCTL = 157
SYS_OPENAT = 257
SYS_OPENAT2 = 437
SYS_IOCTL_X32 = 0x40000000 | 514  # asm/unistd_x32.h
SYS_IOCTL_I386 = 54  # asm/unistd_32.h

AUDIT_ARCH_X86_64 = 0xC000003E
AUDIT_ARCH_I386 = 0x40000003
PR_SET_DUMPABLE = 4

RET_ALLOW = 0x7FFF0000
RET_USER_NOTIF = 0x7FC00000
RET_ERRNO = 0x00050000  # errno in the low 16 bits; 0 is success without the call

# struct seccomp_data
_NUMBER = 0
_ARCH = 4
_ARGUMENTS = 16  # six of 8 bytes; a little-endian low half comes first

# struct sock_filter
INSTRUCTION = struct.Struct("<HBBI")
LOAD = 0x20  # BPF_LD | BPF_W | BPF_ABS
JUMP_IF_EQUAL = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
RETURN = 0x06  # BPF_RET | BPF_K


def program(requests: Iterable[int], never: Iterable[int]) -> bytes:
    """The instructions: what opens a file, and ioctl with one of these request numbers, is notified.

    Args:
        requests: which are notified.
        never: which of them the kernel must never carry out: ENOTTY in an ABI that is not notified.

    PR_SET_DUMPABLE is answered with success and not done: a process that is not dumpable, as our own services are,
    could be read by root alone.
    """
    no_such = _ioctl(never, RET_ERRNO | errno.ENOTTY)
    other = [*_load(_NUMBER), *_unless(SYS_IOCTL_I386, RET_ALLOW), *no_such]
    code = [
        *_load(_ARCH),
        (JUMP_IF_EQUAL, 0, len(other), AUDIT_ARCH_I386),
        *other,
        *_unless(AUDIT_ARCH_X86_64, RET_ALLOW),
        *_load(_NUMBER),
    ]
    for opening in (SYS_OPENAT, SYS_OPEN, SYS_CREAT, SYS_OPENAT2):
        code += _when(opening, RET_USER_NOTIF)
    dumpable = [*_load(_argument(0)), *_when(PR_SET_DUMPABLE, RET_ERRNO), *_return(RET_ALLOW)]
    code += [(JUMP_IF_EQUAL, 0, len(dumpable), SYS_PRCTL), *dumpable]
    code += [(JUMP_IF_EQUAL, 0, len(no_such), SYS_IOCTL_X32), *no_such]
    code += [*_unless(SYS_IOCTL, RET_ALLOW), *_ioctl(requests, RET_USER_NOTIF)]
    return b"".join(INSTRUCTION.pack(*instruction) for instruction in code)


_Code = list[tuple[int, int, int, int]]


def _load(offset: int) -> _Code:
    return [(LOAD, 0, 0, offset)]


def _return(action: int) -> _Code:
    return [(RETURN, 0, 0, action)]


def _when(value: int, action: int) -> _Code:
    return [(JUMP_IF_EQUAL, 0, 1, value), *_return(action)]


def _unless(value: int, action: int) -> _Code:
    return [(JUMP_IF_EQUAL, 1, 0, value), *_return(action)]


def _ioctl(requests: Iterable[int], action: int) -> _Code:
    """What becomes of an ioctl: this action where it is one of these requests."""
    code = _load(_argument(1))
    for request in requests:
        code += _when(request, action)
    return code + _return(RET_ALLOW)


def _argument(number: int) -> int:
    return _ARGUMENTS + 8 * number
