"""Errors across the wire, both ways: class to status, and a peer's status to the class that it raised.

The one table is `STATUS`. Every error of ours travels with `google.rpc.ErrorInfo` (domain `sevattest`, the reason, and
the error's fields); docs/errors.md lists the reasons. One that names several problems has a `google.rpc.BadRequest`
too. What a peer sends back is text from outside: cleaned, capped, and never a `hint`, which a person would follow.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from types import MappingProxyType
from typing import Any, TypeVar

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError, Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo  # type: ignore[import-untyped]  # ships no types
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

_Detail = TypeVar("_Detail", bound=Message)

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
# With problems the message is their summary, and they share this room with the fields.
_MAX_SUMMARY_BYTES = 300
_MAX_DETAILS_BYTES = 4608
_MAX_PROBLEM_BYTES = 512
_PROBLEM_FRAME_BYTES = 10
_MAX_PROBLEMS = 500
_PATH = re.compile(r"[A-Za-z][A-Za-z0-9_.\[\]-]*")
_FIELD = re.compile(r"[a-z][a-z0-9_]{0,63}")
# `hint` is for the person at this end only; the others are parameters of the error's own constructor.
_NOT_FIELDS = frozenset({"hint", "reason", "message", "self"})


def code_of(error: SevattestError) -> grpc.StatusCode:
    """The status that `error` travels with."""
    return next(code for leaf, code in STATUS.items() if isinstance(error, leaf))


def to_status(error: SevattestError) -> grpc.Status:
    """`error` as a status with its ErrorInfo, ready for `context.abort_with_status`."""
    fields = _fields(error.fields.items())
    info = ErrorInfo(reason=error.reason.value, domain=DOMAIN, metadata=fields)
    if len(error.problems) < 2:
        return plain_status(code_of(error), error.message, info)
    room = _MAX_DETAILS_BYTES - sum(len(name) + len(value.encode()) for name, value in fields.items())
    summary = _clean(error.problems[0], _MAX_SUMMARY_BYTES - 40) + f" (and {len(error.problems) - 1} more)"
    return plain_status(code_of(error), summary, info, _bad_request(error.problems, room))


def plain_status(code: grpc.StatusCode, message: str, *details: Any) -> grpc.Status:
    """A status with `message` and, where there are some, details of `google.rpc`."""
    number: int = code.value[0]
    status = Status(code=number, message=_clean(message, _MAX_MESSAGE_BYTES))
    for each in details:
        packed = AnyMessage()
        packed.Pack(each)
        status.details.append(packed)
    return rpc_status.to_status(status)


def _bad_request(problems: Sequence[str], room: int) -> BadRequest:
    """The problems, each with its path where it begins with one; as many as there is room for, in bytes."""
    request = BadRequest()
    for index, problem in enumerate(problems):
        text = _clean(problem, _MAX_PROBLEM_BYTES)
        room -= len(text.encode()) + _PROBLEM_FRAME_BYTES
        if room < 0:
            request.field_violations.add(description=f"and {len(problems) - index} more problems")
            break
        path, colon, what = text.partition(": ")
        if colon and _PATH.fullmatch(path):
            request.field_violations.add(field=path, description=what)
        else:
            request.field_violations.add(description=text)
    return request


def from_rpc_error(error: grpc.aio.AioRpcError, *, mutating: bool) -> SevattestError:
    """What a failed call means to its caller.

    Args:
        error: what grpc raised.
        mutating: whether the call may have changed something; then a broken link is `OutcomeUnknown`.
    """
    details = error.details() or ""
    packed = list(_details(error))
    info = next(_unpacked(packed, ErrorInfo), None)
    if info is not None and info.domain == DOMAIN:
        message = _clean(details, _MAX_MESSAGE_BYTES)
        known = rebuild(info.reason, message, _fields(info.metadata.items()))
        if known is not None and code_of(known) is error.code():
            known.problems = tuple(_problems(packed))
            return known
        if known is None:
            # A newer peer's reason: its status still says whose fault it is, and that it did answer.
            return _by_code(error.code(), message, mutating=False)
    return _from_transport(error.code(), details, mutating=mutating)


def unreadable(*, mutating: bool) -> SevattestError:
    """What an answer means that is no message: it did come, so the step itself has been done."""
    return _by_code(grpc.StatusCode.UNKNOWN, "the service's answer is no message of this version", mutating=mutating)


def _details(error: grpc.aio.AioRpcError) -> Iterator[AnyMessage]:
    for key, value in error.trailing_metadata() or ():
        if key == _DETAILS_KEY and isinstance(value, bytes):
            with suppress(DecodeError):
                yield from Status.FromString(value).details


def _unpacked(packed: Iterable[AnyMessage], kind: type[_Detail]) -> Iterator[_Detail]:
    for each in packed:
        message = kind()
        with suppress(DecodeError):
            if each.Unpack(message):
                yield message


def _problems(packed: Iterable[AnyMessage]) -> Iterator[str]:
    for request in _unpacked(packed, BadRequest):
        for each in request.field_violations[:_MAX_PROBLEMS]:
            text = f"{each.field}: {each.description}" if each.field else each.description
            yield _clean(text, _MAX_PROBLEM_BYTES)


# No servicer saw the call if the channel never became ready, which the core says in these words (subchannel picker),
# or if the stream was refused (REFUSED_STREAM, 7: RFC 9113 8.7 guarantees that nothing was processed).
_NEVER_SENT = (
    "failed to connect to all addresses",
    "DNS resolution failed",
    "name resolution failure",
    "errors resolving ",
    "Received RST_STREAM with error code 7",
)
# What a failed handshake looks like from the client's side, and what to look at. The order matters.
_TLS_HINTS = (
    (
        "CERTIFICATE_VERIFY_FAILED",
        "its certificate was not issued by the CA given for it, or has expired",
        "check that --agent-ca, --verifier-ca or --admin-ca names the right CA, and the clocks of both machines",
    ),
    (
        "Hostname Verification Check failed",
        "its certificate is for another name or address",
        "call it by a name or address in its certificate, or issue one with --dns or --ip",
    ),
    (
        "Socket closed",
        "it closed the connection during the TLS handshake: it does not accept this client's certificate",
        (
            "the client's certificate must come from the CA that the service trusts, be in date and be for a client; "
            "or this is the wrong listener: a verifier has one for orchestrators and another for owners"
        ),
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
            Reason.OUTCOME_UNKNOWN, f"no answer came back ({code.name}): see what became of it before repeating"
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
