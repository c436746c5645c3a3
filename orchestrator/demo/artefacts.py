"""What guests are made of in the demonstration: two versions of a workload's firmware, kernel, initrd, command line.

The owner and the host each have copies of their own, as they would: the owner's are the reference values, the host's
are what the machine is started with. The firmware of version 2 is the distribution's AmdSev build where one is
installed. Kernel and initrd are those of a guest that boots where its parts are at hand, else small stand-ins.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path

from orchestrator.demo.guest.initramfs import build
from orchestrator.demo.guest.parts import OVMF_PATHS, GuestParts, is_amdsev

OLD, CURRENT = "1", "2"
VERSIONS = (OLD, CURRENT)
# A stock kernel has no driver for secrets, so the guest reads its own memory, which `iomem=relaxed` allows. On a loaded
# host the timer of a QEMU without KVM is too late for the kernel's check of it.
CMDLINES = {
    OLD: "console=ttyS0 iomem=relaxed no_timer_check systemd.debug_shell",
    CURRENT: "console=ttyS0 iomem=relaxed no_timer_check",
}
_SECTOR = 512
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

    def write_kernel_and_initrd(self, parts: GuestParts | None = None) -> None:
        """Write kernel and initrd, which differ from version to version.

        Args:
            parts: of a guest that boots; without them both are stand-ins, which a machine measures and never runs.
        """
        if parts is None:
            self.kernel.write_bytes(_filler(f"kernel {self.version}", _KERNEL_SIZE))
            self.initrd.write_bytes(_filler(f"initrd {self.version}", _INITRD_SIZE))
            return
        # What stands behind a kernel's end changes its hash and nothing that it does.
        behind = b"" if self.version == CURRENT else _filler(f"kernel {self.version}", _SECTOR)
        self.kernel.write_bytes(parts.kernel.read_bytes() + behind)
        self.initrd.write_bytes(build(parts, label=f"sevattest demonstration, version {self.version}"))

    def copy_to(self, folder: Path) -> Artefacts:
        """The same version with files of its own in `folder`."""
        copy = Artefacts(folder=folder, version=self.version)
        for ours, theirs in ((self.firmware, copy.firmware), (self.kernel, copy.kernel), (self.initrd, copy.initrd)):
            shutil.copyfile(ours, theirs)
        return copy


def installed_ovmf() -> Path | None:
    """The distribution's AmdSev build of OVMF, if there is one that has places for secrets and kernel hashes."""
    return next((path for path in OVMF_PATHS if is_amdsev(path)), None)


def _filler(label: str, size: int) -> bytes:
    head = f"sevattest demonstration, {label}\n".encode()
    return head + hashlib.shake_256(head).digest(size - len(head))
