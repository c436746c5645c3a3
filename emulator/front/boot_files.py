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
# The first `vga=` counts, even within a word; a number is C's and ends the word, or QEMU ends.
_VGA = re.compile(rb"vga=(normal|ext|ask|(?:0[xX]([0-9a-fA-F]+)|(0[0-7]*)|([1-9][0-9]*))(?=[ \0]|$))")
_UNSIGNED_MAX, _UNSIGNED_DIGITS = 0xFFFFFFFF, 11  # C's unsigned int, in octal at its longest
_VIDEO_MODES = {b"normal": 0xFFFF, b"ext": 0xFFFE, b"ask": 0xFFFD}


def shown_to_firmware(kernel: bytes, *, initrd: int | None, append: bytes, low_ram: int) -> bytes:
    """The kernel with the header that QEMU writes.

    Args:
        kernel: the file.
        initrd: bytes of the initial RAM disk; None without one.
        append: the command line.
        low_ram: bytes of the machine's RAM below 4 GiB.

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
    if (mode := _video_mode(append)) is not None:
        struct.pack_into("<H", header, _VIDEO_MODE_AT, mode)
    header[_LOADER_AT] = _LOADER
    header[_FLAGS_AT] |= _CAN_USE_HEAP
    struct.pack_into("<H", header, _HEAP_END_AT, _CMDLINE_ADDRESS - _REAL_ADDRESS - 0x200)
    if initrd is not None:
        highest = min(_initrd_max(kernel, version), low_ram - _ACPI_SIZE - 1)
        if initrd < highest:  # QEMU ends at a larger one
            struct.pack_into("<II", header, _INITRD_AT, (highest - initrd) & ~(_PAGE - 1), initrd)
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
    def read(cls, kernel: Path, initrd: Path | None, append: str | None, *, low_ram: int) -> BootFiles:
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
        copy = shown_to_firmware(data, initrd=size, append=line or b"", low_ram=low_ram)
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


def _video_mode(append: bytes) -> int | None:
    """The video mode that QEMU reads in the command line; None for none, or one that it ends at."""
    mode = _VGA.match(append, max(append.find(b"vga="), 0))
    if mode is None:
        return None
    if mode[1] in _VIDEO_MODES:
        return _VIDEO_MODES[mode[1]]
    digits = next((digits, base) for digits, base in zip(mode.groups()[1:], (16, 8, 10), strict=True) if digits)
    return _unsigned(*digits)


def _unsigned(digits: bytes, base: int) -> int | None:
    digits = digits.lstrip(b"0") or b"0"
    value = int(digits, base) if len(digits) <= _UNSIGNED_DIGITS else _UNSIGNED_MAX + 1
    return value & 0xFFFF if value <= _UNSIGNED_MAX else None
