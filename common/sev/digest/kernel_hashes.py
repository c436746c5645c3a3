"""The table of kernel, initrd and command-line hashes that QEMU puts into guest memory and has measured.

Source: QEMU `target/i386/sev.c`, `sev_add_kernel_loader_hashes`; formats.md section 7. Every byte must be as QEMU
writes it, the order of the entries and the padding included.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import Self
from uuid import UUID

from common.errors import InvalidInput, Reason
from common.sev.abi import DIGEST_SIZE

TABLE_GUID = UUID("9438d606-4f22-4cc9-b479-a793d411fd21")
CMDLINE_GUID = UUID("97d02dd8-bd20-4c94-aa78-e7714d36ab2a")
INITRD_GUID = UUID("44baf731-3a2f-4bd7-9af1-41e29169781d")
KERNEL_GUID = UUID("4de79437-abd2-427f-b835-d5b172d2045b")

TABLE_SIZE = 176  # 168 and 8 bytes of padding: firmware measures multiples of 16
NO_INITRD = hashlib.sha256(b"").digest()

_HEADER = struct.Struct("<16sH")
_ENTRY = struct.Struct("<16sH32s")
_CONTENT_SIZE = _HEADER.size + 3 * _ENTRY.size


def hash_cmdline(cmdline: bytes | None) -> bytes:
    """SHA-256 of a command line as QEMU hashes it: verbatim, with one NUL; no command line is an empty one."""
    return hashlib.sha256((cmdline or b"") + b"\0").digest()


@dataclass(frozen=True, kw_only=True)
class KernelHashes:
    """SHA-256 of what a guest boots directly, 32 bytes each.

    Attributes:
        kernel: of the kernel's file as it is.
        initrd: of the initrd's file; of nothing, where there is none.
        cmdline: of the command line and its NUL.

    Raises:
        InvalidInput: a hash has another size.
    """

    kernel: bytes
    initrd: bytes
    cmdline: bytes

    def __post_init__(self) -> None:
        for name, digest in (("kernel", self.kernel), ("initrd", self.initrd), ("command line", self.cmdline)):
            if len(digest) != DIGEST_SIZE:
                raise InvalidInput(Reason.INVALID_ARGUMENT, f"a {name} hash has {DIGEST_SIZE} bytes, not {len(digest)}")

    @classmethod
    def of(cls, kernel_sha: bytes, initrd_sha: bytes | None, cmdline: bytes | None) -> Self:
        """The hashes for a kernel, perhaps an initrd (both as SHA-256) and perhaps a command line (as it is, no NUL).

        Raises:
            InvalidInput: a hash has another size.
        """
        initrd = NO_INITRD if initrd_sha is None else initrd_sha
        return cls(kernel=kernel_sha, initrd=initrd, cmdline=hash_cmdline(cmdline))

    def table(self) -> bytes:
        """The table as it is measured, 176 bytes: all three entries, so that no blob boots without being checked."""
        content = _HEADER.pack(TABLE_GUID.bytes_le, _CONTENT_SIZE) + b"".join(
            _ENTRY.pack(guid.bytes_le, _ENTRY.size, digest)
            for guid, digest in ((CMDLINE_GUID, self.cmdline), (INITRD_GUID, self.initrd), (KERNEL_GUID, self.kernel))
        )
        return content + bytes(TABLE_SIZE - _CONTENT_SIZE)
