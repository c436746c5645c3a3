"""A firmware image for where no real one is installed: 4 MiB that no processor can run, with a true AmdSev footer.

Its content follows from a label alone, so that two versions of "the firmware" are two labels. Footer layout: edk2,
OvmfPkg/ResetVector; addresses as Debian's ovmf-amdsev has them.
"""

from __future__ import annotations

import struct
from hashlib import shake_256
from pathlib import Path
from uuid import UUID

IMAGE_SIZE = 4 << 20
RESET_ADDRESS = 0x80B004
SECRET_AREA = (0x810000, 0xC00)
HASHES_AREA = (0x810C00, 0x400)

_RESET_VECTOR_SIZE = 32
_GUID_RESET = UUID("00f771de-1a7e-4fcb-890e-68c77e2fb44e")
_GUID_SECRET = UUID("4c2eb361-7d9b-4cc3-8081-127c90d3d294")
_GUID_HASHES = UUID("7255371f-3a3b-4b04-927b-1da6efa8d454")
_GUID_TABLE = UUID("96b582de-1fb2-45f7-baea-a366c55a082d")
_NAME_AT = 64  # where the label stands, for people who look at the file


def build_image(
    label: str,
    *,
    reset_address: int | None = RESET_ADDRESS,
    secret_area: tuple[int, int] | None = SECRET_AREA,
    hashes_area: tuple[int, int] | None = HASHES_AREA,
    size: int = IMAGE_SIZE,
) -> bytes:
    """The image that belongs to `label`.

    Args:
        label: a name and version, up to 256 bytes of UTF-8 or so.
        reset_address: SEV-ES reset block; None leaves the entry out.
        secret_area: base and size of the secret area; (0, 0) as the distributions' images have it; None: no entry.
        hashes_area: the same for the kernel hashes table.
        size: bytes of the image, a multiple of 4096.
    """
    name = label.encode("utf-8")
    image = bytearray(size)
    noise = shake_256(b"sevattest firmware image\0" + name).digest(min(size, 1 << 16))
    image[: len(noise)] = noise
    image[_NAME_AT : _NAME_AT + len(name) + 1] = name + b"\0"
    table = b""
    if reset_address is not None:
        table += _entry(struct.pack("<I", reset_address), _GUID_RESET)
    for area, guid in ((secret_area, _GUID_SECRET), (hashes_area, _GUID_HASHES)):
        if area is not None:
            table += _entry(struct.pack("<II", *area), guid)
    table += struct.pack("<H", len(table) + 18) + _GUID_TABLE.bytes_le
    end = size - _RESET_VECTOR_SIZE
    image[end - len(table) : end] = table
    image[end:] = b"\xf4" * _RESET_VECTOR_SIZE  # HLT: nobody runs it, but somebody may disassemble it
    return bytes(image)


def write_image(path: Path, label: str) -> None:
    """Write the image that belongs to `label`, with everything that an AmdSev build has."""
    path.write_bytes(build_image(label))


def _entry(data: bytes, guid: UUID) -> bytes:
    return data + struct.pack("<H", len(data) + 18) + guid.bytes_le
