"""The CPUID instruction from Python: twenty-odd bytes of machine code in a page of their own.

Why so: /dev/cpu/0/cpuid is root's alone and often not there (it is a module), /proc/cpuinfo has the flags but no
number (C-bit, ASIDs), and KVM's own list is what guests see. The instruction itself is free to everybody. The page is
written first and made executable then, never both; where a policy forbids that (SELinux execmem, systemd's
MemoryDenyWriteExecute) the kernel says so, and the probes go on without. Used by the commands that look at a host and
by nothing that serves.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
from functools import cache

from host_agent.doctor.machine import Registers, Unreadable

# void cpuid(u32 leaf /* edi */, u32 subleaf /* esi */, u32 out[4] /* rdx */), System V calling convention.
_CODE = bytes.fromhex(
    "f30f1efa"  # endbr64
    "53"  # push rbx, which CPUID overwrites and the caller keeps
    "4989d0"  # mov r8, rdx
    "89f8"  # mov eax, edi
    "89f1"  # mov ecx, esi
    "0fa2"  # cpuid
    "418900"  # mov [r8], eax
    "41895804"  # mov [r8+4], ebx
    "41894808"  # mov [r8+8], ecx
    "4189500c"  # mov [r8+12], edx
    "5b"  # pop rbx
    "c3"  # ret
)
_PROTOTYPE = ctypes.CFUNCTYPE(None, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_void_p)


def execute(leaf: int) -> Registers:
    """CPUID of `leaf`, subleaf 0, on whichever CPU this runs.

    Raises:
        Unreadable: the processor has no such instruction, or the system gives no executable page.
    """
    out = (ctypes.c_uint32 * 4)()
    _function()[1](leaf, 0, ctypes.addressof(out))
    return Registers(*out)


@cache
def _function() -> tuple[mmap.mmap, ctypes._CFunctionType]:
    """The page, which must stay, and the function in it."""
    if platform.machine() != "x86_64":
        raise Unreadable(f"a {platform.machine()} processor has no CPUID instruction")
    try:
        page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    except OSError as error:
        raise Unreadable(f"no memory for the CPUID instruction: {error.strerror}") from None
    page.write(_CODE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    if libc.mprotect(address, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_EXEC) != 0:
        reason = os.strerror(ctypes.get_errno())
        raise Unreadable(f"the system forbids executable memory, which the CPUID instruction needs ({reason})")
    return page, _PROTOTYPE(address)
