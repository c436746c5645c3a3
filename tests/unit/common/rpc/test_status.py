"""Errors to statuses and back, and what a peer can make of its answer."""

from __future__ import annotations

import grpc
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo  # type: ignore[import-untyped]  # ships no types
from google.rpc.status_pb2 import Status  # type: ignore[import-untyped]  # ships no types
from hypothesis import given
from hypothesis import strategies as st

from common.errors import (
    CLASS_OF,
    LEAVES,
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
)
from common.rpc.status import STATUS, code_of, from_rpc_error, to_status
from common.sev.errors import ParseError

_KEY = "grpc-status-details-bin"


def _received(status: grpc.Status) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(
        status.code, grpc.aio.Metadata(), grpc.aio.Metadata(*status.trailing_metadata), status.details
    )


def _bare(code: grpc.StatusCode, details: str = "", *metadata: tuple[str, bytes]) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*metadata), details)


def _info(
    code: grpc.StatusCode,
    reason: str,
    fields: dict[str, str] | None = None,
    *,
    domain: str = "sevattest",
    details: str = "told so",
) -> grpc.aio.AioRpcError:
    packed = AnyMessage()
    packed.Pack(ErrorInfo(reason=reason, domain=domain, metadata=fields or {}))
    status = Status(code=code.value[0], message=details, details=[packed])
    return _bare(code, details, (_KEY, status.SerializeToString()))


def test_each_class_of_error_has_a_status_of_its_own() -> None:
    assert set(STATUS) == set(LEAVES)
    assert len(set(STATUS.values())) == len(LEAVES)


@pytest.mark.parametrize("reason", Reason)
@pytest.mark.parametrize("mutating", [True, False])
def test_an_error_is_the_same_at_both_ends(reason: Reason, *, mutating: bool) -> None:
    error = CLASS_OF[reason](reason, "no, because", audit_id="4711", fw_error="11")
    back = from_rpc_error(_received(to_status(error)), mutating=mutating)
    assert (type(back), back.reason, back.message, back.fields) == (type(error), reason, "no, because", error.fields)


def test_a_subclass_travels_as_its_leaf() -> None:
    back = from_rpc_error(_received(to_status(ParseError("too short"))), mutating=False)
    assert (type(back), back.reason) == (InvalidInput, Reason.MALFORMED)


def test_the_wire_has_the_reason_without_a_prefix_in_our_domain() -> None:
    status = to_status(Refused(Reason.MEASUREMENT_REFUSED, "no", audit_id="7"))
    ((key, value),) = status.trailing_metadata
    info = ErrorInfo()
    assert Status.FromString(value).details[0].Unpack(info)
    assert (key, info.reason, info.domain, dict(info.metadata)) == (
        _KEY,
        "MEASUREMENT_REFUSED",
        "sevattest",
        {"audit_id": "7"},
    )


def test_a_hint_stays_at_its_own_end_in_both_directions() -> None:
    sent = from_rpc_error(
        _received(to_status(NotFound(Reason.NOT_FOUND, "no", hint="look at the file"))), mutating=False
    )
    assert sent.fields == {}
    received = from_rpc_error(_info(grpc.StatusCode.NOT_FOUND, "NOT_FOUND", {"hint": "run this"}), mutating=False)
    assert received.fields == {}


@pytest.mark.parametrize("name", ["reason", "message", "self", "Upper", "with space", "x" * 65, "", "_x"])
def test_a_peers_field_cannot_be_more_than_a_field(name: str) -> None:
    error = from_rpc_error(_info(grpc.StatusCode.NOT_FOUND, "NOT_FOUND", {name: "v", "ok": "v"}), mutating=False)
    assert error.fields == {"ok": "v"}


def test_what_a_peer_says_cannot_steer_a_terminal() -> None:
    evil = _info(
        grpc.StatusCode.NOT_FOUND,
        "NOT_FOUND",
        {"field": "\x1b[2J\r\n\u202e"},
        details="\x1b]0;title\x07 line\nsecond\u2028",
    )
    error = from_rpc_error(evil, mutating=False)
    assert error.message.isprintable()
    assert all(value.isprintable() for value in error.fields.values())


def test_long_words_are_cut_so_that_they_fit_into_metadata() -> None:
    error = Refused(Reason.CHIP_NOT_ALLOWED, "ü" * 100_000, **{f"f{i}": "ü" * 10_000 for i in range(100)})
    status = to_status(error)
    size = (
        sum(len(key) + len(value) for key, value in status.trailing_metadata) * 4 // 3
        + len(status.details.encode()) * 3
    )
    assert size < 8192
    assert from_rpc_error(_received(status), mutating=False).reason is Reason.CHIP_NOT_ALLOWED


def _several(*problems: str, **fields: str) -> InvalidInput:
    error = InvalidInput(Reason.INVALID_CONFIGURATION, "; ".join(problems), **fields)
    error.problems = problems
    return error


def _violations(status: grpc.Status) -> list[tuple[str, str]]:
    ((_, value),) = status.trailing_metadata
    request = BadRequest()
    assert any(each.Unpack(request) for each in Status.FromString(value).details)
    return [(each.field, each.description) for each in request.field_violations]


def test_every_problem_reaches_the_other_end() -> None:
    problems = tuple(f"spec.digests[{number}]: must be 64 lower-case hex digits" for number in range(30))
    back = from_rpc_error(_received(to_status(_several(*problems))), mutating=True)
    assert (back.sentences, back.reason) == (problems, Reason.INVALID_CONFIGURATION)
    assert back.message == f"{problems[0]} (and 29 more)"


def test_a_problem_has_its_path_apart() -> None:
    status = to_status(_several("spec.a[0].b: is bad", "line 7: is worse", "the worst: of all"))
    assert _violations(status) == [("spec.a[0].b", "is bad"), ("", "line 7: is worse"), ("", "the worst: of all")]


def test_one_problem_is_the_message() -> None:
    back = from_rpc_error(_received(to_status(_several("spec: is bad"))), mutating=True)
    assert (back.message, back.sentences, back.problems) == ("spec: is bad", ("spec: is bad",), ())


@pytest.mark.parametrize("problem", ["spec: is bad " + "x" * 90, "ü" * 2000, "x"])
def test_problems_beyond_what_metadata_holds_are_counted(problem: str) -> None:
    status = to_status(_several(*[problem] * 5000, **{f"f{i}": "ü" * 10_000 for i in range(100)}))
    size = sum(len(key) + len(value) for key, value in status.trailing_metadata) * 4 // 3
    assert size + len(status.details.encode()) * 3 < 8192
    found = from_rpc_error(_received(status), mutating=True).problems
    assert found[-1] == f"and {5000 - len(found) + 1} more problems"


def test_a_peers_problems_cannot_steer_a_terminal() -> None:
    packed = AnyMessage()
    packed.Pack(BadRequest(field_violations=[{"field": "\x1b[2J", "description": "a\nb"}] * 10_000))
    info = AnyMessage()
    info.Pack(ErrorInfo(reason="INVALID_ARGUMENT", domain="sevattest"))
    status = Status(code=3, message="no", details=[info, packed])
    evil = _bare(grpc.StatusCode.INVALID_ARGUMENT, "no", (_KEY, status.SerializeToString()))
    found = from_rpc_error(evil, mutating=True).problems
    assert len(found) <= 500
    assert all(each.isprintable() for each in found)


def test_a_reason_of_a_newer_service_keeps_the_meaning_of_its_status() -> None:
    error = from_rpc_error(_info(grpc.StatusCode.PERMISSION_DENIED, "SOMETHING_NEW"), mutating=True)
    assert (type(error), error.message) == (Refused, "told so")


def test_a_reason_under_a_foreign_status_or_domain_is_not_believed() -> None:
    for error in (
        _info(grpc.StatusCode.NOT_FOUND, "MEASUREMENT_REFUSED"),
        _info(grpc.StatusCode.NOT_FOUND, "MEASUREMENT_REFUSED", domain="elsewhere"),
    ):
        assert isinstance(from_rpc_error(error, mutating=True), NotFound)


@given(
    st.binary(max_size=200),
    st.sampled_from([code for code in grpc.StatusCode if code is not grpc.StatusCode.OK]),
    st.text(max_size=50),
    st.booleans(),
)
def test_whatever_a_peer_sends_is_one_of_our_errors(
    data: bytes,
    code: grpc.StatusCode,
    details: str,
    mutating: bool,  # noqa: FBT001 -- drawn by hypothesis
) -> None:
    assert isinstance(from_rpc_error(_bare(code, details, (_KEY, data)), mutating=mutating), SevattestError)


@pytest.mark.parametrize(
    ("code", "reading", "mutating"),
    [
        (grpc.StatusCode.DEADLINE_EXCEEDED, Unavailable, OutcomeUnknown),
        (grpc.StatusCode.UNAVAILABLE, Unavailable, OutcomeUnknown),
        (grpc.StatusCode.CANCELLED, Unavailable, OutcomeUnknown),
        (grpc.StatusCode.UNKNOWN, PlatformFailed, OutcomeUnknown),
        (grpc.StatusCode.INTERNAL, PlatformFailed, OutcomeUnknown),
        (grpc.StatusCode.DATA_LOSS, PlatformFailed, OutcomeUnknown),
        (grpc.StatusCode.ABORTED, OutcomeUnknown, OutcomeUnknown),
        (grpc.StatusCode.UNIMPLEMENTED, PlatformFailed, PlatformFailed),
        (grpc.StatusCode.UNAUTHENTICATED, Unauthenticated, Unauthenticated),
        (grpc.StatusCode.PERMISSION_DENIED, Refused, Refused),
        (grpc.StatusCode.INVALID_ARGUMENT, InvalidInput, InvalidInput),
        (grpc.StatusCode.FAILED_PRECONDITION, WrongState, WrongState),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, LimitExceeded, LimitExceeded),
    ],
)
def test_a_status_without_our_details_says_what_is_certain_and_no_more(
    code: grpc.StatusCode, reading: type[SevattestError], mutating: type[SevattestError]
) -> None:
    assert type(from_rpc_error(_bare(code, "words"), mutating=False)) is reading
    assert type(from_rpc_error(_bare(code, "words"), mutating=True)) is mutating


@pytest.mark.parametrize(
    "details",
    [
        "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:1: Failed to connect: refused",
        "DNS resolution failed for nowhere.example:1: C-ares status is not ARES_SUCCESS",
        "errors resolving nowhere.example:1: [field:hostname lookup error:Domain name not found]",
        "Stream removed (RST_STREAM (Received RST_STREAM with error code 7))",
    ],
)
def test_a_call_that_no_servicer_saw_is_unavailable_even_if_it_mutates(details: str) -> None:
    error = from_rpc_error(_bare(grpc.StatusCode.UNAVAILABLE, details), mutating=True)
    assert (type(error), error.reason) == (Unavailable, Reason.UNREACHABLE)


@pytest.mark.parametrize(
    "details", ["Socket closed", "Stream removed (RST_STREAM (… error code 2))", "keepalive watchdog timeout"]
)
def test_a_call_that_broke_under_way_leaves_the_outcome_unknown(details: str) -> None:
    assert isinstance(from_rpc_error(_bare(grpc.StatusCode.UNAVAILABLE, details), mutating=True), OutcomeUnknown)


@pytest.mark.parametrize(
    ("details", "mutating", "expected"),
    [
        ("CLIENT: Sent message larger than max (70000 vs. 65536)", True, InvalidInput),
        ("SERVER: Received message larger than max (70000 vs. 65536)", True, InvalidInput),
        ("CLIENT: Received message larger than max (70000 vs. 65536)", True, OutcomeUnknown),
        ("CLIENT: Received message larger than max (70000 vs. 65536)", False, PlatformFailed),
        ("SERVER: Sent message larger than max (70000 vs. 65536)", True, OutcomeUnknown),
    ],
)
def test_it_matters_which_message_was_too_large(
    details: str, *, mutating: bool, expected: type[SevattestError]
) -> None:
    error = from_rpc_error(_bare(grpc.StatusCode.RESOURCE_EXHAUSTED, details), mutating=mutating)
    assert type(error) is expected


def test_every_class_finds_its_status_also_through_a_subclass() -> None:
    assert code_of(ParseError("short")) is grpc.StatusCode.INVALID_ARGUMENT
