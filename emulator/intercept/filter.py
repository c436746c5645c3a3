"""The filter: which system calls the supervisor is asked about, as a classic BPF program for seccomp(2). Pure.

Everything else is allowed, in particular calls of another ABI (32-bit, x32), which the supervisor does not speak. The
kernel remembers which system calls are always allowed, so they cost nothing.

Sources: linux/seccomp.h, linux/filter.h, linux/bpf_common.h, linux/audit.h, linux/prctl.h, asm/unistd_64.h.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

# asm/unistd_64.h
SYS_OPEN = 2
SYS_IOCTL = 16
SYS_PRCTL = 157
SYS_OPENAT = 257

AUDIT_ARCH_X86_64 = 0xC000003E
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


def program(requests: Iterable[int]) -> bytes:
    """The instructions: open, openat, and ioctl with one of these request numbers are notified.

    PR_SET_DUMPABLE is answered with success and not done: a process that is not dumpable, as our own services are,
    could be read by root alone.
    """
    code = [
        *_load(_ARCH),
        *_unless(AUDIT_ARCH_X86_64, RET_ALLOW),
        *_load(_NUMBER),
        *_when(SYS_OPENAT, RET_USER_NOTIF),
        *_when(SYS_OPEN, RET_USER_NOTIF),
    ]
    dumpable = [*_load(_argument(0)), *_when(PR_SET_DUMPABLE, RET_ERRNO), *_return(RET_ALLOW)]
    code += [(JUMP_IF_EQUAL, 0, len(dumpable), SYS_PRCTL), *dumpable]
    code += [*_unless(SYS_IOCTL, RET_ALLOW), *_load(_argument(1))]
    for request in requests:
        code += _when(request, RET_USER_NOTIF)
    code += _return(RET_ALLOW)
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


def _argument(number: int) -> int:
    return _ARGUMENTS + 8 * number
