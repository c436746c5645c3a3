"""Errors across the wire, both ways: class to status, and a peer's status to the class that it raised.

The one table is `STATUS`. Every error of ours travels with `google.rpc.ErrorInfo` (domain `sevattest`, the reason, and
the error's fields); docs/errors.md lists the reasons. What a peer sends back is text from outside: cleaned, capped,
and never a `hint`, which a person would follow.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import ErrorInfo  # type: ignore[import-untyped]  # ships no types
from google.rpc.status_pb2 import Status  # type: ignore[import-untyped]  # ships no types
from grpc_status import rpc_status

from common.errors import (
    InvalidInput,
    LimitExceeded,
    NotFound,
    OutcomeUnknown,
    PlatformFailed,
    Reason,
    Refused,
    SevattestError,
    Unauthenticated,
    Unavailable,
    WrongState,
    rebuild,
)

DOMAIN = "sevattest"
_DETAILS_KEY = "grpc-status-details-bin"

STATUS: Mapping[type[SevattestError], grpc.StatusCode] = MappingProxyType(
    {
        InvalidInput: grpc.StatusCode.INVALID_ARGUMENT,
        Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
        NotFound: grpc.StatusCode.NOT_FOUND,
        Refused: grpc.StatusCode.PERMISSION_DENIED,
        WrongState: grpc.StatusCode.FAILED_PRECONDITION,
        LimitExceeded: grpc.StatusCode.RESOURCE_EXHAUSTED,
        Unavailable: grpc.StatusCode.UNAVAILABLE,
        PlatformFailed: grpc.StatusCode.INTERNAL,
        OutcomeUnknown: grpc.StatusCode.ABORTED,
    }
)

# Trailing metadata has a soft limit of 8 KiB, of which the message takes up to three bytes for one (percent-encoding)
# and once more in base64; these caps keep the worst case below it.
_MAX_MESSAGE_BYTES = 600
_MAX_FIELD_BYTES = 256
_MAX_FIELDS_BYTES = 1536
_FIELD = re.compile(r"[a-z][a-z0-9_]{0,63}")
# `hint` is for the person at this end only; the others are parameters of the error's own constructor.
_NOT_FIELDS = frozenset({"hint", "reason", "message", "self"})


def code_of(error: SevattestError) -> grpc.StatusCode:
    """The status that `error` travels with."""
    return next(code for leaf, code in STATUS.items() if isinstance(error, leaf))


def to_status(error: SevattestError) -> grpc.Status:
    """`error` as a status with its ErrorInfo, ready for `context.abort_with_status`."""
    info = ErrorInfo(reason=error.reason.value, domain=DOMAIN, metadata=_fields(error.fields.items()))
    return plain_status(code_of(error), error.message, info)


def plain_status(code: grpc.StatusCode, message: str, info: ErrorInfo | None = None) -> grpc.Status:
    """A status with `message` and, where there is one, an ErrorInfo."""
    number: int = code.value[0]
    status = Status(code=number, message=_clean(message, _MAX_MESSAGE_BYTES))
    if info is not None:
        packed = AnyMessage()
        packed.Pack(info)
        status.details.append(packed)
    return rpc_status.to_status(status)


def from_rpc_error(error: grpc.aio.AioRpcError, *, mutating: bool) -> SevattestError:
    """What a failed call means to its caller.

    Args:
        error: what grpc raised.
        mutating: whether the call may have changed something; then a broken link is `OutcomeUnknown`.
    """
    details = error.details() or ""
    info = _error_info(error)
    if info is not None and info.domain == DOMAIN:
        message = _clean(details, _MAX_MESSAGE_BYTES)
        known = rebuild(info.reason, message, _fields(info.metadata.items()))
        if known is not None and code_of(known) is error.code():
            return known
        if known is None:
            # A newer peer's reason: its status still says whose fault it is, and that it did answer.
            return _by_code(error.code(), message, mutating=False)
    return _from_transport(error.code(), details, mutating=mutating)


def _error_info(error: grpc.aio.AioRpcError) -> ErrorInfo | None:
    for key, value in error.trailing_metadata() or ():
        if key != _DETAILS_KEY or not isinstance(value, bytes):
            continue
        try:
            for packed in Status.FromString(value).details:
                info = ErrorInfo()
                if packed.Unpack(info):
                    return info
        except DecodeError:
            return None
    return None


# No servicer saw the call if the channel never became ready, which the core says in these words (subchannel picker),
# or if the stream was refused (REFUSED_STREAM, 7: RFC 9113 8.7 guarantees that nothing was processed).
_NEVER_SENT = (
    "failed to connect to all addresses",
    "DNS resolution failed",
    "name resolution failure",
    "Received RST_STREAM with error code 7",
)
# What a failed handshake looks like from the client's side, and what to look at. The order matters.
_TLS_HINTS = (
    (
        "CERTIFICATE_VERIFY_FAILED",
        "its certificate was not issued by the CA given for it, or has expired",
        "check that --agent-ca and --verifier-ca name the right CA, and the clocks of both machines",
    ),
    (
        "Hostname Verification Check failed",
        "its certificate is for another name or address",
        "call it by a name or address in its certificate, or issue one with --dns or --ip",
    ),
    (
        "Socket closed",
        "it closed the connection during the TLS handshake: it does not accept this client's certificate",
        "the client's certificate must come from the CA that the service trusts, be in date and be for a client",
    ),
)


def _from_transport(code: grpc.StatusCode, details: str, *, mutating: bool) -> SevattestError:
    if code is grpc.StatusCode.UNAVAILABLE and any(text in details for text in _NEVER_SENT):
        for text, what, hint in _TLS_HINTS:
            if text in details:
                return Unavailable(Reason.UNREACHABLE, f"the service cannot be talked to: {what}", hint=hint)
        return Unavailable(Reason.UNREACHABLE, f"the service cannot be reached: {_last_error(details)}")
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in details:
        if details.startswith(("CLIENT: Sent", "SERVER: Received")):
            return InvalidInput(Reason.INVALID_ARGUMENT, "the request is larger than a service accepts")
        # An answer came and was too large to take: the step itself has been done.
        return _by_code(grpc.StatusCode.UNKNOWN, "the answer is larger than this client accepts", mutating=mutating)
    return _by_code(code, _clean(details, _MAX_MESSAGE_BYTES), mutating=mutating)


def _last_error(details: str) -> str:
    """The cause at the end of the core's sentence, without the list of addresses before it."""
    return _clean(details.rsplit("last error: ", 1)[-1].removeprefix("UNKNOWN: "), 200)


_DEFINITE: Mapping[grpc.StatusCode, tuple[type[SevattestError], Reason]] = MappingProxyType(
    {
        grpc.StatusCode.INVALID_ARGUMENT: (InvalidInput, Reason.INVALID_ARGUMENT),
        grpc.StatusCode.OUT_OF_RANGE: (InvalidInput, Reason.INVALID_ARGUMENT),
        grpc.StatusCode.UNAUTHENTICATED: (Unauthenticated, Reason.UNAUTHENTICATED),
        grpc.StatusCode.PERMISSION_DENIED: (Refused, Reason.ROLE_NOT_ALLOWED),
        grpc.StatusCode.NOT_FOUND: (NotFound, Reason.NOT_FOUND),
        grpc.StatusCode.FAILED_PRECONDITION: (WrongState, Reason.WRONG_STATE),
        grpc.StatusCode.ALREADY_EXISTS: (WrongState, Reason.WRONG_STATE),
        grpc.StatusCode.RESOURCE_EXHAUSTED: (LimitExceeded, Reason.TOO_MANY_REQUESTS),
        grpc.StatusCode.UNIMPLEMENTED: (PlatformFailed, Reason.INTERNAL),
    }
)


def _by_code(code: grpc.StatusCode, message: str, *, mutating: bool) -> SevattestError:
    if code in _DEFINITE:
        leaf, reason = _DEFINITE[code]
        return leaf(reason, message or f"the service answered {code.name}")
    if mutating:
        return OutcomeUnknown(
            Reason.OUTCOME_UNKNOWN, f"no answer came back ({code.name}): ask for the launch's state before repeating"
        )
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return Unavailable(Reason.UNREACHABLE, "no answer came in time")
    if code in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}:
        return Unavailable(Reason.UNREACHABLE, f"the connection broke: {message or code.name}")
    if code is grpc.StatusCode.ABORTED:
        return OutcomeUnknown(Reason.OUTCOME_UNKNOWN, message or "the service does not know the outcome")
    return PlatformFailed(Reason.INTERNAL, message or f"the service answered {code.name}")


def _fields(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    taken: dict[str, str] = {}
    room = _MAX_FIELDS_BYTES
    for name, value in sorted(pairs):
        if not _FIELD.fullmatch(name) or name in _NOT_FIELDS:
            continue
        text = _clean(value, _MAX_FIELD_BYTES)
        room -= len(name) + len(text.encode())
        if room < 0:
            break
        taken[name] = text
    return taken


def _clean(text: str, limit: int) -> str:
    """`text` on one line, printable, at most `limit` bytes of UTF-8: a terminal or a log will show it."""
    printable = "".join(c if c.isprintable() else " " for c in text).strip()
    return printable.encode("utf-8", "replace")[:limit].decode("utf-8", "ignore")
