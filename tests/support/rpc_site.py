"""A real server over mutual TLS on loopback, one method of which does what a test wants, and clients of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, cast

import grpc
import pytest

from common.errors import NotFound, Reason, SevattestError
from common.rpc.client import call, open_channel
from common.rpc.identity import Identity, Role, caller
from common.rpc.server import Server
from sevattest.v1 import host_agent_service_pb2 as pb
from sevattest.v1 import host_agent_service_pb2_grpc as rpc
from tests.support.pki import Pki
from tests.support.recording_log import RecordingLog

_Behaviour = Callable[[Any], Awaitable[pb.AbortLaunchResponse]]


class Agent:
    """Does in AbortLaunch what the test wants done, streams what it puts into `launches`, and knows no other method."""

    def __init__(self) -> None:
        self.callers: list[Identity] = []
        self.behaviour: _Behaviour = self._answer
        self.launches: asyncio.Queue[pb.WatchLaunchesResponse] = asyncio.Queue()
        self.watchers = 0

    async def _answer(self, _request: object) -> pb.AbortLaunchResponse:
        return pb.AbortLaunchResponse()

    async def AbortLaunch(self, request: pb.AbortLaunchRequest, _context: Any) -> pb.AbortLaunchResponse:  # noqa: N802 -- RPC
        self.callers.append(caller())
        return await self.behaviour(request)

    async def WatchLaunches(  # noqa: N802 -- the RPC's name
        self, _request: pb.WatchLaunchesRequest, _context: Any
    ) -> AsyncIterator[pb.WatchLaunchesResponse]:
        self.watchers += 1
        try:
            while True:
                yield await self.launches.get()
        finally:
            self.watchers -= 1

    async def _not_here(self, _request: Any, _context: Any) -> Any:
        raise NotFound(Reason.NOT_FOUND, "not here")

    ExportChain = GetPlatform = StartLaunch = GetMeasurement = InjectSecret = ResumeGuest = _not_here
    GetLaunch = ListLaunches = GetAttestationReport = _not_here


class Site:
    """A server, its files, and clients of it."""

    def __init__(self, pki: Pki, server: Server, agent: Agent, log: RecordingLog, address: str) -> None:
        self.pki, self.server, self.agent, self.log, self.address = pki, server, agent, log, address

    def client(self, name: str = "test") -> grpc.aio.Channel:
        return open_channel(self.address, self.pki.client_tls(Role.ORCHESTRATOR, name, server=Role.AGENT))

    async def abort(self, channel: grpc.aio.Channel, *, timeout: float = 20, mutating: bool = True) -> Any:  # noqa: ASYNC109 -- the RPC's
        stub = rpc.HostAgentServiceStub(channel)
        return await call(stub.AbortLaunch, pb.AbortLaunchRequest(), timeout=timeout, mutating=mutating)

    async def failure(self, channel: grpc.aio.Channel, **how: Any) -> SevattestError:
        with pytest.raises(SevattestError) as caught:
            await self.abort(channel, **how)
        return caught.value


@asynccontextmanager
async def serve(pki: Pki, **settings: Any) -> AsyncIterator[Site]:
    log, agent = RecordingLog(), Agent()
    defaults: dict[str, Any] = {"listen": "127.0.0.1:0", "log": log, "tls": pki.server_tls(Role.AGENT)}
    server = Server(**defaults | settings)
    server.add(cast("Any", rpc.add_HostAgentServiceServicer_to_server), agent)
    address = await server.start()
    try:
        yield Site(pki, server, agent, log, address)
    finally:
        await server.stop(0)


@pytest.fixture
async def site(pki: Pki) -> AsyncIterator[Site]:
    async with serve(pki) as running:
        yield running


async def status_of(answer: Awaitable[Any]) -> grpc.StatusCode | None:
    """The status that a call failed with; None where it was answered."""
    try:
        await answer
    except grpc.aio.AioRpcError as error:
        return error.code()
    except asyncio.CancelledError:
        return grpc.StatusCode.CANCELLED
    return None
