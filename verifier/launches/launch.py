"""What goes into the broker and what comes out: values without wire format, store rows or keys."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from datetime import datetime
from uuid import UUID

from common.errors import Reason, known_reason
from common.sev.measurement import FirmwareVersion, MeasurementBlob
from verifier.launches.state import State
from verifier.store.rows import LaunchRow


@dataclass(frozen=True, kw_only=True)
class BeginRequest:
    """A caller asks for a launch.

    Attributes:
        caller: SPIFFE id.
        request_id: the caller's id of this request.
        chain: PDH, PEK, OCA, CEK as the platform exports them, 8336 bytes, not looked at yet.
        chip_id: the chip's id, 64 bytes, or empty.
        workload: the workload's name.
        grant: the grant to spend, where the caller names one.
    """

    caller: str
    request_id: UUID
    chain: bytes = field(repr=False)
    chip_id: bytes = field(repr=False)
    workload: str
    grant: str | None

    def content(self) -> bytes:
        """SHA-256 of what is asked."""
        grant = b"\0" if self.grant is None else b"\1" + self.grant.encode()
        return content_hash(self.chain, self.chip_id, self.workload.encode(), grant)


@dataclass(frozen=True, kw_only=True)
class ReleaseRequest:
    """A caller hands in a measurement.

    Attributes:
        caller: SPIFFE id.
        request_id: the caller's id of this request.
        launch_id: the launch.
        blob: the measurement blob.
        firmware: the version that the host names.
    """

    caller: str
    request_id: UUID
    launch_id: UUID
    blob: MeasurementBlob
    firmware: FirmwareVersion

    def content(self) -> bytes:
        """SHA-256 of what is asked."""
        return content_hash(self.launch_id.bytes, self.blob.to_bytes(), bytes(self.firmware))


@dataclass(frozen=True, kw_only=True)
class AbandonRequest:
    """A caller gives a launch up.

    Attributes:
        caller: SPIFFE id.
        request_id: the caller's id of this request.
        launch_id: the launch.
        reason: why, by the caller's word.
    """

    caller: str
    request_id: UUID
    launch_id: UUID
    reason: Reason | None

    def content(self) -> bytes:
        """SHA-256 of what is asked."""
        return content_hash(self.launch_id.bytes, (self.reason or "").encode())


@dataclass(frozen=True, kw_only=True)
class Launch:
    """A launch as its caller may see it."""

    launch_id: UUID
    workload: str
    workload_version: str
    state: State
    reason: Reason | None
    create_time: datetime
    expire_time: datetime
    end_time: datetime | None
    generation: str
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class Begun:
    """What the host needs to start the guest; nothing in it is secret.

    Attributes:
        launch: the launch.
        policy: the guest policy's word.
        godh: the owner's Diffie-Hellman certificate, 2084 bytes.
        session: the session blob, 128 bytes.
        pdh_fingerprint: of the PDH that the session is for, 32 bytes.
    """

    launch: Launch
    policy: int
    godh: bytes = field(repr=False)
    session: bytes = field(repr=False)
    pdh_fingerprint: bytes


@dataclass(frozen=True, kw_only=True)
class Released:
    """The packet that only the measured guest can open, and the words that go with it."""

    launch: Launch
    header: bytes = field(repr=False)
    payload: bytes = field(repr=False)
    receipt: str


def content_hash(*parts: bytes) -> bytes:
    """SHA-256 over parts of any length; no two lists of parts run together."""
    state = hashlib.sha256()
    for part in parts:
        state.update(len(part).to_bytes(8, "little"))
        state.update(part)
    return state.digest()


def view(row: LaunchRow, state: State | None = None, end_time: datetime | None = None) -> Launch:
    """What a row shows to its caller. A reason that only a newer replica knows is left out: the state says enough.

    Args:
        row: the launch as it is, or was, in the store.
        state: what it came to since then; None where the row says so.
        end_time: when, in the same case.
    """
    return Launch(
        launch_id=row.launch_id,
        workload=row.workload,
        workload_version=row.workload_version,
        state=state or State(row.state),
        reason=known_reason(row.reason),
        create_time=row.create_time,
        expire_time=row.expire_time,
        end_time=end_time or row.end_time,
        generation=row.generation,
        fingerprint=row.fingerprint,
    )
