"""Finds what a real guest is made of: QEMU, AmdSev firmware, a kernel, busybox, and what opens an encrypted disk.

The parts are in a folder that `make guest` made from Debian packages (`tests/e2e/packages.py`), or are installed. A
folder has, besides `stamp.json`, which says what it is:

    firmware.fd        package ovmf-amdsev
    vmlinuz            package linux-image-cloud-amd64
    modules/NN-*.ko    of the same kernel: a virtio disk and dm-crypt, in the order in which they need each other
    busybox            package busybox-static
    cryptsetup/        package cryptsetup-bin: the program, `ld.so` and the libraries it needs, side by side
    qemu/              package qemu-system-x86, where the machine's own is older than 9.1; for tests of its QMP
    efi_secret/NN-*.ko the driver that Debian leaves out, built for this kernel; on request only
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from common.errors import InvalidInput, Reason
from common.sev.digest.ovmf import TAIL_SIZE_MAX, parse_footer

STAMP = "stamp.json"
FORMAT = 2  # of the folder; another number makes it stale

QEMU = "qemu-system-x86_64"
# Where distributions put OVMF's AmdSev build (Debian and Ubuntu: package ovmf-amdsev; Fedora: edk2-ovmf).
OVMF_PATHS = (
    Path("/usr/share/ovmf/OVMF.amdsev.fd"),
    Path("/usr/share/OVMF/OVMF.amdsev.fd"),
    Path("/usr/share/edk2/ovmf/OVMF.amdsev.fd"),
)
_INTERPRETER = b"/lib64/ld-linux"  # in programs that need libraries, which the guest has not


@dataclass(frozen=True, kw_only=True)
class GuestParts:
    """Everything that a guest is started from.

    Attributes:
        qemu: the program.
        firmware: an OVMF image with places for secrets and kernel hashes.
        kernel: a Linux kernel with an EFI stub.
        busybox: one without libraries.
        cryptsetup: a folder with the program and its libraries; None where the guest cannot open disks.
        disk_modules: kernel modules for a virtio disk and dm-crypt, in the order of loading.
        secret_modules: kernel modules that show secrets as files, in the order of loading.
    """

    qemu: Path
    firmware: Path
    kernel: Path
    busybox: Path
    cryptsetup: Path | None = None
    disk_modules: tuple[Path, ...] = ()
    secret_modules: tuple[Path, ...] = ()


@dataclass(frozen=True, kw_only=True)
class System:
    """Where installed parts are looked for.

    Attributes:
        search_path: folders with programs, as in PATH.
        firmwares: AmdSev builds of OVMF.
        boot: the folder with kernels.
        busyboxes: programs.
    """

    search_path: str
    firmwares: tuple[Path, ...] = OVMF_PATHS
    boot: Path = Path("/boot")
    busyboxes: tuple[Path, ...] = (Path("/bin/busybox"), Path("/usr/bin/busybox"))

    @classmethod
    def here(cls) -> System:
        """This machine."""
        return cls(search_path=os.environ.get("PATH", os.defpath))


class PartsMissing(InvalidInput):
    """A guest cannot be made here; `sentences` has one for each missing part."""

    def __init__(self, missing: tuple[str, ...]) -> None:
        super().__init__(Reason.INVALID_CONFIGURATION, "; ".join(missing))
        self._missing = missing

    @property
    def sentences(self) -> tuple[str, ...]:
        """What is missing and which package has it, a line each."""
        return self._missing


def find_parts(
    folder: Path | None = None,
    *,
    qemu: Path | None = None,
    firmware: Path | None = None,
    system: System | None = None,
) -> GuestParts:
    """The parts, from what the caller names, else from the folder, else from what is installed.

    Args:
        folder: one that `make guest` made; one that is absent, half or of another format is passed over.
        qemu: a program to use instead of the one on the PATH.
        firmware: an image to use instead of any other.
        system: where installed parts are; this machine by default.

    Raises:
        PartsMissing: with a sentence for each part that is nowhere, or is not what it must be.
    """
    system = system or System.here()
    made = folder if folder is not None and is_current(folder) else None
    missing: list[str] = []

    program = qemu or _which(system)
    if program is None or not os.access(program, os.X_OK):
        missing.append(f"{program or QEMU} is not there; install Debian's qemu-system-x86")
    image = _find_firmware(made, firmware, system, missing)
    kernel = _first_readable([*_in(made, "vmlinuz"), *_installed_kernels(system.boot)])
    if kernel is None:
        missing.append("no kernel can be read; `make guest` gets one from Debian's linux-image-cloud-amd64")
    busybox = next((path for path in [*_in(made, "busybox"), *system.busyboxes] if _is_static(path)), None)
    if busybox is None:
        missing.append("no busybox without libraries; `make guest` gets one, or install Debian's busybox-static")
    if program is None or image is None or kernel is None or busybox is None or missing:
        raise PartsMissing(tuple(missing))

    # Modules fit the kernel that they came with, and no other.
    ours = made if made is not None and kernel == made / "vmlinuz" else None
    cryptsetup = made / "cryptsetup" if made is not None and (made / "cryptsetup").is_dir() else None
    return GuestParts(
        qemu=program,
        firmware=image,
        kernel=kernel,
        busybox=busybox,
        cryptsetup=cryptsetup,
        disk_modules=_modules(ours, "modules"),
        secret_modules=_modules(ours, "efi_secret"),
    )


def is_current(folder: Path) -> bool:
    """Whether the folder is one that this version made, whole."""
    return read_stamp(folder).get("format") == FORMAT


def read_stamp(folder: Path) -> dict[str, object]:
    """What a folder says about itself; empty where it says nothing."""
    try:
        stamp = json.loads((folder / STAMP).read_bytes())
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def is_amdsev(image: Path) -> bool:
    """Whether an image has places for secrets and for kernel hashes; stock builds of OVMF have neither."""
    try:
        with image.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_SIZE_MAX))
            footer = parse_footer(file.read())
    except OSError:
        return False
    return None not in {footer.reset_address, footer.secret_area, footer.hashes_area}


def _find_firmware(made: Path | None, named: Path | None, system: System, missing: list[str]) -> Path | None:
    if named is not None:
        if is_amdsev(named):
            return named
        missing.append(f"{named} is no firmware image with places for secrets and kernel hashes (an AmdSev build)")
        return None
    found = next((path for path in [*_in(made, "firmware.fd"), *system.firmwares] if is_amdsev(path)), None)
    if found is None:
        missing.append("no AmdSev build of OVMF; `make guest` gets Debian's ovmf-amdsev, OVMF=FILE names another")
    return found


def _which(system: System) -> Path | None:
    found = shutil.which(QEMU, path=system.search_path)
    return Path(found) if found else None


def _in(made: Path | None, name: str) -> list[Path]:
    return [] if made is None else [made / name]


def _installed_kernels(boot: Path) -> list[Path]:
    """Kernels made for virtual machines first, newer names first."""
    kernels = sorted(boot.glob("vmlinuz-*"), reverse=True)
    return sorted(kernels, key=lambda path: not path.name.endswith("-cloud-amd64"))


def _first_readable(paths: list[Path]) -> Path | None:
    return next((path for path in paths if path.is_file() and os.access(path, os.R_OK)), None)


def _is_static(program: Path) -> bool:
    try:
        return _INTERPRETER not in program.read_bytes()[:4096]
    except OSError:
        return False


def _modules(folder: Path | None, name: str) -> tuple[Path, ...]:
    return () if folder is None else tuple(sorted((folder / name).glob("*.ko")))
