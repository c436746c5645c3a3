"""Firmware images for tests: any bytes, with a footer table as edk2 writes it. Written without `common.sev.digest`."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from uuid import UUID

RESET = 0x80B004
SECRET_AREA = (0x810000, 0xC00)
HASHES_AREA = (0x810C00, 0x400)


def entry(guid: str, data: bytes) -> bytes:
    """One entry of a footer table."""
    return data + (len(data) + 18).to_bytes(2, "little") + UUID(guid).bytes_le


def reset_entry(address: int) -> bytes:
    """The entry with the address at which application processors start."""
    return entry("00f771de-1a7e-4fcb-890e-68c77e2fb44e", address.to_bytes(4, "little"))


def secret_entry(base: int, size: int) -> bytes:
    """The entry with the area for secrets."""
    return entry("4c2eb361-7d9b-4cc3-8081-127c90d3d294", base.to_bytes(4, "little") + size.to_bytes(4, "little"))


def hashes_entry(base: int, size: int) -> bytes:
    """The entry with the area for kernel hashes."""
    return entry("7255371f-3a3b-4b04-927b-1da6efa8d454", base.to_bytes(4, "little") + size.to_bytes(4, "little"))


AMDSEV_ENTRIES = (reset_entry(RESET), secret_entry(*SECRET_AREA), hashes_entry(*HASHES_AREA))


def with_footer(code: bytes, entries: Sequence[bytes]) -> bytes:
    """An image: `code`, a footer table of `entries`, a reset vector; padded in front to a multiple of 16 bytes."""
    table = b"".join(entries)
    length = (len(table) + 18).to_bytes(2, "little")
    footer = table + length + UUID("96b582de-1fb2-45f7-baea-a366c55a082d").bytes_le
    reset_vector = b"\x90" * 32
    padding = bytes(-(len(code) + len(footer) + len(reset_vector)) % 16)
    return padding + code + footer + reset_vector


def amdsev_image(label: str = "one", size: int = 4096) -> bytes:
    """An image with all that an AmdSev build has, of content that follows from `label`."""
    return with_footer(Random(label).randbytes(size - 200), AMDSEV_ENTRIES)  # noqa: S311 -- not a secret
