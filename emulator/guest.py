"""What runs in the stand-in machine's guest: firmware that checks what it boots, then a kernel that reads its secrets.

Sources: edk2, OvmfPkg/AmdSev (blob verifier: a kernel that the hashes table does not vouch for is not booted, and the
boot manager waits for ever); Linux, drivers/virt/coco/efi_secret/efi_secret.c. The guest speaks on its serial line:

    secret <guid> <size> <hex>     one line for each secret that efi_secret would show as a file
    no secret area                 the firmware has none, or nothing was injected
    secret area is corrupted       efi_secret would show nothing
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from uuid import UUID

from emulator.footer import Footer
from emulator.guest_memory import GuestMemory, NotMapped
from emulator.kernel_hashes import BootHashes

NO_AREA = "no secret area"
CORRUPTED = "secret area is corrupted"
# What the boot manager of an AmdSev build says when the kernel was refused and its own boot loader is not there.
_DXE_VOLUME = "7CB8BDC9-F8EB-4F34-AAEA-3EE4AF6516A1"
NOT_BOOTED = f'BdsDxe: failed to load Boot0002 "Grub Bootloader" from Fv({_DXE_VOLUME}): Not Found'

_TABLE_GUID = UUID("1e74f542-71dd-4d66-963e-ef4287ff173b")
_ENTRY = struct.Struct("<16sI")  # GUID, length with this head
_MAX_FILES = 64  # EFI_SECRET_NUM_FILES


def boot(memory: GuestMemory, footer: Footer, direct: BootHashes | None) -> list[str]:
    """Run the guest; returns what it says on its serial line.

    Args:
        memory: the guest's memory as the launch left it.
        footer: what its firmware knows about itself.
        direct: what was handed over with -kernel; None when the firmware looks for a disk.
    """
    if direct is not None and not _firmware_boots(memory, footer, direct):
        return [NOT_BOOTED]
    area = footer.secret
    if area is None or not area.base or not area.size:
        return [NO_AREA]
    try:
        content = memory.read(area.base, area.size)
    except NotMapped:
        return [NO_AREA]
    return list(read_secrets(content))


def read_secrets(area: bytes) -> Iterator[str]:
    """The serial lines for a secret area with this content."""
    if len(area) < _ENTRY.size or UUID(bytes_le=area[:16]) != _TABLE_GUID:
        yield NO_AREA
        return
    (_, length) = _ENTRY.unpack_from(area)
    if not _ENTRY.size <= length <= len(area):
        yield CORRUPTED
        return
    lines: list[str] = []
    at = _ENTRY.size
    while length - at >= _ENTRY.size and len(lines) < _MAX_FILES:
        guid, size = _ENTRY.unpack_from(area, at)
        if not _ENTRY.size <= size <= length - at:
            yield CORRUPTED  # and nothing of what came before is shown
            return
        if any(guid):  # a deleted entry has a zero GUID
            data = area[at + _ENTRY.size : at + size]
            lines.append(f"secret {UUID(bytes_le=guid)} {len(data)} {data.hex()}")
        at += size
    yield from lines


def _firmware_boots(memory: GuestMemory, footer: Footer, direct: BootHashes) -> bool:
    area = footer.hashes
    if area is None or not area.base:
        return True  # not an AmdSev build: its firmware verifies nothing
    try:
        return direct.accepted_by(memory.read(area.base, area.size))
    except NotMapped:
        return False
