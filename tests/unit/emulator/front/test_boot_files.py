"""The kernel with the header that QEMU writes; tests/integration/test_platform_front_launch.py asks the real QEMU."""

from __future__ import annotations

import struct
from hashlib import sha256
from pathlib import Path

import pytest

from emulator.errors import MachineDied
from emulator.front.boot_files import BootFiles, shown_to_firmware
from tests.support.real_qemu import small_kernel

LOW = 256 << 20
FIELDS = {0x1FA, 0x1FB, 0x210, 0x211, *range(0x218, 0x220), 0x224, 0x225, *range(0x228, 0x22C)}


def shown(kernel: bytes, *, initrd: int | None = 4096, append: bytes = b"quiet", low_ram: int = LOW) -> bytes:
    return shown_to_firmware(kernel, initrd=initrd, append=append, low_ram=low_ram)


def test_only_the_loaders_fields_change_and_a_second_time_nothing_does() -> None:
    kernel = small_kernel()
    once = shown(kernel, append=b"vga=0x317")
    assert {at for at, (old, new) in enumerate(zip(kernel, once, strict=True)) if old != new} <= FIELDS
    assert once != kernel
    assert shown(once, append=b"vga=0x317") == once


@pytest.mark.parametrize(
    "kernel",
    [
        b"",
        b"a kernel" * 1000,
        small_kernel()[:0x237],
        small_kernel(version=0x201),
        small_kernel()[:0x211] + b"\0" + small_kernel()[0x212:],
    ],
)
def test_what_is_no_kernel_of_this_century_is_left_alone(kernel: bytes) -> None:
    assert shown(kernel) == kernel


@pytest.mark.parametrize(
    ("append", "mode"),
    [
        (b"quiet", 0xFFFF),
        (b"vga=normal", 0xFFFF),
        (b"vga=ext", 0xFFFE),
        (b"a vga=ask b", 0xFFFD),
        (b"vga=0x317", 0x317),
        (b"vga=791 vga=1", 791),
        (b"vga=010", 8),
        (b"vga=0", 0),
        (b"vga=65537", 1),
        (b"vga=4294967295", 0xFFFF),
        (b"vga=00000000000000000000000000000000000001", 1),
        # QEMU ends at these.
        (b"vga=4294967296", 0xFFFF),
        (b"vga=09", 0xFFFF),
        (b"vga=0x", 0xFFFF),
        (b"vga=5x vga=6", 0xFFFF),
        (b"vga=", 0xFFFF),
        (b"vga=" + b"9" * 5000, 0xFFFF),
    ],
)
def test_the_first_video_mode_counts_and_is_cs_number(append: bytes, mode: int) -> None:
    assert struct.unpack_from("<H", shown(small_kernel(), append=append), 0x1FA) == (mode,)


@pytest.mark.parametrize(
    ("header", "low_ram", "initrd", "address"),
    [
        ({}, LOW, 4096, LOW - 0x28000 - 4096 - 4096),
        ({}, LOW, 0, LOW - 0x28000 - 4096),
        ({"xloadflags": 0, "initrd_max": 0x03FFFFFF}, LOW, 1, 0x03FFF000),
        ({"version": 0x202}, 2 << 30, 4096, 0x37FFFFFF - 4096 & ~0xFFF),
        ({"xloadflags": 0}, 3 << 30, 4096, 0x7FFFFFFF - 4096 & ~0xFFF),
        ({}, 3 << 30, 4096, (3 << 30) - 0x28000 - 8192),
    ],
)
def test_the_initrd_is_as_high_as_kernel_and_ram_allow(
    header: dict[str, int], low_ram: int, initrd: int, address: int
) -> None:
    seen = shown(small_kernel(**header), initrd=initrd, low_ram=low_ram)
    assert struct.unpack_from("<II", seen, 0x218) == (address, initrd)


@pytest.mark.parametrize(("initrd", "low_ram"), [(1 << 33, 1 << 30), (LOW, LOW), (0, 0x28000), (4096, 0)])
def test_an_initrd_that_does_not_fit_is_left_for_qemu_to_complain_of(initrd: int, low_ram: int) -> None:
    kernel = small_kernel()
    assert shown(kernel, initrd=initrd, low_ram=low_ram)[0x218:0x220] == kernel[0x218:0x220]


def test_without_an_initrd_the_fields_stay() -> None:
    kernel = small_kernel()
    assert shown(kernel, initrd=None)[0x218:0x220] == kernel[0x218:0x220]


def test_measured_is_the_file_and_shown_the_copy(tmp_path: Path) -> None:
    (tmp_path / "k").write_bytes(small_kernel())
    (tmp_path / "i").write_bytes(b"initrd")
    files = BootFiles.read(tmp_path / "k", tmp_path / "i", "a b", low_ram=LOW)
    assert files.kernel == shown(small_kernel(), initrd=6, append=b"a b")
    assert files.measured.kernel == sha256(small_kernel()).digest()
    assert files.shown.kernel == sha256(files.kernel).digest()
    assert files.measured.initrd == files.shown.initrd == sha256(b"initrd").digest()
    assert files.measured.cmdline == files.shown.cmdline == sha256(b"a b\0").digest()


@pytest.mark.parametrize(("name", "what"), [("k", "kernel"), ("i", "initrd")])
def test_a_file_that_is_not_there_is_named(tmp_path: Path, name: str, what: str) -> None:
    for other in {"k", "i"} - {name}:
        (tmp_path / other).write_bytes(b"x")
    with pytest.raises(MachineDied) as caught:
        BootFiles.read(tmp_path / "k", tmp_path / "i", None, low_ram=LOW)
    assert caught.value.lines == (f"could not open {what} file '{tmp_path}/{name}': No such file or directory",)
