"""The packet of one release and the receipt that goes with it, both built in memory before anything is decided.

Every byte of the secret table comes from the owner's side: no name, label or word of a caller ever enters it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

import msgspec

from common.sev.abi import KEY_SIZE
from common.sev.measurement import FirmwareVersion, MeasurementBlob
from common.sev.policy import GuestPolicy
from common.sev.secret import SecretEntry, SecretPacket, build_table, seal_packet
from common.sev.session import LaunchKeys
from verifier.documents.workload import SecretSpec

RECEIPT_TYPE = "sevattest.receipt/v1"
NOT_MEASURED = "plain SEV: the number of vCPUs and the CPU type are not measured"
LISTED = "the launch digest was listed by the owner: what it was computed from is not known here"


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
    """What was made for this launch alone, as GUID ‖ data for each, for the owner to find again; None for nothing."""
    made = [entry.guid.bytes + entry.data for spec, entry in zip(specs, entries, strict=True) if spec.file is None]
    return b"".join(made) or None


def write_receipt(
    *,
    launch_id: UUID,
    audit_id: UUID,
    time: datetime,
    caller: str,
    workload: dict[str, str],
    policy: GuestPolicy,
    shape: dict[str, Any],
    digest: bytes,
    firmware: FirmwareVersion,
    platform: dict[str, Any],
    guids: Sequence[UUID],
    notes: Sequence[str],
) -> str:
    """The receipt: what was released to what, as a JSON object (docs/receipt.md has its members)."""
    return msgspec.json.encode(
        {
            "type": RECEIPT_TYPE,
            "launch_id": launch_id,
            "audit_id": audit_id,
            "time": time,
            "caller": caller,
            "workload": workload,
            "policy": {"value": policy.value, "text": str(policy)},
            "shape": shape,
            "digest": digest.hex(),
            "firmware": str(firmware),
            "platform": platform,
            "secrets": list(guids),
            "notes": list(notes),
        }
    ).decode()
