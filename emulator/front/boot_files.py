"""The kernel that the real QEMU is handed: as given, but for the header bytes that QEMU without SEV would patch anyway.

A QEMU that runs a SEV guest leaves the kernel's setup header alone, and that kernel is what the owner and the PSP
measure. Without SEV it writes its loader's fields into the header before the firmware sees it, and the firmware would
find that the hash is wrong. So the real QEMU gets a copy in which the fields have the values that it would write:
whichever way it shows the kernel (patched setup and rest, or since QEMU 10.0 the file itself), the firmware sees these
bytes, and the table in guest RAM has their hash. The measurement is of the file.

Sources: Linux, Documentation/arch/x86/boot.rst (header fields); QEMU, hw/i386/x86.c `x86_load_linux`.
"""

from __future__ import annotations

import os
import re
import struct
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

from emulator.errors import MachineDied
from emulator.kernel_hashes import BootHashes
from emulator.machine import read_boot_files

_MAGIC_AT, _MAGIC = 0x202, b"HdrS"
_VERSION_AT = 0x206
_VIDEO_MODE_AT = 0x1FA
_LOADER_AT, _LOADER = 0x210, 0xB0  # "QEMU", version 0
_FLAGS_AT, _LOADED_HIGH, _CAN_USE_HEAP = 0x211, 0x01, 0x80
_INITRD_AT = 0x218  # address and size
_HEAP_END_AT = 0x224
_CMDLINE_AT = 0x228
_INITRD_MAX_AT = 0x22C
_XLOADFLAGS_AT, _ABOVE_4G = 0x236, 0x02
_HEADER_END = 0x238

_REAL_ADDRESS, _CMDLINE_ADDRESS = 0x10000, 0x20000
_ACPI_SIZE = 0x28000  # bytes that QEMU's PC keeps for ACPI tables at the end of low memory
_PAGE = 4096
_LOW_RAM_ALL, _LOW_RAM_SPLIT = 0xB0000000, 0x80000000  # pc-q35: where RAM below 4 GiB ends
_VGA = re.compile(rb"vga=(normal|ext|ask|0[xX][0-9a-fA-F]+|[0-9]+)")
_VIDEO_MODES = {b"normal": 0xFFFF, b"ext": 0xFFFE, b"ask": 0xFFFD}


def shown_to_firmware(kernel: bytes, *, initrd: int | None, append: bytes, ram: int) -> bytes:
    """The kernel with the header that QEMU writes.

    Args:
        kernel: the file.
        initrd: bytes of the initial RAM disk; None without one.
        append: the command line.
        ram: bytes of the machine's RAM.

    Returns:
        As many bytes. A kernel whose boot protocol is older than 2.02 (1999), or that is none, is returned as it is:
        QEMU or the firmware will refuse it.
    """
    if len(kernel) < _HEADER_END or kernel[_MAGIC_AT : _MAGIC_AT + 4] != _MAGIC:
        return kernel
    (version,) = struct.unpack_from("<H", kernel, _VERSION_AT)
    if version < 0x202 or not kernel[_FLAGS_AT] & _LOADED_HIGH:
        return kernel
    header = bytearray(kernel[:_HEADER_END])
    struct.pack_into("<I", header, _CMDLINE_AT, _CMDLINE_ADDRESS)
    if mode := _VGA.search(append):
        number = _VIDEO_MODES.get(mode[1])
        struct.pack_into("<H", header, _VIDEO_MODE_AT, (int(mode[1], 0) if number is None else number) & 0xFFFF)
    header[_LOADER_AT] = _LOADER
    header[_FLAGS_AT] |= _CAN_USE_HEAP
    struct.pack_into("<H", header, _HEAP_END_AT, _CMDLINE_ADDRESS - _REAL_ADDRESS - 0x200)
    if initrd is not None:
        highest = min(_initrd_max(kernel, version), _low_ram(ram) - _ACPI_SIZE - 1)
        struct.pack_into("<II", header, _INITRD_AT, (highest - initrd) & ~(_PAGE - 1) & 0xFFFFFFFF, initrd)
    return bytes(header) + kernel[_HEADER_END:]


@dataclass(frozen=True, kw_only=True)
class BootFiles:
    """What a machine boots directly.

    Attributes:
        measured: hashes of the files, as the owner knows them.
        shown: the same, but for the kernel as the firmware will see it.
        kernel: the kernel as the firmware will see it.
    """

    measured: BootHashes
    shown: BootHashes
    kernel: bytes

    @classmethod
    def read(cls, kernel: Path, initrd: Path | None, append: str | None, *, ram: int) -> BootFiles:
        """Read and hash the files.

        Raises:
            MachineDied: one cannot be read; with QEMU's words.
        """
        line = None if append is None else os.fsencode(append)
        hashes = read_boot_files(kernel, initrd, line)
        try:
            data = kernel.read_bytes()
            size = None if initrd is None else initrd.stat().st_size
        except OSError as error:
            raise MachineDied(f"could not open '{error.filename}': {error.strerror}") from error
        # The kernel is hashed again: what is measured and what is shown must come of the same bytes.
        copy = shown_to_firmware(data, initrd=size, append=line or b"", ram=ram)
        return cls(
            measured=replace(hashes, kernel=sha256(data).digest()),
            shown=replace(hashes, kernel=sha256(copy).digest()),
            kernel=copy,
        )


def _initrd_max(kernel: bytes, version: int) -> int:
    """The highest address that the kernel takes for its initial RAM disk."""
    if version >= 0x20C and struct.unpack_from("<H", kernel, _XLOADFLAGS_AT)[0] & _ABOVE_4G:
        return 0xFFFFFFFF
    if version >= 0x203:
        return int(struct.unpack_from("<I", kernel, _INITRD_MAX_AT)[0])
    return 0x37FFFFFF


def _low_ram(ram: int) -> int:
    return ram if ram < _LOW_RAM_ALL else _LOW_RAM_SPLIT
