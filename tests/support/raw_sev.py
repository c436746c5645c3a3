"""/dev/sev and KVM by raw system calls, as a program in C would: for functions that run under `platform run`.

Knows nothing of ours: the numbers are written here once more, from linux/psp-sev.h and linux/kvm.h.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct

SEV_ISSUE_CMD = 0xC0105300
KVM_CREATE_VM = 0xAE01
KVM_CREATE_VCPU = 0xAE41
KVM_SET_CPUID2 = 0x4008AE90
KVM_MEMORY_ENCRYPT_OP = 0xC008AEBA
KVM_MEMORY_ENCRYPT_REG_REGION = 0x8010AEBB
KVM_MEMORY_ENCRYPT_UNREG_REGION = 0x8010AEBC

RESET, STATUS, PEK_GEN, CSR, PDH_GEN, EXPORT, IMPORT, GET_ID, GET_ID2 = range(9)
INIT, ES_INIT, START, UPDATE_DATA, UPDATE_VMSA, SECRET, MEASURE, FINISH = range(8)
GUEST_STATUS, REPORT, INIT2 = 16, 20, 22

UNTOUCHED = 0x5A5A5A5A  # what stands in `error` before a command
_libc = ctypes.CDLL(None, use_errno=True)
_libc.ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class Memory:
    """Bytes at an address."""

    def __init__(self, content: bytes | int) -> None:
        self._buffer = ctypes.create_string_buffer(bytes(content), len(bytes(content)))
        self.at = ctypes.addressof(self._buffer)

    @property
    def bytes(self) -> bytes:
        return self._buffer.raw


class ReadOnlyPage:
    """A page that can be read and not written."""

    def __init__(self, content: bytes) -> None:
        self._page = mmap.mmap(-1, mmap.PAGESIZE)
        self._page[: len(content)] = content
        self.at = ctypes.addressof(ctypes.c_char.from_buffer(self._page))
        assert _libc.mprotect(self.at, mmap.PAGESIZE, mmap.PROT_READ) == 0


Place = Memory | ReadOnlyPage | int


def address(place: Place) -> int:
    """Where it is; whoever asks keeps it alive."""
    return place if isinstance(place, int) else place.at


def ioctl(descriptor: int, request: int, argument: Place) -> str:
    """`ok`, or the name of the errno."""
    return "ok" if _libc.ioctl(descriptor, request, address(argument)) >= 0 else errno.errorcode[ctypes.get_errno()]


def ioctl_of_32_bits(descriptor: int, request: int) -> int:
    """An ioctl of the i386 ABI, with no argument: the result, or the negative errno.

    Raises:
        OSError: no memory can be executed that was written.
    """
    # push rbx; mov eax, 54; mov ebx, edi; mov ecx, esi; xor edx, edx; int 0x80; pop rbx; ret
    code = bytes.fromhex("53b836000000 89fb 89f1 31d2 cd80 5b c3".replace(" ", ""))
    with mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC) as page:
        page[: len(code)] = code
        place = ctypes.c_char.from_buffer(page)
        call = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_uint)(ctypes.addressof(place))
        result = int(call(descriptor, request))
        del place
    return result


def syscall(number: int, *arguments: int | bytes) -> int:
    """The result, or the negative errno."""
    result: int = _libc.syscall(number, *arguments)
    return result if result >= 0 else -ctypes.get_errno()


def issue(descriptor: int, command: int, data: Place = 0) -> tuple[str, int]:
    """SEV_ISSUE_CMD: what the ioctl says, and `error` afterwards."""
    block = Memory(struct.pack("<IQI", command, address(data), UNTOUCHED))
    said = ioctl(descriptor, SEV_ISSUE_CMD, block)
    number, pointer, error = struct.unpack("<IQI", block.bytes)
    assert (number, pointer) == (command, address(data))
    return said, error


def one_buffer(descriptor: int, command: int, address: int, length: int) -> tuple[str, int, int]:
    """PEK_CSR or GET_ID2: as `issue`, and the length afterwards."""
    data = Memory(struct.pack("<QI", address, length))
    said, error = issue(descriptor, command, data)
    return said, error, struct.unpack("<QI", data.bytes)[1]


def two_buffers(descriptor: int, command: int, *given: int) -> tuple[str, int, int, int]:
    """PDH_CERT_EXPORT or PEK_CERT_IMPORT on two addresses, each with its length: as `issue`, and the lengths after."""
    data = Memory(struct.pack("<QIQI", *given))
    said, error = issue(descriptor, command, data)
    _, one, _, other = struct.unpack("<QIQI", data.bytes)
    return said, error, one, other


def state(descriptor: int) -> int:
    """The platform's state."""
    status = Memory(12)
    assert issue(descriptor, STATUS, status) == ("ok", 0)
    return status.bytes[2]


def sev_op(vm: int, command: int, data: Place = 0, sev: int = -1) -> tuple[str, int]:
    """KVM_MEMORY_ENCRYPT_OP: what the ioctl says, and `error` afterwards."""
    block = Memory(struct.pack("<I4xQIi", command, address(data), UNTOUCHED, sev))
    said = ioctl(vm, KVM_MEMORY_ENCRYPT_OP, block)
    return said, struct.unpack("<I4xQIi", block.bytes)[2]


def new_vm() -> tuple[int, int]:
    """/dev/kvm and a virtual machine on it."""
    kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    vm = _libc.ioctl(kvm, KVM_CREATE_VM, None)
    assert vm >= 0, errno.errorcode[ctypes.get_errno()]
    return kvm, vm
