"""The kernel hashes table as QEMU writes it and as edk2's AmdSev blob verifier reads it.

Sources: QEMU, target/i386/sev.c `build_kernel_loader_hashes`; edk2, OvmfPkg/AmdSev/BlobVerifierLibSevHashes. Written
apart from `common.sev.digest`. Files are hashed in pieces: an initrd may be larger than memory.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from uuid import UUID

TABLE_SIZE = 176  # 168 bytes of table, padded to a multiple of 16
_TABLE = UUID("9438d606-4f22-4cc9-b479-a793d411fd21")
_CMDLINE = UUID("97d02dd8-bd20-4c94-aa78-e7714d36ab2a")
_INITRD = UUID("44baf731-3a2f-4bd7-9af1-41e29169781d")
_KERNEL = UUID("4de79437-abd2-427f-b835-d5b172d2045b")
_HEAD = struct.Struct("<16sH")  # GUID, length of everything with this head
_DIGEST_SIZE = 32


@dataclass(frozen=True, kw_only=True)
class BootHashes:
    """SHA-256 of what is handed to the firmware for a direct boot.

    Attributes:
        kernel: of the file.
        initrd: of the file, or of nothing.
        cmdline: of the command line with its NUL, or of one NUL.
    """

    kernel: bytes
    initrd: bytes
    cmdline: bytes

    @classmethod
    def of(cls, kernel: Path, initrd: Path | None, append: bytes | None) -> Self:
        """Hash the files.

        Raises:
            OSError: one of them cannot be read.
        """
        return cls(
            kernel=_file_digest(kernel),
            initrd=_file_digest(initrd) if initrd else hashlib.sha256().digest(),
            cmdline=hashlib.sha256((append or b"") + b"\0").digest(),
        )

    def table(self) -> bytes:
        """The 176 bytes that go into guest memory and into the launch digest."""
        entries = b"".join(
            _HEAD.pack(guid.bytes_le, _HEAD.size + _DIGEST_SIZE) + digest
            for guid, digest in ((_CMDLINE, self.cmdline), (_INITRD, self.initrd), (_KERNEL, self.kernel))
        )
        table = _HEAD.pack(_TABLE.bytes_le, _HEAD.size + len(entries)) + entries
        return table.ljust(TABLE_SIZE, b"\0")

    def accepted_by(self, area: bytes) -> bool:
        """Whether the guest's firmware, which finds `area` in its memory, boots what it was handed."""
        found = _read(area)
        return all(
            found.get(guid) == digest
            for guid, digest in ((_KERNEL, self.kernel), (_INITRD, self.initrd), (_CMDLINE, self.cmdline))
        )


def _read(area: bytes) -> dict[UUID, bytes]:
    """Entries of a table; none for what is no table."""
    if len(area) < _HEAD.size:
        return {}
    guid, length = _HEAD.unpack_from(area)
    if UUID(bytes_le=guid) != _TABLE or not _HEAD.size <= length <= len(area):
        return {}
    entries: dict[UUID, bytes] = {}
    at = _HEAD.size
    while at + _HEAD.size <= length:
        guid, size = _HEAD.unpack_from(area, at)
        if size < _HEAD.size or at + size > length:
            return {}
        entries.setdefault(UUID(bytes_le=guid), area[at + _HEAD.size : at + size])
        at += size
    return entries


def _file_digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
