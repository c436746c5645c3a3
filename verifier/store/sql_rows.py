"""Rows of the database as values, and times as they are stored: microseconds since 1970 in UTC."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from common.errors import Unavailable
from verifier.store.engine import unavailable
from verifier.store.rows import (
    AdminRequest,
    AuditRow,
    ChainedRecord,
    DocumentRow,
    LaunchRow,
    Packet,
    RequestKey,
    SealedKeys,
    StoredSecret,
)

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)

_LAUNCH_NAMES = (
    *("launch_id", "caller", "state", "reason", "workload", "workload_version", "terms_id", "platform_id"),
    *("generation", "fingerprint", "policy", "godh", "session", "pdh_fingerprint", "tek", "tik", "create_time"),
    *("expire_time", "end_time", "measurement", "digest", "packet_header", "packet_payload", "receipt", "audit_id"),
    *("grant_name", "chip_id", "oca", "firmware"),
)
LAUNCH_COLUMNS = ", ".join(_LAUNCH_NAMES)
COLUMNS_OF_LAUNCH = ", ".join(f"launch.{name}" for name in _LAUNCH_NAMES)  # where other tables are joined
AUDIT_COLUMNS = "audit_id, time, event, launch_id, caller, reason, body"
DOCUMENT_COLUMNS = "kind, name, version, text, is_json, apply_time"
SECRET_COLUMNS = "name, version, sealed, size, create_time"  # noqa: S105 -- names of columns

# Where a sealed blob names its key (verifier.keys): after a version of one byte.
KEY_ID_IN_BLOB = slice(1, 9)


def stamp(time: datetime) -> int:
    """A time as it is stored."""
    return (time - _EPOCH) // _MICROSECOND


def time_of(stored: int) -> datetime:
    """A stored time.

    Raises:
        Unavailable: no calendar has it: it is not one that was written here (STORE_UNAVAILABLE).
    """
    try:
        return _EPOCH + stored * _MICROSECOND
    except OverflowError:
        raise _strange("a time") from None


def id_of(stored: str) -> UUID:
    """A stored id.

    Raises:
        Unavailable: it is none that was written here (STORE_UNAVAILABLE).
    """
    try:
        return UUID(stored)
    except ValueError:
        raise _strange("an id") from None


def _strange(what: str) -> Unavailable:
    return unavailable(f"the store holds {what} that is none: somebody else wrote to it")


def launch_of(row: tuple[Any, ...]) -> LaunchRow:
    """The launch in a row of `LAUNCH_COLUMNS`."""
    cells = dict(zip(_LAUNCH_NAMES, row, strict=True))
    header, payload, receipt = (cells.pop(name) for name in ("packet_header", "packet_payload", "receipt"))
    tek, tik = cells.pop("tek"), cells.pop("tik")
    end, audit_id, firmware = (cells.pop(name) for name in ("end_time", "audit_id", "firmware"))
    return LaunchRow(
        launch_id=id_of(cells.pop("launch_id")),
        create_time=time_of(cells.pop("create_time")),
        expire_time=time_of(cells.pop("expire_time")),
        end_time=None if end is None else time_of(end),
        keys=None if tek is None else SealedKeys(key_id=tek[KEY_ID_IN_BLOB], tek=tek, tik=tik),
        packet=None if header is None else Packet(header=header, payload=payload, receipt=receipt),
        audit_id=None if audit_id is None else id_of(audit_id),
        grant=cells.pop("grant_name"),
        firmware=None if firmware is None else _version(firmware),
        **cells,
    )


def firmware_text(firmware: tuple[int, int, int] | None) -> str | None:
    """A firmware's version as it is stored."""
    return None if firmware is None else ".".join(str(part) for part in firmware)


def _version(stored: str) -> tuple[int, int, int]:
    try:
        major, minor, build = (int(part) for part in stored.split("."))
    except ValueError:
        raise _strange("a version") from None
    return major, minor, build


def key_cells(key: RequestKey) -> tuple[str, str, str]:
    """Cells of a request's key: caller, method, request_id."""
    return key.caller, key.method, str(key.request_id)


def audit_of(row: tuple[Any, ...]) -> AuditRow:
    """The record in a row of `AUDIT_COLUMNS`."""
    audit_id, time, event, launch_id, caller, reason, body = row
    return AuditRow(
        audit_id=id_of(audit_id),
        time=time_of(time),
        event=event,
        launch_id=None if launch_id is None else id_of(launch_id),
        caller=caller,
        reason=reason,
        body=body,
    )


def chained_of(row: tuple[Any, ...]) -> ChainedRecord:
    """The record in a row of number, hash and `AUDIT_COLUMNS`."""
    return ChainedRecord(number=row[0], hash=row[1], record=audit_of(row[2:]))


def document_of(row: tuple[Any, ...]) -> DocumentRow:
    """The document in a row of `DOCUMENT_COLUMNS`."""
    kind, name, version, text, is_json, apply_time = row
    return DocumentRow(
        kind=kind, name=name, version=version, text=text, is_json=bool(is_json), apply_time=time_of(apply_time)
    )


def secret_of(row: tuple[Any, ...]) -> StoredSecret:
    """The secret in a row of `SECRET_COLUMNS`."""
    name, version, sealed, size, create_time = row
    return StoredSecret(name=name, version=version, sealed=sealed, size=size, create_time=time_of(create_time))


def admin_request_of(key: RequestKey, row: tuple[Any, ...]) -> AdminRequest:
    """The request in a row of content and answer."""
    return AdminRequest(key=key, content=row[0], answer=row[1])
