"""Protobuf to domain values and back: the only validation of what comes in over gRPC.

A servicer passes every field of a request through a function of this module before it looks at it. Each function
returns a value that needs no further check of form, or raises `InvalidInput(INVALID_ARGUMENT)` that names the field.
Protobuf has already bounded types: a string is UTF-8, a uint32 is 0 to 2^32-1.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING
from uuid import UUID

from google.protobuf.timestamp_pb2 import Timestamp

from common.errors import InvalidInput, Reason
from common.ids import canonical_uuid
from common.sev.measurement import FirmwareVersion
from sevattest.v1 import platform_pb2, reason_pb2

if TYPE_CHECKING:
    from google.protobuf.message import Message

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}\Z")
_PREFIX = "REASON_"
_BYTE_MAX = 0xFF
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_DAY_S = 86_400

PAGE_DEFAULT = 100
PAGE_MAX = 500


def _invalid(field: str, message: str) -> InvalidInput:
    return InvalidInput(Reason.INVALID_ARGUMENT, f"{field}: {message}", field=field)


def _uuid(field: str, text: str) -> UUID:
    value = canonical_uuid(text)
    if value is None:
        raise _invalid(field, "must be a UUID in canonical form (36 characters, lower case)")
    return value


def request_id(text: str) -> UUID:
    """The request's id.

    Raises:
        InvalidInput: it is not a canonical UUID.
    """
    return _uuid("request_id", text)


def launch_id(text: str) -> UUID:
    """The launch's id, safe to be part of a file name.

    Raises:
        InvalidInput: it is not a canonical UUID.
    """
    return _uuid("launch_id", text)


def exactly(field: str, data: bytes, size: int) -> bytes:
    """The bytes of `field`, of which there must be `size`.

    Raises:
        InvalidInput: there are fewer or more.
    """
    if len(data) != size:
        raise _invalid(field, f"must be {size} bytes, not {len(data)}")
    return data


def at_most(field: str, data: bytes, size: int) -> bytes:
    """The bytes of `field`, of which there must be 1 to `size`.

    Raises:
        InvalidInput: there are none, or more.
    """
    if not 1 <= len(data) <= size:
        raise _invalid(field, f"must be 1 to {size} bytes, not {len(data)}")
    return data


def name(field: str, text: str) -> str:
    """A name: 1 to 128 of `A-Z a-z 0-9 . _ -`, not starting with a dot or a hyphen.

    Raises:
        InvalidInput: it is not.
    """
    if not _NAME.match(text):
        raise _invalid(field, "must be 1 to 128 of A-Z a-z 0-9 . _ -, not starting with . or -")
    return text


def firmware_version(request: Message, field: str = "firmware") -> FirmwareVersion:
    """The firmware's version in the request's message field `field`, each of its numbers 0 to 255.

    Raises:
        InvalidInput: the field is absent, or a number is larger: cut to a byte it would be another version.
    """
    if not request.HasField(field):
        raise _invalid(field, "is missing")
    message: platform_pb2.FirmwareVersion = getattr(request, field)
    for member in ("api_major", "api_minor", "build"):
        if getattr(message, member) > _BYTE_MAX:
            raise _invalid(f"{field}.{member}", "must be 0 to 255")
    return FirmwareVersion(message.api_major, message.api_minor, message.build)


def firmware_version_to_proto(version: FirmwareVersion) -> platform_pb2.FirmwareVersion:
    """The message for a firmware version."""
    return platform_pb2.FirmwareVersion(api_major=version.api_major, api_minor=version.api_minor, build=version.build)


def page_size(value: int) -> int:
    """How many entries a page may hold: 1 to 500, 100 where the caller left it open.

    Raises:
        InvalidInput: it is more.
    """
    if value > PAGE_MAX:
        raise _invalid("page_size", f"must be at most {PAGE_MAX}")
    return value or PAGE_DEFAULT


def timestamp(time: datetime) -> Timestamp:
    """The message for a time, which must know its zone."""
    if time.tzinfo is None:
        raise ValueError("a time without a zone")
    since = time - _EPOCH
    return Timestamp(seconds=since.days * _DAY_S + since.seconds, nanos=since.microseconds * 1000)


def reason_to_proto(reason: Reason | None) -> reason_pb2.Reason.ValueType:
    """The enum value for a reason; `REASON_UNSPECIFIED` for none."""
    if reason is None:
        return reason_pb2.REASON_UNSPECIFIED
    return reason_pb2.Reason.Value(_PREFIX + reason.value)


def reason_from_proto(value: int) -> Reason | None:
    """The reason for an enum value; None for `REASON_UNSPECIFIED` and for one that this version does not know."""
    try:
        return Reason(reason_pb2.Reason.Name(value).removeprefix(_PREFIX))  # type: ignore[arg-type]  # open enum
    except ValueError:
        return None
