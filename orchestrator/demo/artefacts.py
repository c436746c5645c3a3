"""What guests are made of in the demonstration: two versions of a workload's firmware, kernel, initrd, command line.

The owner and the host each have copies of their own, as they would: the owner's are the reference values, the host's
are what the machine is started with. The firmware of version 2 is the distribution's AmdSev build where one is
installed; everything else is small and made for the run.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from common.sev.digest.ovmf import TAIL_SIZE_MAX, parse_footer

# Where distributions put OVMF's AmdSev build (Debian and Ubuntu: package ovmf; Fedora: edk2-ovmf).
OVMF_PATHS = (
    Path("/usr/share/ovmf/OVMF.amdsev.fd"),
    Path("/usr/share/OVMF/OVMF.amdsev.fd"),
    Path("/usr/share/edk2/ovmf/OVMF.amdsev.fd"),
)

OLD, CURRENT = "1", "2"
VERSIONS = (OLD, CURRENT)
CMDLINES = {
    OLD: "console=ttyS0 root=/dev/mapper/root ro systemd.debug_shell",
    CURRENT: "console=ttyS0 root=/dev/mapper/root ro",
}
_KERNEL_SIZE = 256 * 1024
_INITRD_SIZE = 512 * 1024


@dataclass(frozen=True, kw_only=True)
class Artefacts:
    """The files of one version.

    Attributes:
        folder: where they are.
        version: which version.
    """

    folder: Path
    version: str

    @property
    def firmware(self) -> Path:
        """The guest's firmware image."""
        return self.folder / f"firmware-{self.version}.fd"

    @property
    def kernel(self) -> Path:
        """The kernel."""
        return self.folder / f"kernel-{self.version}"

    @property
    def initrd(self) -> Path:
        """The initial RAM disk."""
        return self.folder / f"initrd-{self.version}"

    @property
    def cmdline(self) -> str:
        """The kernel's command line."""
        return CMDLINES[self.version]

    def write_kernel_and_initrd(self) -> None:
        """Write stand-ins that differ from version to version; the built-in machine measures and never runs them."""
        self.kernel.write_bytes(_filler(f"kernel {self.version}", _KERNEL_SIZE))
        self.initrd.write_bytes(_filler(f"initrd {self.version}", _INITRD_SIZE))

    def copy_to(self, folder: Path) -> Artefacts:
        """The same version with files of its own in `folder`."""
        copy = Artefacts(folder=folder, version=self.version)
        for ours, theirs in ((self.firmware, copy.firmware), (self.kernel, copy.kernel), (self.initrd, copy.initrd)):
            shutil.copyfile(ours, theirs)
        return copy


def installed_ovmf() -> Path | None:
    """The distribution's AmdSev build of OVMF, if there is one that has places for secrets and kernel hashes."""
    return next((path for path in OVMF_PATHS if _is_amdsev(path)), None)


def _is_amdsev(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            file.seek(-TAIL_SIZE_MAX, os.SEEK_END)
            footer = parse_footer(file.read())
    except OSError:
        return False
    return None not in (footer.reset_address, footer.secret_area, footer.hashes_area)


def _filler(label: str, size: int) -> bytes:
    head = f"sevattest demonstration, {label}\n".encode()
    return head + hashlib.shake_256(head).digest(size - len(head))
