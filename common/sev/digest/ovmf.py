"""The table at the end of an OVMF image, which says where the firmware expects what.

Source: edk2 `OvmfPkg/ResetVector`, read as QEMU's `pc_system_parse_ovmf_flash` and `sev_es_find_reset_vector` read it;
formats.md section 12. Reading is lenient (a plain SEV guest needs no table); whoever needs an entry that is absent
refuses at that point, with a message of its own.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from uuid import UUID

FOOTER_GUID = UUID("96b582de-1fb2-45f7-baea-a366c55a082d")
RESET_BLOCK_GUID = UUID("00f771de-1a7e-4fcb-890e-68c77e2fb44e")
SECRET_AREA_GUID = UUID("4c2eb361-7d9b-4cc3-8081-127c90d3d294")
HASHES_AREA_GUID = UUID("7255371f-3a3b-4b04-927b-1da6efa8d454")

RESET_VECTOR_SIZE = 32  # the image's last bytes, below which the table ends
TABLE_SIZE_MAX = 0xFFFF  # its length is a u16
TAIL_SIZE_MAX = TABLE_SIZE_MAX + RESET_VECTOR_SIZE  # no table starts before this many bytes from the end

_ENTRY_TAIL = struct.Struct("<H16s")  # length including these 18 bytes, GUID; the data stands before them
_AREA = struct.Struct("<II")


@dataclass(frozen=True, kw_only=True)
class Area:
    """A range of guest memory that the firmware reserves.

    Attributes:
        base: guest physical address, not zero.
        size: bytes, not zero.
    """

    base: int
    size: int


@dataclass(frozen=True, kw_only=True)
class Footer:
    """What the table says; None for what it leaves out or sets to zero.

    Attributes:
        reset_address: where application processors of an SEV-ES guest start.
        secret_area: where the guest looks for its secrets.
        hashes_area: where the firmware looks for the hashes of kernel, initrd and command line.
    """

    reset_address: int | None = None
    secret_area: Area | None = None
    hashes_area: Area | None = None


def parse_footer(tail: bytes) -> Footer:
    """The table in the last bytes of an image; an empty footer where there is none or its length is impossible.

    Args:
        tail: the image's end: the whole image, or at least its last `TAIL_SIZE_MAX` bytes.
    """
    table_end = len(tail) - RESET_VECTOR_SIZE
    entries: dict[UUID, bytes] = {}
    last = _entry_before(tail, 0, table_end)
    if last is not None:
        guid, start = last
        if guid == FOOTER_GUID:
            # The nearest to the end counts where one comes twice, as in QEMU.
            for name, data in _walk(tail, start, table_end - _ENTRY_TAIL.size):
                entries.setdefault(name, data)
        elif guid == RESET_BLOCK_GUID:
            # The oldest form: no table, the reset block alone at its place.
            entries[guid] = tail[start : table_end - _ENTRY_TAIL.size]
    return Footer(
        reset_address=_address(entries.get(RESET_BLOCK_GUID, b"")),
        secret_area=_area(entries.get(SECRET_AREA_GUID, b"")),
        hashes_area=_area(entries.get(HASHES_AREA_GUID, b"")),
    )


def _entry_before(tail: bytes, floor: int, end: int) -> tuple[UUID, int] | None:
    """GUID and start of the entry that ends at `end`; None if there is no room for it above `floor`."""
    if end - floor < _ENTRY_TAIL.size:
        return None
    length, guid = _ENTRY_TAIL.unpack_from(tail, end - _ENTRY_TAIL.size)
    if not _ENTRY_TAIL.size <= length <= end - floor:
        return None
    return UUID(bytes_le=guid), end - length


def _walk(tail: bytes, floor: int, end: int) -> Iterator[tuple[UUID, bytes]]:
    """Entries from the end backwards, up to the first with an impossible length."""
    while (entry := _entry_before(tail, floor, end)) is not None:
        guid, start = entry
        yield guid, tail[start : end - _ENTRY_TAIL.size]
        end = start


def _address(data: bytes) -> int | None:
    return int.from_bytes(data[:4], "little") or None if len(data) >= 4 else None


def _area(data: bytes) -> Area | None:
    if len(data) < _AREA.size:
        return None
    base, size = _AREA.unpack_from(data)
    # Builds without confidential-computing support say 0/0; a base of zero is no place to write a secret to either.
    return Area(base=base, size=size) if base and size else None
