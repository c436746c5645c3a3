"""`grpc.health.v1.Health`: is the process ready, for its own callers and for probes.

On the mutual-TLS listener the gatekeeper decides who may ask. Probes of an orchestrating system (an exec probe, a
service manager) have no certificate; they ask a Unix socket that serves health and nothing else.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import grpc
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthServicer, HealthStub

from common.errors import InvalidInput, NotFound, Reason, Unavailable

# The stubs are older than Health.List.
_pb2 = cast("Any", health_pb2)
_SERVING = HealthCheckResponse.SERVING
_NOT_SERVING = HealthCheckResponse.NOT_SERVING
_UNKNOWN = HealthCheckResponse.SERVICE_UNKNOWN
# sun_path holds 108 bytes, the last of them zero (unix(7)).
_MAX_SOCKET_PATH = 107


class Health(HealthServicer):
    """One answer for the process and for each of its services: ready, or not.

    Each cause of not being ready has a name; the process is ready while there is none. It starts as not ready.
    """

    def __init__(self) -> None:
        self._services: set[str] = {""}
        self._causes = {"starting": False}
        self._changed = asyncio.Condition()
        self._wake: set[asyncio.Task[None]] = set()

    @property
    def serving(self) -> bool:
        """Whether the process is ready."""
        return all(self._causes.values())

    @property
    def causes(self) -> Mapping[str, bool]:
        """Every cause that was ever spoken of, and whether the process is ready as far as it goes."""
        return self._causes

    def add_services(self, names: Sequence[str]) -> None:
        """Answer for these services too."""
        self._services.update(names)

    def set(self, cause: str, *, ready: bool) -> None:
        """Say that `cause` (for example `store`) no longer speaks against being ready, or does."""
        before = self.serving
        self._causes[cause] = ready
        if self.serving != before:
            task = asyncio.get_running_loop().create_task(self._tell())
            self._wake.add(task)
            task.add_done_callback(self._wake.discard)

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def _status(self, service: str) -> int:
        if service not in self._services:
            return _UNKNOWN
        return _SERVING if self.serving else _NOT_SERVING

    async def Check(  # noqa: N802 -- the RPC's name
        self, request: HealthCheckRequest, _context: grpc.aio.ServicerContext[Any, Any]
    ) -> HealthCheckResponse:
        """Say whether a service is ready; `NotFound` for one that is not here."""
        status = self._status(request.service)
        if status == _UNKNOWN:
            raise NotFound(Reason.NOT_FOUND, "no such service here")
        return HealthCheckResponse(status=status)

    async def List(  # noqa: N802 -- the RPC's name
        self, _request: Any, _context: grpc.aio.ServicerContext[Any, Any]
    ) -> Any:
        """Say so of every service."""
        return _pb2.HealthListResponse(
            statuses={name: HealthCheckResponse(status=self._status(name)) for name in self._services}
        )

    async def Watch(  # noqa: N802 -- the RPC's name
        self, request: HealthCheckRequest, _context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[HealthCheckResponse]:
        """Say whether a service is ready, now and after each change, until the caller's deadline."""
        while True:
            said = self._status(request.service)
            yield HealthCheckResponse(status=said)
            async with self._changed:
                await self._changed.wait_for(lambda: self._status(request.service) != said)  # noqa: B023 -- awaited here


def socket_target(path: Path) -> str:
    """The gRPC address of a Unix socket.

    Raises:
        InvalidInput: `INVALID_CONFIGURATION`; the path does not fit into a socket's address.
    """
    absolute = str(path.absolute())
    if len(absolute.encode()) > _MAX_SOCKET_PATH:
        raise InvalidInput(
            Reason.INVALID_CONFIGURATION, f"{path}: a socket's path has at most {_MAX_SOCKET_PATH} bytes"
        )
    return f"unix:{absolute}"


async def probe(path: Path, *, timeout: float = 5.0) -> bool:  # noqa: ASYNC109 -- becomes the RPC's own deadline
    """Ask the process behind the health socket at `path` whether it is ready.

    Raises:
        InvalidInput: `INVALID_CONFIGURATION`; the path does not fit into a socket's address.
        Unavailable: `UNREACHABLE`; nobody answers there within `timeout` seconds.
    """
    async with grpc.aio.insecure_channel(socket_target(path), options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            answer = await cast("Any", HealthStub(channel)).Check(HealthCheckRequest(), timeout=timeout)
        except grpc.aio.AioRpcError as error:
            why = _against_connecting(path) or "it takes a connection and does not answer"
            raise Unavailable(Reason.UNREACHABLE, f"nobody answers on the health socket {path}: {why}") from error
    return bool(answer.status == _SERVING)


def _against_connecting(path: Path) -> str:
    """What the system says against a connection, in fewer words than gRPC; empty where there is one."""
    with socket.socket(socket.AF_UNIX) as plain:
        plain.settimeout(0)
        try:
            plain.connect(str(path))
        except OSError as error:
            return (error.strerror or "cannot be connected to").lower()
    return ""
