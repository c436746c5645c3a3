"""The secret table that a guest reads, and the packet in which only the measured guest's firmware accepts it.

Sources: AMD document 55766, LAUNCH_SECRET (packet); Linux `drivers/virt/coco/efi_secret` and edk2's launch-secret area
(table); formats.md sections 9 and 10.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from uuid import UUID

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from common.errors import InvalidInput, Reason, WrongState
from common.mac import hmac_sha256
from common.sev.abi import KEY_SIZE, MAC_SECRET, MEASUREMENT_SIZE, PACKET_HEADER_SIZE, PACKET_MAX_SIZE
from common.sev.errors import ParseError
from common.sev.session import LaunchKeys

TABLE_GUID = UUID("1e74f542-71dd-4d66-963e-ef4287ff173b")

ENTRIES_MAX = 64  # EFI_SECRET_NUM_FILES: Linux looks no further
_ZERO_GUID = UUID(int=0)  # Linux takes such an entry for a deleted one
_HEADER = struct.Struct("<16sI")  # GUID, length including these 20 bytes
_BLOCK = 16


@dataclass(frozen=True, kw_only=True)
class SecretEntry:
    """One secret for the guest.

    Attributes:
        guid: its name; the guest finds it as a file of that name.
        data: the secret itself. It never shows in a repr.
    """

    guid: UUID
    data: bytes = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class SecretPacket:
    """The secret table, encrypted and bound to one measurement; nothing in it can be read by the host.

    Attributes:
        header: flags, IV and MAC, 52 bytes.
        payload: the encrypted table.
    """

    header: bytes
    payload: bytes


def build_table(entries: Sequence[SecretEntry]) -> bytes:
    """The table as the guest reads it, padded with 0 to 15 zero bytes to a multiple of 16.

    Its length field leaves the padding out (A18), and data goes in as it is, without a NUL at the end (A20).

    Raises:
        InvalidInput: there is no entry, there are more than 64, a GUID is zero or comes twice.
    """
    if not entries:
        raise _invalid("a secret table needs at least one secret")
    if len(entries) > ENTRIES_MAX:
        raise _invalid(f"a secret table holds at most {ENTRIES_MAX} secrets, not {len(entries)}")
    seen: set[UUID] = set()
    for entry in entries:
        if entry.guid == _ZERO_GUID:
            raise _invalid("the zero GUID marks a deleted secret and cannot name one")
        if entry.guid in seen:
            raise _invalid(f"secret {entry.guid} is listed twice", guid=str(entry.guid))
        seen.add(entry.guid)
    body = b"".join(_HEADER.pack(e.guid.bytes_le, _HEADER.size + len(e.data)) + e.data for e in entries)
    table = _HEADER.pack(TABLE_GUID.bytes_le, _HEADER.size + len(body)) + body
    return table + bytes(-len(table) % _BLOCK)


def parse_table(data: bytes) -> tuple[SecretEntry, ...]:
    """The secrets in a table, by the rules of Linux's `efi_secret`: all of them, or none where one is corrupted.

    What follows the table's own length is ignored, as is a rest that is too short for an entry, so the length may
    include the padding or not. Entries with a zero GUID are deleted ones and are skipped.

    Raises:
        ParseError: Linux would show no secret.
    """
    if len(data) < _HEADER.size:
        raise ParseError(f"a secret table has at least {_HEADER.size} bytes, not {len(data)}")
    guid, length = _HEADER.unpack_from(data)
    if guid != TABLE_GUID.bytes_le:
        raise ParseError("a secret table starts with another GUID")
    if not _HEADER.size <= length <= len(data):
        raise ParseError(f"a secret table of {len(data)} bytes cannot be {length} bytes long")
    entries: dict[UUID, SecretEntry] = {}
    offset = _HEADER.size
    while length - offset >= _HEADER.size and len(entries) < ENTRIES_MAX:
        guid, size = _HEADER.unpack_from(data, offset)
        if not _HEADER.size <= size <= length - offset:
            raise ParseError(f"the secret table's entry at {offset} is corrupted")
        name = UUID(bytes_le=guid)
        if name in entries:
            raise ParseError(f"the secret table names {name} twice")
        if name != _ZERO_GUID:
            entries[name] = SecretEntry(guid=name, data=bytes(data[offset + _HEADER.size : offset + size]))
        offset += size
    return tuple(entries.values())


def seal_packet(*, keys: LaunchKeys, table: bytes, measurement: bytes, iv: bytes, area_size: int) -> SecretPacket:
    """Encrypt a table for the one guest that was measured so.

    The caller MUST have matched the measurement, and MUST pass an IV that was never used with this TEK.

    Args:
        keys: the launch's transport keys.
        table: what `build_table` gave.
        measurement: the HMAC that matched, 32 bytes, without its nonce.
        iv: 16 random bytes, the first counter block.
        area_size: bytes that the guest's firmware reserves for secrets; 0 where it reserves none.

    Raises:
        WrongState: the guest has no area for secrets (NO_SECRET_AREA), or the table is larger than it or than the
            16 KiB that the kernel passes on (SECRET_TOO_LARGE).
        InvalidInput: a size is wrong.
    """
    if len(measurement) != MEASUREMENT_SIZE:
        raise _invalid(f"a measurement has {MEASUREMENT_SIZE} bytes, not {len(measurement)}")
    if len(iv) != KEY_SIZE:
        raise _invalid(f"a packet's IV has {KEY_SIZE} bytes, not {len(iv)}")
    if not table or len(table) % _BLOCK:
        raise _invalid(f"a packet's payload is a multiple of {_BLOCK} bytes, not {len(table)}")
    if area_size <= 0:
        raise WrongState(Reason.NO_SECRET_AREA, "the guest's firmware reserves no area for secrets")
    limit = min(area_size, PACKET_MAX_SIZE)
    if len(table) > limit:
        raise WrongState(
            Reason.SECRET_TOO_LARGE, f"the secrets take {len(table)} bytes, the guest has room for {limit}"
        )
    encryptor = Cipher(algorithms.AES(keys.tek), modes.CTR(iv)).encryptor()
    payload = encryptor.update(table) + encryptor.finalize()
    flags = bytes(4)  # not compressed
    size = len(payload).to_bytes(4, "little")  # guest length and transport length are the same
    covered = bytes((MAC_SECRET,)) + flags + iv + size + size + payload + measurement
    header = flags + iv + hmac_sha256(keys.tik, covered)
    assert len(header) == PACKET_HEADER_SIZE  # noqa: S101 -- sizes above add up
    return SecretPacket(header=header, payload=payload)


def _invalid(message: str, **fields: str) -> InvalidInput:
    return InvalidInput(Reason.INVALID_ARGUMENT, message, **fields)
