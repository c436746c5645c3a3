"""The gatekeeper alone: the order of its steps, and cases that no client library can bring about."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest

from common.errors import NotFound, Reason
from common.rpc.identity import Role, caller
from common.rpc.interceptors import Gatekeeper, Limits
from common.telemetry.few_lines import LINES
from common.telemetry.metrics import UNMEASURED, Meter
from common.telemetry.prometheus import PrometheusMeter
from tests.support.metrics import Page
from tests.support.pki import Pki
from tests.support.recording_log import RecordingLog

_METHOD = "/sevattest.v1.HostAgentService/AbortLaunch"


class Aborted(Exception):
    """What the fake context raises where gRPC would."""

    def __init__(self, status: Any) -> None:
        super().__init__(status.details)
        self.status = status


class FakeContext:
    """As much of a servicer context as the gatekeeper uses."""

    def __init__(self, auth: dict[str, tuple[bytes, ...]], *, remaining: float | None = 10.0) -> None:
        self.auth, self.remaining = auth, remaining
        self.reads = 0
        self.written: list[bytes] = []

    def auth_context(self) -> dict[str, tuple[bytes, ...]]:
        return self.auth

    def time_remaining(self) -> float | None:
        return self.remaining

    async def read(self) -> bytes:
        self.reads += 1
        return b"request"

    async def write(self, message: bytes) -> None:
        self.written.append(message)

    async def abort_with_status(self, status: Any) -> None:
        raise Aborted(status)


@pytest.fixture(scope="module")
def auth(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[bytes, ...]]:
    pair = Pki(tmp_path_factory.mktemp("pki")).issue(Role.ORCHESTRATOR, "one")
    return {
        "x509_pem_cert": (pair.cert.read_bytes(),),
        "ssl_tls_version": (b"TLSv1.3",),
        "peer_spiffe_id": (b"spiffe://datacenter.example/orchestrator/one",),
    }


def _handler(behaviour: Callable[..., Any], *, parse: Callable[[bytes], Any] = bytes.decode) -> Any:
    return grpc.unary_unary_rpc_method_handler(behaviour, request_deserializer=parse, response_serializer=str.encode)


async def _wrapped(
    handler: Any,
    method: str = _METHOD,
    *,
    log: Any = None,
    limits: Limits | None = None,
    meter: Meter = UNMEASURED,
) -> Any:
    gatekeeper = Gatekeeper(
        trust_domain="datacenter.example",
        callers=frozenset({Role.ORCHESTRATOR}),
        limits=limits or Limits(),
        log=log or RecordingLog(),
        meter=meter,
    )

    async def registered(_details: Any) -> Any:
        return handler

    details: Any = type("Details", (), {"method": method})()
    return await gatekeeper.intercept_service(registered, details)


async def _echo(request: str, _context: Any) -> str:
    return f"{request} of {caller().name}"


async def _refusal(context: FakeContext, handler: Any = None) -> tuple[grpc.StatusCode, str]:
    wrapped = await _wrapped(_handler(_echo) if handler is None else handler)
    with pytest.raises(Aborted) as caught:
        await wrapped.stream_unary(None, context)
    return caught.value.status.code, caught.value.status.details


async def test_a_good_call_is_parsed_served_and_serialised(auth: dict[str, tuple[bytes, ...]]) -> None:
    wrapped = await _wrapped(_handler(_echo))
    assert await wrapped.stream_unary(None, FakeContext(auth)) == b"request of one"


async def test_a_flood_that_is_turned_away_leaves_few_lines_and_hides_no_good_call(
    auth: dict[str, tuple[bytes, ...]],
) -> None:
    log = RecordingLog()
    wrapped = await _wrapped(_handler(_echo), log=log)
    for _ in range(LINES + 500):
        with pytest.raises(Aborted):
            await wrapped.stream_unary(None, FakeContext({**auth, "ssl_tls_version": (b"TLSv1.2",)}))
    for _ in range(LINES + 5):
        await wrapped.stream_unary(None, FakeContext(auth))
    outcomes = Counter(each.fields["outcome"] for each in log.named("rpc"))
    assert outcomes == {"UNAUTHENTICATED": LINES, "OK": LINES + 5}
    away = log.named("rpc")[0].fields
    assert (away["caller"], away["reason"]) == (None, "UNAUTHENTICATED")
    assert away["text"] == "the connection must use TLS 1.3"


@pytest.mark.parametrize("version", [(b"TLSv1.2",), (), (b"TLSv1.3", b"TLSv1.3"), (b"TLSv1.3 ",)])
async def test_only_tls_1_3_will_do(auth: dict[str, tuple[bytes, ...]], version: tuple[bytes, ...]) -> None:
    context = FakeContext(auth | {"ssl_tls_version": version})
    assert await _refusal(context) == (grpc.StatusCode.UNAUTHENTICATED, "the connection must use TLS 1.3")
    assert context.reads == 0


@pytest.mark.parametrize("pem", [(), (b"junk",), (b"a", b"b")])
async def test_without_one_readable_certificate_there_is_no_identity(
    auth: dict[str, tuple[bytes, ...]], pem: tuple[bytes, ...]
) -> None:
    context = FakeContext(auth | {"x509_pem_cert": pem})
    code, _ = await _refusal(context)
    assert code is grpc.StatusCode.UNAUTHENTICATED
    assert context.reads == 0


@pytest.mark.parametrize(
    "ids",
    [
        (),
        (b"spiffe://datacenter.example/orchestrator/two",),
        (b"spiffe://datacenter.example/orchestrator/one", b"spiffe://datacenter.example/orchestrator/one"),
    ],
)
async def test_what_grpc_and_the_certificate_say_of_the_identity_must_agree(
    auth: dict[str, tuple[bytes, ...]], ids: tuple[bytes, ...]
) -> None:
    code, text = await _refusal(FakeContext(auth | {"peer_spiffe_id": ids}))
    assert (code, text) == (
        grpc.StatusCode.UNAUTHENTICATED,
        "gRPC and the certificate do not name the same identity",
    )


async def test_no_peer_information_at_all_is_no_identity() -> None:
    assert (await _refusal(FakeContext({})))[0] is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize("remaining", [None, 60.7, 3600.0])
async def test_the_deadline_is_looked_at_before_anything_else(remaining: float | None) -> None:
    context = FakeContext({}, remaining=remaining)
    assert (await _refusal(context))[0] is grpc.StatusCode.INVALID_ARGUMENT


async def test_no_byte_is_read_or_parsed_for_a_caller_who_is_turned_away(auth: dict[str, tuple[bytes, ...]]) -> None:
    def parse(_data: bytes) -> str:
        pytest.fail("the request was parsed")

    context = FakeContext(auth)
    wrapped = await _wrapped(_handler(_echo, parse=parse), "/sevattest.v1.VerifierAdminService/PutSecret")
    with pytest.raises(Aborted):
        await wrapped.stream_unary(None, context)
    assert context.reads == 0


async def test_a_method_without_a_row_is_denied_even_if_somebody_registered_it(
    auth: dict[str, tuple[bytes, ...]],
) -> None:
    wrapped = await _wrapped(_handler(_echo), "/sevattest.v1.HostAgentService/New")
    with pytest.raises(Aborted) as caught:
        await wrapped.stream_unary(None, FakeContext(auth))
    assert caught.value.status.code is grpc.StatusCode.PERMISSION_DENIED


async def test_a_parsers_own_words_stay_inside(auth: dict[str, tuple[bytes, ...]]) -> None:
    def parse(_data: bytes) -> str:
        raise RecursionError("deep secret")

    code, text = await _refusal(FakeContext(auth), _handler(_echo, parse=parse))
    assert (code, text) == (grpc.StatusCode.INVALID_ARGUMENT, "the request is not a valid protobuf message")


@pytest.mark.parametrize("defect", [ValueError("deep secret"), KeyError("deep secret"), grpc.RpcError("deep secret")])
async def test_of_a_defect_the_peer_learns_a_number_only(auth: dict[str, tuple[bytes, ...]], defect: Exception) -> None:
    async def fail(_request: str, _context: Any) -> str:
        raise defect

    log = RecordingLog()
    wrapped = await _wrapped(_handler(fail), log=log)
    with pytest.raises(Aborted) as caught:
        await wrapped.stream_unary(None, FakeContext(auth))
    status = caught.value.status
    (event,) = log.named("rpc.defect")
    assert status.code is grpc.StatusCode.INTERNAL
    assert status.details == f"internal error, incident {event.fields['incident']}"
    assert b"secret" not in b"".join(value for _, value in status.trailing_metadata)


async def test_cancellation_passes_through_and_the_callers_place_is_free_again(
    auth: dict[str, tuple[bytes, ...]],
) -> None:
    async def wait(_request: str, _context: Any) -> str:
        await asyncio.Event().wait()
        return ""

    wrapped = await _wrapped(_handler(wait), limits=Limits(in_flight=1))
    for _ in range(3):
        task = asyncio.create_task(wrapped.stream_unary(None, FakeContext(auth)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_a_stream_that_fails_in_its_middle_ends_with_the_error(auth: dict[str, tuple[bytes, ...]]) -> None:
    closed = []

    async def some(_request: str, _context: Any) -> AsyncIterator[str]:
        try:
            yield "first"
            raise NotFound(Reason.NOT_FOUND, "no more")
        finally:
            closed.append(caller().name)

    handler = grpc.unary_stream_rpc_method_handler(
        some,
        request_deserializer=bytes.decode,
        response_serializer=str.encode,
    )
    wrapped = await _wrapped(handler, "/sevattest.v1.HostAgentService/WatchLaunches")
    context = FakeContext(auth)
    with pytest.raises(Aborted) as caught:
        await wrapped.stream_stream(None, context)
    assert context.written == [b"first"]
    assert caught.value.status.code is grpc.StatusCode.NOT_FOUND
    assert closed == ["one"]


@pytest.mark.parametrize(
    "handler",
    [
        grpc.unary_unary_rpc_method_handler(lambda _request, _context: b"", bytes.decode, str.encode),
        grpc.unary_stream_rpc_method_handler(lambda _request, _context: iter(()), bytes.decode, str.encode),
        grpc.stream_unary_rpc_method_handler(lambda _requests, _context: b"", bytes.decode, str.encode),
        grpc.unary_unary_rpc_method_handler(_echo),
    ],
)
async def test_a_handler_that_cannot_be_guarded_is_refused(handler: Any) -> None:
    with pytest.raises(TypeError, match="AbortLaunch"):
        await _wrapped(handler)


async def test_a_call_is_one_line_in_the_log(auth: dict[str, tuple[bytes, ...]]) -> None:
    log = RecordingLog()
    wrapped = await _wrapped(_handler(_echo), log=log)
    await wrapped.stream_unary(None, FakeContext(auth))
    (event,) = log.events
    assert event.fields["method"] == _METHOD
    assert event.fields["caller"] == "spiffe://datacenter.example/orchestrator/one"
    assert event.fields["outcome"] == "OK"


async def _page(meter: PrometheusMeter) -> Page:
    return Page(text=(await meter.page()).decode())


async def test_a_call_is_counted_by_method_and_status_and_an_error_by_its_reason(
    auth: dict[str, tuple[bytes, ...]],
) -> None:
    async def refuse(_request: str, _context: Any) -> str:
        raise NotFound(Reason.NOT_FOUND, "not here")

    async def fail(_request: str, _context: Any) -> str:
        raise ZeroDivisionError

    async def wait(_request: str, _context: Any) -> str:
        raise asyncio.CancelledError

    meter = PrometheusMeter()
    for _ in range(2):
        await (await _wrapped(_handler(_echo), meter=meter)).stream_unary(None, FakeContext(auth))
    for behaviour in (refuse, fail):
        with pytest.raises(Aborted):
            await (await _wrapped(_handler(behaviour), meter=meter)).stream_unary(None, FakeContext(auth))
    with pytest.raises(asyncio.CancelledError):
        await (await _wrapped(_handler(wait), meter=meter)).stream_unary(None, FakeContext(auth))
    with pytest.raises(Aborted):  # without an identity
        await (await _wrapped(_handler(_echo), meter=meter)).stream_unary(None, FakeContext({}))
    page = await _page(meter)
    codes = {"OK": 2, "NOT_FOUND": 1, "INTERNAL": 1, "CANCELLED": 1, "UNAUTHENTICATED": 1}
    assert {code: page.of("sevattest_rpc_seconds_count", method=_METHOD, code=code) for code in codes} == codes
    assert page.of("sevattest_rpc_seconds_count") == sum(codes.values())
    reasons = {"NOT_FOUND": 1, "INTERNAL": 1, "UNAUTHENTICATED": 1}
    assert {why: page.of("sevattest_rpc_errors_total", method=_METHOD, reason=why) for why in reasons} == reasons
    assert page.of("sevattest_rpc_errors_total") == sum(reasons.values())


async def test_a_name_that_a_peer_made_up_is_on_no_page(auth: dict[str, tuple[bytes, ...]]) -> None:
    meter = PrometheusMeter()
    for number in range(20):
        wrapped = await _wrapped(None, f"/sevattest.v1.HostAgentService/Method{number}", meter=meter)
        with pytest.raises(Aborted):
            await wrapped.stream_unary(None, FakeContext(auth))
    page = await _page(meter)
    assert page.values("method") == {"unknown"}
    assert page.of("sevattest_rpc_seconds_count", code="UNIMPLEMENTED") == 20
