"""Rows of the embedded store as values, and times as they are stored: microseconds since 1970 in UTC."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from uuid import UUID

from verifier.store.rows import LaunchRow, Packet, SealedKeys

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)

LAUNCH_COLUMNS = (
    "launch_id, caller, state, reason, workload, workload_version, terms_id, platform_id, generation, fingerprint, "
    "policy, godh, session, pdh_fingerprint, key_id, tek, tik, create_time, expire_time, end_time, measurement, "
    "digest, packet_header, packet_payload, receipt, audit_id"
)


def stamp(time: datetime) -> int:
    """A time as it is stored."""
    return (time - _EPOCH) // _MICROSECOND


def time_of(stored: int) -> datetime:
    """A stored time."""
    return _EPOCH + stored * _MICROSECOND


def launch_of(row: tuple[object, ...]) -> LaunchRow:
    """The launch in a row of `LAUNCH_COLUMNS`."""
    cells = dict(zip(LAUNCH_COLUMNS.split(", "), row, strict=True))
    header, payload, receipt = (cells.pop(name) for name in ("packet_header", "packet_payload", "receipt"))
    key_id, tek, tik = (cells.pop(name) for name in ("key_id", "tek", "tik"))
    end, audit_id = cells.pop("end_time"), cells.pop("audit_id")
    return LaunchRow(
        launch_id=UUID(str(cells.pop("launch_id"))),
        create_time=time_of(cells.pop("create_time")),  # type: ignore[arg-type]  # STRICT table: an integer
        expire_time=time_of(cells.pop("expire_time")),  # type: ignore[arg-type]  # the same
        end_time=None if end is None else time_of(end),  # type: ignore[arg-type]  # the same
        keys=None if tek is None else SealedKeys(key_id=key_id, tek=tek, tik=tik),  # type: ignore[arg-type]  # blobs
        packet=None if header is None else Packet(header=header, payload=payload, receipt=receipt),  # type: ignore[arg-type]  # blobs and text
        audit_id=None if audit_id is None else UUID(str(audit_id)),
        **cells,  # type: ignore[arg-type]  # the rest is stored as it is
    )
