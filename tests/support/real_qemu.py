"""The real QEMUs that tests run, a kernel that QEMU takes for one, and a machine to hold the front's against.

Two QEMUs matter: the distribution's, and one from 9.1 on, whose QMP and fw_cfg differ. A test asks for `qemu` and is
run with each; where one is not at hand it is skipped with a sentence that says how to get it.
"""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
from pathlib import Path
from random import Random

import pytest

_NEWER = "SEVATTEST_QEMU_NEWER"
_UNPACKED = Path(__file__).resolve().parents[2] / ".guest" / "qemu" / "usr" / "bin" / "qemu-system-x86_64"
EACH_QEMU = pytest.mark.parametrize("qemu", ["installed", "newer"], indirect=True)


@pytest.fixture(scope="module")
def qemu(request: pytest.FixtureRequest) -> str:
    """The program: of the PATH, or the newer one."""
    return newer_qemu() if getattr(request, "param", "installed") == "newer" else installed_qemu()


def installed_qemu() -> str:
    """The distribution's QEMU; skips the test that asks where there is none."""
    program = shutil.which("qemu-system-x86_64")
    if program is None:
        pytest.skip("no real QEMU: install the package qemu-system-x86")
    return program


def newer_qemu() -> str:
    """A QEMU from 9.1 on; skips the test that asks where there is none."""
    program = os.environ.get(_NEWER) or str(_UNPACKED)
    if not Path(program).is_file():
        pytest.skip(f"no newer QEMU: set {_NEWER} to a qemu-system-x86_64 of 9.1 or later, or run `make e2e` once")
    return program


def version_of(program: str) -> tuple[int, int]:
    """Major and minor version, as the program itself says."""
    told = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"version (\d+)\.(\d+)", told)
    assert found is not None, told
    return int(found[1]), int(found[2])


def small_kernel(*, version: int = 0x20F, xloadflags: int = 0x3F, initrd_max: int = 0x7FFFFFFF) -> bytes:
    """A bzImage that boots nowhere, with the setup header that QEMU wants to see.

    Layout: Linux, Documentation/arch/x86/boot.rst. What a loader has to fill in is noise, so that a field that is
    forgotten shows.
    """
    setup_sectors, size = 3, 64 << 10
    image = bytearray(Random("a kernel").randbytes(size))  # noqa: S311 -- not a secret
    image[0x1F1] = setup_sectors
    struct.pack_into("<I", image, 0x1F4, (size - (setup_sectors + 1) * 512) // 16)  # syssize
    struct.pack_into("<H", image, 0x1FA, 0xFFFF)  # vid_mode
    struct.pack_into("<H", image, 0x1FE, 0xAA55)
    struct.pack_into("<H", image, 0x200, 0x66EB)
    image[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", image, 0x206, version)
    image[0x210] = 0
    image[0x211] = 0x01  # LOADED_HIGH
    struct.pack_into("<I", image, 0x214, 0x100000)  # code32_start
    struct.pack_into("<I", image, 0x22C, initrd_max)
    struct.pack_into("<H", image, 0x236, xloadflags)
    struct.pack_into("<I", image, 0x238, 2047)  # cmdline_size
    struct.pack_into("<Q", image, 0x250, 0)  # setup_data
    return bytes(image)
