"""The calling side: a channel over mutual TLS, and calls that raise our errors."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import TypeVar

import grpc

from common.clock import SystemClock
from common.errors import InvalidInput, Reason
from common.rpc import MAX_MESSAGE
from common.rpc.status import from_rpc_error, unreadable
from common.rpc.tls import ClientTls, load_client

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")

_ADDRESS = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):[0-9]{1,5}")

OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_metadata_size", 16384),
    # A dead server is noticed within 40 s, also while a stream is silent; the servers allow a ping every 20 s.
    ("grpc.keepalive_time_ms", 30000),
    ("grpc.keepalive_timeout_ms", 10000),
    # Callers repeat by themselves, with growing waits: a service that is back is found within 2 s, not 2 minutes.
    ("grpc.initial_reconnect_backoff_ms", 250),
    ("grpc.max_reconnect_backoff_ms", 2000),
    # Nobody between: no proxy from the environment, and no retry policy from somebody's DNS.
    ("grpc.enable_http_proxy", 0),
    ("grpc.service_config_disable_resolution", 1),
)


def open_channel(target: str, tls: ClientTls, *, message: int = MAX_MESSAGE) -> grpc.aio.Channel:
    """A channel to `target` (`HOST:PORT`); the files are read now, so a new channel sees renewed ones.

    The service's certificate must come from `tls.server_ca` and name the host or address in `target`. The largest
    message is `message` bytes, both ways.

    Raises:
        InvalidInput: `target` is no address; or `INVALID_CONFIGURATION`, naming the file and what is wrong with it.
    """
    if not _ADDRESS.fullmatch(target):
        raise InvalidInput(Reason.INVALID_ARGUMENT, f"{target!r} is not an address to call (HOST:PORT)")
    material = load_client(tls, SystemClock().now())
    credentials = grpc.ssl_channel_credentials(
        root_certificates=material.ca_pem, private_key=material.key_pem, certificate_chain=material.chain_pem
    )
    sizes = (("grpc.max_receive_message_length", message), ("grpc.max_send_message_length", message))
    return grpc.aio.secure_channel(target, credentials, options=(*OPTIONS, *sizes))


async def call(
    method: grpc.aio.UnaryUnaryMultiCallable[_Request, _Response],
    request: _Request,
    *,
    timeout: float,  # noqa: ASYNC109 -- becomes the RPC's own deadline, which travels to the server
    mutating: bool,
) -> _Response:
    """Call `method` and return its answer.

    Args:
        method: a stub's method.
        request: its request.
        timeout: seconds until the deadline, which travels with the call; servers want at most 60.
        mutating: whether the call may change something at the other side.

    Raises:
        SevattestError: what the service raised; `Unavailable` (`UNREACHABLE`) if it was not reached and nothing can
            have happened; `OutcomeUnknown` if `mutating` and the link or the deadline broke under way.
    """
    try:
        answer = await method(request, timeout=timeout)
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error, mutating=mutating) from error
    return _read(answer, mutating=mutating)


async def follow(
    method: grpc.aio.UnaryStreamMultiCallable[_Request, _Response],
    request: _Request,
    *,
    timeout: float,  # noqa: ASYNC109 -- the same
) -> AsyncIterator[_Response]:
    """Yield the answers of a streaming `method` until the server ends it.

    Raises:
        SevattestError: as `call` with `mutating=False`; a server also ends connections after some minutes, which is
            `Unavailable` (`UNREACHABLE`): call again.
    """
    try:
        async for response in method(request, timeout=timeout):
            yield _read(response, mutating=False)
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error, mutating=False) from error


def _read(answer: _Response | None, *, mutating: bool) -> _Response:
    """The answer; gRPC hands out None for bytes that are no message of the method's."""
    if answer is None:
        raise unreadable(mutating=mutating)
    return answer
