"""The packet of one release, built in memory before anything is decided, and what of it the owner finds again.

Every byte of the secret table comes from the owner's side: no name, label or word of a caller ever enters it.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence
from uuid import UUID

from common.errors import Reason, Unavailable
from common.sev.abi import KEY_SIZE
from common.sev.measurement import MeasurementBlob
from common.sev.secret import SecretEntry, SecretPacket, build_table, seal_packet
from common.sev.session import LaunchKeys
from verifier.documents.sources import GENERATED_SIZE, GeneratedSource
from verifier.documents.workload import ATTESTED_GUID, SecretSpec

NOT_MEASURED = "plain SEV: the number of vCPUs and the CPU type are not measured"
LISTED = "the launch digest was listed by the owner: what it was computed from is not known here"

_KEPT_VERSION = 1
_KEPT = struct.Struct(">16sI")  # GUID, bytes of the secret


def build_packet(
    *,
    keys: LaunchKeys,
    entries: Sequence[SecretEntry],
    blob: MeasurementBlob,
    area_size: int,
    random: Callable[[int], bytes] = os.urandom,
) -> SecretPacket:
    """The packet for one measurement that was accepted; its IV is new with each call.

    The caller MUST let at most one packet of one pair of keys leave.

    Raises:
        WrongState: the guest has no area for secrets (NO_SECRET_AREA), or they do not fit (SECRET_TOO_LARGE).
    """
    return seal_packet(
        keys=keys,
        table=build_table(entries),
        measurement=blob.measurement,
        iv=random(KEY_SIZE),
        area_size=area_size,
    )


def generated_secrets(specs: Sequence[SecretSpec], entries: Sequence[SecretEntry]) -> bytes | None:
    """What was made for this launch alone, for the owner to find again; None for nothing.

    Form: version u8 = 1, then for each secret GUID 16 ‖ length u32 big-endian ‖ data, without the NUL that its table
    entry may have.
    """
    made = [
        SecretEntry(guid=spec.guid, data=spec.data(entry))
        for spec, entry in zip(specs, entries, strict=True)
        if isinstance(spec.source, GeneratedSource)
    ]
    return _kept(made) if made else None


def read_generated(kept: bytes) -> tuple[SecretEntry, ...]:
    """The secrets in what `generated_secrets` made, in their order.

    Raises:
        Unavailable: STORE_UNAVAILABLE; it is in no form that this version knows.
    """
    if kept.startswith(ATTESTED_GUID.bytes) and len(kept) == 16 + GENERATED_SIZE:  # the form before version 1
        return (SecretEntry(guid=ATTESTED_GUID, data=kept[16:]),)
    entries, rest = [], kept[1:]
    while len(rest) >= _KEPT.size:
        guid, length = _KEPT.unpack_from(rest)
        entries.append(SecretEntry(guid=UUID(bytes=guid), data=rest[_KEPT.size : _KEPT.size + length]))
        rest = rest[_KEPT.size + length :]
    if not entries or _kept(entries) != kept:
        raise Unavailable(Reason.STORE_UNAVAILABLE, "generated secrets are not in a form that this version knows")
    return tuple(entries)


def _kept(entries: Sequence[SecretEntry]) -> bytes:
    return bytes((_KEPT_VERSION,)) + b"".join(_KEPT.pack(e.guid.bytes, len(e.data)) + e.data for e in entries)
