"""The firmware image's footer table as QEMU reads it (hw/i386/pc_sysfw_ovmf.c), written apart from `common.sev.digest`.

The table ends 32 bytes before the end of the image and is walked backwards: data, u16 length (of data, length and GUID
together), GUID. An entry may exist and still name nothing: the distributions' images have base 0 and size 0.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Self
from uuid import UUID

_TABLE = UUID("96b582de-1fb2-45f7-baea-a366c55a082d")
_RESET = UUID("00f771de-1a7e-4fcb-890e-68c77e2fb44e")
_SECRET = UUID("4c2eb361-7d9b-4cc3-8081-127c90d3d294")
_HASHES = UUID("7255371f-3a3b-4b04-927b-1da6efa8d454")
_ENTRY = struct.Struct("<H16s")  # stands behind its data
_RESET_VECTOR = 32  # bytes behind the table


@dataclass(frozen=True, kw_only=True)
class Area:
    """A range of guest physical memory that the firmware sets aside."""

    base: int
    size: int


@dataclass(frozen=True, kw_only=True)
class Footer:
    """What the machine needs from the table; None where the image has no such entry.

    Attributes:
        reset_address: where SEV-ES APs start.
        secret: where launch secrets go.
        hashes: where the kernel hashes table goes.
    """

    reset_address: int | None
    secret: Area | None
    hashes: Area | None

    @classmethod
    def read(cls, image: bytes) -> Self:
        """Read the end of an image; an image without a table has nothing."""
        entries = _entries(image)
        if not entries:
            entries = _bare_reset_block(image)
        reset = entries.get(_RESET, b"")
        return cls(
            reset_address=int.from_bytes(reset[:4], "little") if len(reset) >= 4 else None,
            secret=_area(entries.get(_SECRET)),
            hashes=_area(entries.get(_HASHES)),
        )


def _entries(image: bytes) -> dict[UUID, bytes]:
    end = len(image) - _RESET_VECTOR
    start = end - _ENTRY.size
    if start < 0:
        return {}
    length, guid = _ENTRY.unpack_from(image, start)
    if UUID(bytes_le=guid) != _TABLE or length < _ENTRY.size or end - length < 0:
        return {}
    first = end - length
    entries: dict[UUID, bytes] = {}
    at = start
    while at - _ENTRY.size >= first:
        length, guid = _ENTRY.unpack_from(image, at - _ENTRY.size)
        if length < _ENTRY.size or at - length < first:
            break
        # The walk is from the end, and the first of two entries with one GUID is the one that is found.
        entries.setdefault(UUID(bytes_le=guid), image[at - length : at - _ENTRY.size])
        at -= length
    return entries


def _bare_reset_block(image: bytes) -> dict[UUID, bytes]:
    """Firmware from before the table: the reset block alone stands in its place."""
    at = len(image) - _RESET_VECTOR - _ENTRY.size
    if at < 0:
        return {}
    length, guid = _ENTRY.unpack_from(image, at)
    start = at + _ENTRY.size - length
    if UUID(bytes_le=guid) != _RESET or length < _ENTRY.size or start < 0:
        return {}
    return {_RESET: image[start:at]}


def _area(data: bytes | None) -> Area | None:
    if data is None or len(data) < 8:
        return None
    base, size = struct.unpack_from("<II", data)
    return Area(base=base, size=size)
