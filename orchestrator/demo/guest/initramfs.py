"""Writes the guest's initial RAM disk: busybox, two shell scripts, and what a disk or the secret driver needs.

The archive is cpio's `newc` format as Linux unpacks it (Documentation/driver-api/early-userspace/buffer-format.rst). It
depends on nothing but its content, so the same parts give the same bytes, which an owner can measure in advance.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from stat import S_IFCHR, S_IFDIR, S_IFLNK, S_IFREG

from common.errors import InvalidInput, Reason
from orchestrator.demo.guest.parts import GuestParts

# What the scripts call, besides the shell's own.
APPLETS = (
    *("cat", "dd", "echo", "head", "insmod", "mount", "nproc", "od", "printf"),
    *("sed", "sh", "sleep", "stty", "test", "tr", "uname"),
)
_FOLDERS = ("bin", "dev", "etc", "lib", "modules", "proc", "run", "sys")
_TRAILER = "TRAILER!!!"
_BLOCK = 512  # an archive fills whole blocks


class Archive:
    """A `newc` archive that grows; everything belongs to root and is from 1970."""

    def __init__(self) -> None:
        self._content = bytearray()
        self._number = 0

    def folder(self, name: str) -> None:
        """Add a folder; its parent must be there."""
        self._add(name, S_IFDIR | 0o755, b"", links=2)

    def file(self, name: str, data: bytes, *, executable: bool = False) -> None:
        """Add a file; its folder must be there."""
        self._add(name, S_IFREG | (0o755 if executable else 0o644), data)

    def link(self, name: str, target: str) -> None:
        """Add a symbolic link."""
        self._add(name, S_IFLNK | 0o777, target.encode())

    def character_device(self, name: str, major: int, minor: int) -> None:
        """Add a device node."""
        self._add(name, S_IFCHR | 0o600, b"", device=(major, minor))

    def content(self) -> bytes:
        """The archive, closed and padded to whole blocks of 512 bytes."""
        whole = Archive()
        whole._content += self._content
        whole._add(_TRAILER, 0, b"", number=0)
        return bytes(whole._content) + bytes(-len(whole._content) % _BLOCK)

    def _add(
        self,
        name: str,
        mode: int,
        data: bytes,
        *,
        links: int = 1,
        device: tuple[int, int] = (0, 0),
        number: int | None = None,
    ) -> None:
        if number is None:
            self._number += 1
            number = self._number
        path = name.encode() + b"\0"
        # ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check
        fields = (number, mode, 0, 0, links, 0, len(data), 0, 0, *device, len(path), 0)
        self._content += b"070701" + b"".join(b"%08X" % field for field in fields)
        for part in (path, data):
            self._content += part
            self._content += bytes(-len(self._content) % 4)


def build(parts: GuestParts, *, label: str, disk: bool = False, efi_secret: bool = False) -> bytes:
    """The initramfs of a guest.

    Args:
        parts: what it is made of.
        label: goes into `/etc/label`, so that two versions of a workload differ.
        disk: whether the guest can open an encrypted disk.
        efi_secret: whether it loads the driver that shows secrets as files.

    Raises:
        InvalidInput: the parts lack what the disk or the driver needs, or one cannot be read.
    """
    if disk and (parts.cryptsetup is None or not parts.disk_modules):
        raise _lacking("opening a disk needs cryptsetup and kernel modules; `make guest` gets them")
    if efi_secret and not parts.secret_modules:
        raise _lacking("the driver efi_secret is not there; `make guest EFI_SECRET=1` builds it")
    archive = Archive()
    for name in _FOLDERS:
        archive.folder(name)
    archive.character_device("dev/console", 5, 1)
    archive.file("init", _script("init"), executable=True)
    archive.file("lib/secrets.sh", _script("secrets.sh"))
    archive.file("etc/label", f"{label}\n".encode())
    archive.file("bin/busybox", _read(parts.busybox), executable=True)
    for applet in APPLETS:
        archive.link(f"bin/{applet}", "busybox")
    if disk and parts.cryptsetup is not None:
        _add_files(archive, "cryptsetup", sorted(parts.cryptsetup.iterdir()), executable=True)
        _add_files(archive, "modules/disk", parts.disk_modules)
    if efi_secret:
        _add_files(archive, "modules/secret", parts.secret_modules)
    return archive.content()


def _add_files(
    archive: Archive, folder: str, files: list[Path] | tuple[Path, ...], *, executable: bool = False
) -> None:
    archive.folder(folder)
    for path in files:
        archive.file(f"{folder}/{path.name}", _read(path), executable=executable)


def _script(name: str) -> bytes:
    return resources.files(__package__).joinpath(name).read_bytes()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _lacking(f"{path} cannot be read: {error.strerror}") from error


def _lacking(message: str) -> InvalidInput:
    return InvalidInput(Reason.INVALID_CONFIGURATION, message)
