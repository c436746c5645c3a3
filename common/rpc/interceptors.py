"""The gatekeeper: what happens to every RPC before a servicer sees it, and to every error after.

Each handler is replaced by one that takes raw bytes and runs these steps, in this order:

1. the catch-all: an error of ours becomes its status, any other exception a fixed sentence with an incident id;
2. the call has a deadline, not too far away;
3. TLS 1.3 (gRPC for Python cannot set a minimum), a certificate that is still in date, for a client, not a CA's;
4. exactly one SPIFFE id, in the trust domain of this listener;
5. the role may call this listener, and the table in `authz` allows it the method;
6. the caller has not too many calls under way;
7. only now is the request read from the wire (no byte of it before), and parsed.

Steps deny by raising. There is one place that sends a status, so there is one `await` that could be forgotten, and the
tests would see it. A handler for one request is registered with gRPC as one for many, because only then does gRPC call
it before the request has arrived: a peer that opens streams and sends nothing meets steps 2 to 6 first.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from secrets import token_hex
from typing import Any, TypeAlias, TypeVar, cast

import grpc
from cryptography import x509

from common.clock import Clock, SystemClock
from common.errors import (
    InvalidInput,
    LimitExceeded,
    PlatformFailed,
    Reason,
    Refused,
    SevattestError,
    Unauthenticated,
)
from common.rpc import MAX_MESSAGE, MAX_STREAMS
from common.rpc.authz import METHODS
from common.rpc.identity import ActingAs, Identity, Role
from common.rpc.metrics import CALLS, ERRORS
from common.rpc.pem import CLIENT_USAGE, check_dates, leaf_identity, parse_certificates
from common.rpc.status import code_of, plain_status, to_status
from common.telemetry.few_lines import FewLines
from common.telemetry.log import Log
from common.telemetry.metrics import UNMEASURED, Meter

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
_Answer = TypeVar("_Answer")
_Unary: TypeAlias = Callable[[object, Context], Awaitable[bytes]]
_Stream: TypeAlias = Callable[[object, Context], Awaitable[None]]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one caller may ask of one listener.

    Attributes:
        in_flight: calls of one identity at once. As many as one connection can carry, so that a caller with one
            connection waits its turn at its own side and is never refused; more connections give no more.
        deadline: the longest that a unary call may take, seconds.
        stream_deadline: the longest that a stream may stay open, seconds.
        message: the largest message, bytes, both ways.
    """

    in_flight: int = MAX_STREAMS
    deadline: float = 60.0
    stream_deadline: float = 3600.0
    message: int = MAX_MESSAGE


# A timeout is rounded up where it is sent, to two or three digits: 3600 s arrive as 3610 s (gRPC 1.85).
_ROUNDING = 1.01


class Gatekeeper(grpc.aio.ServerInterceptor):
    """Authenticates, authorises and limits every call of one listener, and turns what it raises into a status."""

    def __init__(
        self,
        *,
        trust_domain: str,
        callers: frozenset[Role],
        limits: Limits,
        log: Log,
        clock: Clock | None = None,
        methods: Mapping[str, frozenset[Role]] = METHODS,
        meter: Meter = UNMEASURED,
    ) -> None:
        self._trust_domain = trust_domain
        self._callers = callers
        self._limits = limits
        self._log = log
        self._turned_away = FewLines(log.info)
        self._clock = clock or SystemClock()
        self._methods = methods
        self._meter = meter
        self._in_flight: Counter[str] = Counter()  # by SPIFFE id
        self._wrapped: dict[str, Handler] = {}

    @property
    def under_way(self) -> int:
        """Calls of all callers that have not ended."""
        return sum(self._in_flight.values())

    def flush(self) -> None:
        """Log now what was left out of the log so far."""
        self._turned_away.flush()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        """The handler that stands in front of the one that was registered for the method, or of none."""
        method = handler_call_details.method
        if method in self._wrapped:
            return self._wrapped[method]
        handler = await continuation(handler_call_details)
        if handler is None:
            # Not kept: a peer can invent method names for ever.
            return self._in_front_of_nothing()
        self._wrapped[method] = self._in_front_of(method, handler)
        return self._wrapped[method]

    def _in_front_of(self, method: str, handler: Handler) -> Handler:
        check_handler(method, handler)
        parse = cast("Callable[[bytes], object]", handler.request_deserializer)
        serialize = cast("Callable[[object], bytes]", handler.response_serializer)

        async def unary(_requests: object, context: Context) -> bytes:
            behaviour = cast("Callable[[object, Context], Awaitable[object]]", handler.unary_unary)

            async def serve() -> bytes:
                request = await _read(context, parse)
                return _fitting(serialize(await behaviour(request, context)), self._limits.message)

            return await self._guarded(method, context, serve, longest=self._limits.deadline)

        async def stream(_requests: object, context: Context) -> None:
            behaviour = cast("Callable[[object, Context], AsyncIterator[object]]", handler.unary_stream)

            async def serve() -> None:
                request = await _read(context, parse)
                # Closed here and not by the garbage collector, so that the servicer's own `finally` runs in this call.
                async with aclosing(cast("Any", behaviour(request, context))) as responses:
                    async for response in responses:
                        await context.write(_fitting(serialize(response), self._limits.message))

            await self._guarded(method, context, serve, longest=self._limits.stream_deadline)

        if handler.response_streaming:
            return _raw_handler(stream=stream)
        return _raw_handler(unary=unary)

    def _in_front_of_nothing(self) -> Handler:
        async def unknown(_requests: object, context: Context) -> bytes:
            async def serve() -> bytes:
                raise _UnknownMethod

            return await self._guarded("unknown", context, serve, longest=self._limits.stream_deadline)

        return _raw_handler(unary=unknown)

    async def _guarded(
        self, method: str, context: Context, serve: Callable[[], Awaitable[_Answer]], *, longest: float
    ) -> _Answer:
        began = time.monotonic()
        who: Identity | None = None
        try:
            self._check_deadline(context, longest)
            who = self._authenticate(context)
            self._authorise(who, method)
            self._enter(who)
            try:
                with ActingAs(who):
                    answer = await serve()
            finally:
                self._leave(who)
        except asyncio.CancelledError as cancelled:
            # The caller left or its deadline passed; steps in `shielded` have run to their end by now.
            self._log_call(method, who, "CANCELLED", began)
            if cancelled.__cause__ is not None:
                # Nobody else will hear how such a step failed.
                self._log.error("rpc.step_failed", method=method, caller=str(who), error=cancelled.__cause__)
            raise
        except grpc.aio.AbortError:
            raise
        except SevattestError as error:
            code, status = code_of(error), to_status(error)
            self._log_call(method, who, code.name, began, reason=error.reason.value, text=error.message)
        except _UnknownMethod:
            code, status = grpc.StatusCode.UNIMPLEMENTED, plain_status(grpc.StatusCode.UNIMPLEMENTED, "no such method")
            self._log_call(method, who, code.name, began)
        except Exception as error:  # noqa: BLE001 -- no exception's text may reach the peer, whatever it is
            incident = token_hex(8)
            code = grpc.StatusCode.INTERNAL
            status = to_status(_internal(incident))
            self._measure(method, code.name, began, Reason.INTERNAL)
            self._log.error(
                "rpc.defect", method=method, caller=None if who is None else str(who), incident=incident, error=error
            )
        else:
            self._log_call(method, who, "OK", began)
            return answer
        # The one way out for everything that went wrong; it raises, so nothing is returned below it.
        return await context.abort_with_status(status)

    def _check_deadline(self, context: Context, longest: float) -> None:
        # The stub says float; the context says None where the caller set no deadline.
        remaining = cast("float | None", context.time_remaining())
        if remaining is None or remaining > longest * _ROUNDING:
            raise InvalidInput(Reason.DEADLINE_REQUIRED, f"the call needs a deadline of at most {longest:.0f} seconds")

    def _authenticate(self, context: Context) -> Identity:
        auth = context.auth_context()
        if _one(auth, "ssl_tls_version") != b"TLSv1.3":
            raise _unauthenticated("the connection must use TLS 1.3")
        pem = _one(auth, "x509_pem_cert")
        if pem is None:
            raise _unauthenticated("a client certificate is required")
        try:
            peer = _peer(pem)
        except ValueError as error:
            raise _unauthenticated("the client certificate cannot be read") from error
        # TLS looked at the certificate once, at the handshake; a connection may outlive it.
        now = self._clock.now()
        if not peer.begins <= now <= peer.ends:
            check_dates(peer.leaf, now)
        who = peer.identity
        if _one(auth, "peer_spiffe_id") != peer.spiffe_id:
            raise _unauthenticated("gRPC and the certificate do not name the same identity")
        if who.trust_domain != self._trust_domain:
            raise _unauthenticated("the certificate's trust domain is not the one that is served here")
        return who

    def _authorise(self, who: Identity, method: str) -> None:
        if who.role not in self._callers:
            raise Refused(Reason.ROLE_NOT_ALLOWED, f"the role {who.role} may not call this listener")
        if method != "unknown" and who.role not in self._methods.get(method, frozenset()):
            raise Refused(Reason.ROLE_NOT_ALLOWED, f"the role {who.role} may not call this method")

    def _enter(self, who: Identity) -> None:
        under_way = self._in_flight[who.spiffe_id]
        if under_way >= self._limits.in_flight:
            raise LimitExceeded(
                Reason.TOO_MANY_REQUESTS, f"more than {self._limits.in_flight} calls of {who} are under way"
            )
        self._in_flight[who.spiffe_id] = under_way + 1

    def _leave(self, who: Identity) -> None:
        self._in_flight[who.spiffe_id] -= 1
        if not self._in_flight[who.spiffe_id]:
            del self._in_flight[who.spiffe_id]

    def _log_call(self, method: str, who: Identity | None, outcome: str, began: float, **fields: str) -> None:
        reason = fields.pop("reason", None)
        elapsed = round(self._measure(method, outcome, began, reason) * 1000, 1)
        caller = None if who is None else who.spiffe_id
        if outcome == "OK":
            self._log.info("rpc", method=method, caller=caller, outcome=outcome, ms=elapsed)
            return
        like = {"method": method, "outcome": outcome, **({} if reason is None else {"reason": reason})}
        self._turned_away.write("rpc", caller=caller, like=like, ms=elapsed, **fields)

    def _measure(self, method: str, outcome: str, began: float, reason: str | None) -> float:
        """Count a call; the seconds that it took."""
        seconds = time.monotonic() - began
        self._meter.observe(CALLS, seconds, method, outcome)
        if reason is not None:
            self._meter.add(ERRORS, method, reason)
        return seconds


class _UnknownMethod(Exception):
    """Nothing is registered under this name."""


def check_handler(method: str, handler: Handler) -> None:
    """Refuse a handler that the gatekeeper cannot stand in front of; called for each method when it is registered.

    Raises:
        TypeError: it takes a stream of requests, lacks its codec, or is not `async def` (one request, one answer) or
            an async generator (one request, many answers).
    """
    if handler.request_streaming or handler.request_deserializer is None or handler.response_serializer is None:
        raise TypeError(f"{method}: only methods of one protobuf request can be served")
    if handler.response_streaming:
        if not inspect.isasyncgenfunction(handler.unary_stream):
            raise TypeError(f"{method}: a method with many responses must be an async generator")
    elif not inspect.iscoroutinefunction(handler.unary_unary):
        raise TypeError(f"{method}: a method must be async def")


def _raw_handler(*, unary: _Unary | None = None, stream: _Stream | None = None) -> Handler:
    """A handler that gRPC calls as soon as the headers are there, and that sends and receives bytes."""
    # Without codecs gRPC hands bytes through. The stubs know only the synchronous handlers' types.
    if stream is not None:
        return grpc.stream_stream_rpc_method_handler(cast("Any", stream))
    return grpc.stream_unary_rpc_method_handler(cast("Any", unary))


async def _read(context: Context, parse: Callable[[bytes], object]) -> object:
    data = await context.read()
    if not isinstance(data, bytes):
        raise InvalidInput(Reason.INVALID_ARGUMENT, "the call carries no request")
    try:
        return parse(data)
    except Exception as error:  # protobuf's DecodeError, and whatever else a broken message makes of its parser
        raise InvalidInput(Reason.INVALID_ARGUMENT, "the request is not a valid protobuf message") from error


def _fitting(message: bytes, most: int) -> bytes:
    """The answer if it can be sent; gRPC would drop it after the fact, with a status of its own."""
    if len(message) > most:
        raise OverflowError(f"an answer of {len(message)} bytes")
    return message


def _one(auth: Mapping[str, Any], key: str) -> bytes | None:
    """The property's value if it has exactly one."""
    values = tuple(auth.get(key) or ())
    return values[0] if len(values) == 1 and isinstance(values[0], bytes) else None


@dataclass(frozen=True, kw_only=True)
class _Peer:
    """A peer's certificate as every call of a connection needs it. That it is in date is not kept."""

    leaf: x509.Certificate
    identity: Identity
    spiffe_id: bytes
    begins: datetime
    ends: datetime


@lru_cache(maxsize=1024)
def _peer(pem: bytes) -> _Peer:
    leaf = parse_certificates(pem)[0]
    identity = leaf_identity(leaf, CLIENT_USAGE)
    return _Peer(
        leaf=leaf,
        identity=identity,
        spiffe_id=identity.spiffe_id.encode(),
        begins=leaf.not_valid_before_utc,
        ends=leaf.not_valid_after_utc,
    )


def _unauthenticated(what: str) -> Unauthenticated:
    return Unauthenticated(Reason.UNAUTHENTICATED, what)


def _internal(incident: str) -> SevattestError:
    return PlatformFailed(Reason.INTERNAL, f"internal error, incident {incident}", incident=incident)
