"""Makes the folder with the parts of a real guest from Debian packages: `python -m tests.e2e.packages DIR`.

Nothing is installed and no root is needed. The folder (its content: `orchestrator.demo.guest.parts`) is made beside
its place and renamed into it, one run at a time; a folder of another format, or to which something is missing, is made
again. What cannot be had is named on stderr with what to do about it, and the exit code is 3; the rest is there.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import InvalidInput, Reason, SevattestError, Unavailable
from orchestrator.demo.guest.parts import FORMAT, QEMU, STAMP, is_amdsev, is_current, read_stamp
from tests.e2e.efi_secret import build_modules
from tests.e2e.kernel_modules import copy_modules
from tests.e2e.private_apt import PrivateApt

KERNEL = "linux-image-cloud-amd64"
# A virtio disk, and LUKS with AES-XTS.
_DISK_MODULES = ("virtio_pci", "virtio_blk", "dm-crypt", "ecb", "xts")
_LOADER = "ld-linux-x86-64.so.2"
_INCOMPLETE = 3
_NEWER_QEMU = (9, 1)  # since then `query-sev` tells the kind of guest


@dataclass(kw_only=True)
class Making:
    """A folder that is being made.

    Attributes:
        folder: what will be the folder.
        scratch: room for what is not kept.
        apt: the machine's package sources, updated.
        versions: packages that were used.
        missing: parts that could not be had, and why.
    """

    folder: Path
    scratch: Path
    apt: PrivateApt
    versions: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def part(self, name: str, make: Callable[[], None], *, hint: str = "") -> None:
        """Make one part, or note why it is missing."""
        try:
            make()
        except SevattestError as error:
            self.missing[name] = f"{error.message}{hint}"
        except OSError as error:
            self.missing[name] = f"{error.strerror or error}: {error.filename}{hint}"

    def unpack(self, apt: PrivateApt, packages: list[str], name: str) -> Path:
        """The root of unpacked packages.

        Raises:
            Unavailable: one cannot be had.
        """
        root = self.scratch / name
        root.mkdir()
        self.versions.update(apt.unpack(packages, root))
        return root

    # ------------------------------------------------------------------------------------------------------ parts

    def kernel(self) -> None:
        """`vmlinuz` and `modules/`: the package that the meta package stands for today."""
        package = self._kernel_package()
        root = self.unpack(self.apt, [package], "kernel")
        shutil.copy(_only(root, "boot/vmlinuz-*", package), self.folder / "vmlinuz")
        copy_modules(_only(root, "**/lib/modules/*", package), _DISK_MODULES, self.folder / "modules")

    def busybox(self) -> None:
        """`busybox`: without libraries."""
        root = self.unpack(self.apt, ["busybox-static"], "busybox")
        shutil.copy(_only(root, "**/bin/busybox", "busybox-static"), self.folder / "busybox")

    def cryptsetup(self) -> None:
        """`cryptsetup/`: the program with the loader and the libraries that the loader finds for it."""
        root = self.unpack(self.apt, self.apt.closure("cryptsetup-bin"), "cryptsetup-bin")
        program = _only(root, "**/sbin/cryptsetup", "cryptsetup-bin")
        loader = _only(root, f"**/{_LOADER}", "libc6")
        paths = ":".join(sorted({str(path.parent) for path in root.rglob("*.so.*")}))
        listed = subprocess.run(
            [loader, "--library-path", paths, "--list", program], capture_output=True, text=True, check=False
        )
        found = (line.partition("=> ")[2].rpartition(" (")[0] for line in listed.stdout.splitlines())
        libraries = [Path(path) for path in found if path.startswith(str(root))]
        if listed.returncode or not libraries:
            raise _unavailable(f"the libraries of cryptsetup cannot be found: {listed.stderr.strip()}")
        target = self.folder / "cryptsetup"
        target.mkdir()
        shutil.copy(program, target / "cryptsetup")
        shutil.copy(loader, target / "ld.so")
        for library in libraries:
            if library.name != _LOADER:
                shutil.copy(library, target / library.name)

    def firmware(self) -> None:
        """`firmware.fd`: from the machine's own sources, else from the mirror's newer suites."""
        reasons = []
        for number, apt in enumerate(self._firmware_sources()):
            try:
                root = self.unpack(apt, ["ovmf-amdsev"], f"firmware-{number}")
            except Unavailable as error:
                reasons.append(error.message)
                continue
            image = _only(root, "usr/share/**/*.amdsev.fd", "ovmf-amdsev")
            if not is_amdsev(image):
                raise _unavailable("the image in ovmf-amdsev has no place for secrets")
            shutil.copy(image, self.folder / "firmware.fd")
            return
        raise _unavailable(reasons[-1])

    def newer_qemu(self) -> None:
        """`qemu/`: one whose QMP has the shape of 9.1 and newer, where the machine's own is older."""
        apt = self.apt.backports(self.scratch / "backports")
        if apt is None:
            raise _unavailable("the mirror has no backports")
        apt.update()
        root = self.unpack(apt, ["qemu-system-x86", "qemu-system-common", "qemu-system-data"], "qemu")
        program = _only(root, f"usr/bin/{QEMU}", "qemu-system-x86")
        answer = subprocess.run([program, "-version"], capture_output=True, text=True, check=False)
        if answer.returncode:
            raise _unavailable(
                f"it does not run here: {answer.stderr.strip()}; Debian's qemu-system-x86 has what it needs"
            )
        # It looks for its data beside itself.
        for name in ("bin", "share"):
            (self.folder / "qemu" / "usr" / name).mkdir(parents=True)
        shutil.copy(program, self.folder / "qemu/usr/bin" / QEMU)
        shutil.copytree(root / "usr/share/qemu", self.folder / "qemu/usr/share/qemu")

    def efi_secret(self) -> None:
        """`efi_secret/`: the driver, built for the kernel."""
        release = self._kernel_package().removeprefix("linux-image-")
        headers = self.apt.depends(f"linux-headers-{release}")
        root = self.unpack(self.apt, [f"linux-headers-{release}", *headers], "headers")
        source = self.unpack(self.apt, self.apt.depends("linux-source")[:1], "source")
        work = self.scratch / "efi_secret"
        target = self.folder / "efi_secret"
        work.mkdir()
        target.mkdir()
        tar = _only(source, "usr/src/linux-source-*.tar.xz", "linux-source")
        build_modules(headers=root, source=tar, release=release, work=work, into=target)

    def _kernel_package(self) -> str:
        packages = [name for name in self.apt.depends(KERNEL) if name.startswith("linux-image-")]
        if not packages:
            raise _unavailable(f"cannot get {KERNEL}: {self.apt.complaint or 'no package has that name'}")
        return packages[0]

    def _firmware_sources(self) -> Iterator[PrivateApt]:
        yield self.apt
        for apt in self.apt.newer(self.scratch / "newer"):
            apt.update()
            yield apt


def make(folder: Path, *, efi_secret: bool) -> dict[str, str]:
    """Make the folder, unless it is there already; returns what is missing.

    Args:
        folder: where; what is there is replaced when it is not current.
        efi_secret: whether the driver is wanted too.

    Raises:
        InvalidInput: there is something else.
        Unavailable: this machine has no Debian packages.
    """
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _alone(folder.parent):
        if _is_enough(folder, efi_secret=efi_secret):
            return {}
        if folder.exists() and not read_stamp(folder) and (not folder.is_dir() or any(folder.iterdir())):
            raise InvalidInput(Reason.INVALID_ARGUMENT, f"{folder} is there and is no folder with a guest's parts")
        prefix = f"{folder.name}.making-"
        for leftover in folder.parent.glob(f"{prefix}*"):  # of a run that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        room = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
        try:
            return _make(folder, room, efi_secret=efi_secret)
        finally:
            shutil.rmtree(room, ignore_errors=True)


def _make(folder: Path, room: Path, *, efi_secret: bool) -> dict[str, str]:
    for name in ("new", "scratch", "apt"):
        (room / name).mkdir(mode=0o755)
    apt = PrivateApt(room / "apt")
    apt.update()
    making = Making(folder=room / "new", scratch=room / "scratch", apt=apt)
    making.part("kernel", making.kernel)
    making.part("busybox", making.busybox)
    making.part("cryptsetup", making.cryptsetup)
    making.part("firmware", making.firmware, hint="; `make e2e OVMF=/path/to/an/AmdSev/image` uses another")
    if _installed_qemu() < _NEWER_QEMU:
        making.part("newer QEMU", making.newer_qemu)
    if efi_secret:
        making.part("efi_secret", making.efi_secret)
    stamp = {"format": FORMAT, "efi_secret": efi_secret, "packages": making.versions, "missing": making.missing}
    (making.folder / STAMP).write_text(json.dumps(stamp, indent=2, sort_keys=True) + "\n")
    if folder.exists():
        folder.rename(room / "old")
    making.folder.rename(folder)
    return making.missing


def _installed_qemu() -> tuple[int, ...]:
    """Version of the machine's own QEMU; nothing where there is none."""
    program = shutil.which(QEMU)
    if program is None:
        return ()
    answer = subprocess.run([program, "-version"], capture_output=True, text=True, check=False)
    found = re.search(r"version (\d+)\.(\d+)", answer.stdout)
    return (int(found[1]), int(found[2])) if found else ()


def _is_enough(folder: Path, *, efi_secret: bool) -> bool:
    stamp = read_stamp(folder)
    return is_current(folder) and not stamp.get("missing") and (not efi_secret or stamp.get("efi_secret") is True)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which leaves no file behind."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _only(root: Path, pattern: str, package: str) -> Path:
    found = [path for path in sorted(root.glob(pattern)) if not path.is_symlink()] or sorted(root.glob(pattern))
    if not found:
        raise _unavailable(f"the package {package} has no {pattern}")
    return found[0]


def _unavailable(message: str) -> Unavailable:
    return Unavailable(Reason.UNREACHABLE, message)


def main() -> int:
    """Make the folder and say what it holds."""
    parser = argparse.ArgumentParser(prog="python -m tests.e2e.packages", description="gets the parts of a real guest")
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--efi-secret", action="store_true", help="builds the driver efi_secret for the kernel too")
    arguments = parser.parse_args()
    began = time.monotonic()
    try:
        missing = make(arguments.folder, efi_secret=arguments.efi_secret)
    except (SevattestError, OSError) as error:
        sys.stderr.write(f"guest: {error}\n")
        return _INCOMPLETE
    sys.stdout.write(f"guest: parts in {arguments.folder} ({time.monotonic() - began:.1f} s)\n")
    for part, sentence in missing.items():
        sys.stderr.write(f"guest: no {part}: {sentence}\n")
    return _INCOMPLETE if missing else 0


if __name__ == "__main__":
    sys.exit(main())
