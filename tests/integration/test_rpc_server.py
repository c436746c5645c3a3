"""A real server and a real client over mutual TLS on loopback: what each promises the other, and the hostile peer."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from cryptography import x509

from common.errors import (
    CLASS_OF,
    InvalidInput,
    LimitExceeded,
    NotFound,
    OutcomeUnknown,
    PlatformFailed,
    Reason,
    SevattestError,
    Unauthenticated,
    Unavailable,
)
from common.rpc import MAX_MESSAGE
from common.rpc.client import call, follow, open_channel
from common.rpc.health import probe
from common.rpc.identity import Identity, Role, caller
from common.rpc.server import OPTIONS, Limits, Server
from common.rpc.steps import shielded
from common.rpc.tls import ClientTls
from common.telemetry.log import SILENCE
from sevattest.v1 import host_agent_service_pb2 as pb
from sevattest.v1 import host_agent_service_pb2_grpc as rpc
from tests.support.pki import Pair, Pki, raw_channel
from tests.support.recording_log import RecordingLog
from tests.support.rpc import SettableClock

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


async def test_a_servicer_knows_its_caller_by_the_certificate(site: Site) -> None:
    async with site.client("one") as one, site.client("two") as two:
        await site.abort(one)
        await site.abort(two)
    assert [str(who) for who in site.agent.callers] == [
        "spiffe://datacenter.example/orchestrator/one",
        "spiffe://datacenter.example/orchestrator/two",
    ]


@pytest.mark.parametrize("reason", Reason)
async def test_every_error_reaches_the_caller_as_it_was_raised(site: Site, reason: Reason) -> None:
    async def refuse(_request: object) -> pb.AbortLaunchResponse:
        raise CLASS_OF[reason](reason, "a sentence with ümlauts", audit_id="a1", hint="never travels")

    site.agent.behaviour = refuse
    async with site.client() as channel:
        error = await site.failure(channel)
    assert type(error) is CLASS_OF[reason]
    assert (error.reason, error.message, error.fields) == (reason, "a sentence with ümlauts", {"audit_id": "a1"})


async def test_no_exception_text_leaves_the_process_or_enters_the_log(site: Site) -> None:
    async def stumble(_request: object) -> pb.AbortLaunchResponse:
        raise ValueError("tik=00112233")

    site.agent.behaviour = stumble
    async with site.client() as channel:
        error = await site.failure(channel)
    defect = site.log.named("rpc.defect")[0]
    assert isinstance(error, PlatformFailed)
    assert error.message == f"internal error, incident {defect.fields['incident']}"
    assert "00112233" not in f"{error!r} {error.fields} {error.__cause__}"
    assert isinstance(defect.fields["error"], ValueError)  # the log itself prints its type and place only


async def test_an_answer_that_cannot_be_sent_is_a_defect_like_any_other(site: Site) -> None:
    async def answer_nothing(_request: object) -> pb.AbortLaunchResponse:
        return None  # type: ignore[return-value]  # the defect under test

    site.agent.behaviour = answer_nothing
    async with site.client() as channel:
        error = await site.failure(channel)
    assert error.reason is Reason.INTERNAL
    assert error.message.startswith("internal error, incident ")


@pytest.mark.parametrize("deadline", [None, 3600.0])
async def test_a_call_without_a_near_deadline_is_refused(site: Site, deadline: float | None) -> None:
    async with site.client() as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rpc.HostAgentServiceStub(channel).AbortLaunch(pb.AbortLaunchRequest(), timeout=deadline)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details() == "the call needs a deadline of at most 60 seconds"
    assert site.agent.callers == []


async def test_a_call_may_take_a_minute_and_a_stream_an_hour(site: Site) -> None:
    await site.agent.launches.put(pb.WatchLaunchesResponse())
    async with site.client() as channel:
        await site.abort(channel, timeout=60)
        stream = rpc.HostAgentServiceStub(channel).WatchLaunches(pb.WatchLaunchesRequest(), timeout=3600)
        async for _ in stream:
            break
        stream.cancel()


async def test_a_stream_beyond_an_hour_is_refused(site: Site) -> None:
    async with site.client() as channel:
        with pytest.raises(InvalidInput) as caught:
            async for _ in follow(
                rpc.HostAgentServiceStub(channel).WatchLaunches, pb.WatchLaunchesRequest(), timeout=3700
            ):
                pass
    assert caught.value.reason is Reason.DEADLINE_REQUIRED


async def test_a_stream_ends_in_the_servicer_when_its_caller_leaves(site: Site) -> None:
    await site.agent.launches.put(pb.WatchLaunchesResponse(launch=pb.GuestLaunch(guest="web")))
    async with site.client() as channel:
        stream = rpc.HostAgentServiceStub(channel).WatchLaunches(pb.WatchLaunchesRequest(), timeout=60)
        async for response in stream:
            assert response.launch.guest == "web"
            assert site.agent.watchers == 1
            break
        stream.cancel()
    await _until(lambda: site.agent.watchers == 0)


async def test_a_malformed_request_is_refused_without_its_parsers_words(site: Site) -> None:
    async with raw_channel(site.address, site.pki.datacenter_ca, site.pki.issue(Role.ORCHESTRATOR)) as channel:
        method: Any = channel.unary_unary("/sevattest.v1.HostAgentService/AbortLaunch")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await method(b"\xff\xff\xff", timeout=10)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details() == "the request is not a valid protobuf message"


async def test_a_call_without_a_request_is_refused(site: Site) -> None:
    async def nothing() -> AsyncIterator[bytes]:
        return
        yield b""

    async with raw_channel(site.address, site.pki.datacenter_ca, site.pki.issue(Role.ORCHESTRATOR)) as channel:
        method: Any = channel.stream_unary("/sevattest.v1.HostAgentService/AbortLaunch")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await method(nothing(), timeout=10)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details() == "the call carries no request"


async def test_a_message_above_the_limit_is_refused_and_the_connection_lives_on(site: Site) -> None:
    big = pb.InjectSecretRequest(payload=bytes(MAX_MESSAGE))
    raw = raw_channel(site.address, site.pki.datacenter_ca, site.pki.issue(Role.ORCHESTRATOR))
    async with raw, site.client() as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rpc.HostAgentServiceStub(raw).InjectSecret(big, timeout=10)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        await rpc.HostAgentServiceStub(raw).AbortLaunch(pb.AbortLaunchRequest(), timeout=10)
        with pytest.raises(InvalidInput, match="the request is larger than a service accepts"):
            await call(rpc.HostAgentServiceStub(channel).InjectSecret, big, timeout=10, mutating=True)


async def test_an_answer_above_the_limit_is_a_defect_of_the_service(site: Site) -> None:
    async def shout(_request: object) -> pb.AbortLaunchResponse:
        return pb.AbortLaunchResponse(launch=pb.GuestLaunch(guest="x" * MAX_MESSAGE))

    site.agent.behaviour = shout
    async with site.client() as channel:
        assert (await site.failure(channel)).reason is Reason.INTERNAL


async def test_one_caller_cannot_take_more_than_its_share_and_others_keep_theirs(pki: Pki) -> None:
    async with serve(pki, limits=Limits(in_flight=3)) as site:
        release = asyncio.Event()

        async def wait(_request: object) -> pb.AbortLaunchResponse:
            await release.wait()
            return pb.AbortLaunchResponse()

        site.agent.behaviour = wait
        async with site.client("greedy") as greedy, site.client("greedy") as second, site.client("other") as other:
            under_way = [asyncio.create_task(site.abort(channel)) for channel in (greedy, second, greedy)]
            await _until(lambda: len(site.agent.callers) == 3)
            error = await site.failure(second)
            assert isinstance(error, LimitExceeded)
            assert error.reason is Reason.TOO_MANY_REQUESTS
            neighbour = asyncio.create_task(site.abort(other))
            await _until(lambda: len(site.agent.callers) == 4)
            release.set()
            await asyncio.gather(neighbour, *under_way)
            await site.abort(greedy)


async def test_half_open_streams_hold_only_their_own_callers_share(pki: Pki) -> None:
    async def never() -> AsyncIterator[bytes]:
        await asyncio.Event().wait()
        yield b""

    async with serve(pki, limits=Limits(in_flight=8)) as site:
        pair = pki.issue(Role.ORCHESTRATOR, "attacker")
        async with raw_channel(site.address, pki.datacenter_ca, pair) as channel, site.client("legit") as legit:
            method: Any = channel.stream_unary("/sevattest.v1.HostAgentService/AbortLaunch")
            # Without a deadline none of them is kept at all, although no byte of a request has come.
            refused = await asyncio.gather(*(_code(method(never())) for _ in range(20)))
            assert set(refused) == {grpc.StatusCode.INVALID_ARGUMENT}
            kept = [method(never(), timeout=30) for _ in range(40)]
            tasks = [asyncio.create_task(_code(stream)) for stream in kept]
            await _until(lambda: sum(task.done() for task in tasks) == 32)
            assert {task.result() for task in tasks if task.done()} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
            await site.abort(legit, timeout=5)
            for stream in kept:
                stream.cancel()
            await asyncio.gather(*tasks)
            await _until(lambda: not site.server._gatekeeper._in_flight)


async def test_a_burst_of_calls_on_few_connections_is_answered_to_the_last(pki: Pki) -> None:
    """Left to its defaults, gRPC drops a part of this: from its queue at random, or as streams beyond their cap."""
    async with serve(pki, log=SILENCE) as site:
        channels = [site.client(f"c{i}") for i in range(4)]
        stubs = [rpc.HostAgentServiceStub(channel) for channel in channels]
        calls = (_code(stubs[i % 4].AbortLaunch(pb.AbortLaunchRequest(), timeout=59)) for i in range(2000))
        assert set(await asyncio.gather(*calls)) == {None}
        await asyncio.gather(*(channel.close() for channel in channels))


def test_a_connection_at_the_end_of_its_life_waits_for_the_longest_call() -> None:
    assert dict(OPTIONS)["grpc.max_connection_age_grace_ms"] > Limits().deadline * 1000


async def test_twenty_thousand_reset_streams_do_not_slow_another_caller_down(pki: Pki) -> None:
    async with serve(pki, log=SILENCE) as site, site.client("legit") as channel:
        attack = asyncio.create_task(asyncio.to_thread(_reset_streams, site, 20_000))
        calls = 0
        while not attack.done() or calls < 5:
            await site.abort(channel, timeout=2)
            calls += 1
        await attack


async def test_a_certificate_that_expires_during_a_connection_ends_its_use(pki: Pki) -> None:
    clock = SettableClock()
    async with serve(pki, clock=clock) as site:
        pair = pki.forge(Role.ORCHESTRATOR, ends=timedelta(minutes=10))
        tls = ClientTls(cert=pair.cert, key=pair.key, server_ca=pki.datacenter_ca)
        async with open_channel(site.address, tls) as channel:
            await site.abort(channel)
            clock.advance(timedelta(minutes=9))
            await site.abort(channel)
            clock.advance(timedelta(minutes=2))
            error = await site.failure(channel)
    assert isinstance(error, Unauthenticated)
    assert "the certificate expired at" in error.message


async def test_tls_1_2_is_refused_before_the_servicer(site: Site) -> None:
    status = await asyncio.to_thread(_speak_http2, site, ssl.TLSVersion.TLSv1_2)
    assert status == "TLSv1.2"
    await _until(lambda: any(event.name == "rpc" for event in site.log.events))
    assert site.log.named("rpc")[0].fields["text"] == "the connection must use TLS 1.3"
    assert site.agent.callers == []


async def test_the_same_bytes_over_tls_1_3_are_served(site: Site) -> None:
    assert await asyncio.to_thread(_speak_http2, site, ssl.TLSVersion.TLSv1_3) == "TLSv1.3"
    await _until(lambda: len(site.agent.callers) == 1)


async def test_a_renewed_certificate_is_served_without_losing_a_call(pki: Pki, tmp_path: Path) -> None:
    first, second = pki.forge(Role.AGENT, name="one"), pki.forge(Role.AGENT, name="two")
    own = _copy(first, tmp_path)
    tls = pki.server_tls(Role.AGENT, cert=own.cert, key=own.key)
    async with serve(pki, tls=tls) as site:
        stopped = asyncio.Event()

        async def load() -> int:
            count = 0
            while not stopped.is_set():
                # A connection of its own for each call, so that the handshakes meet the change.
                async with site.client() as channel:
                    await site.abort(channel)
                count += 1
            return count

        workers = [asyncio.create_task(load()) for _ in range(4)]
        before = await asyncio.to_thread(_served_serial, site.address)
        await _until(lambda: len(site.agent.callers) >= 10)
        _replace(second.key, own.key)
        assert not site.server.certificates.poll()  # half done: the new key, the old certificate
        assert not site.server.certificates.healthy
        _replace(second.cert, own.cert)
        assert site.server.certificates.poll()
        after = await asyncio.to_thread(_served_serial, site.address)
        seen = len(site.agent.callers)
        await _until(lambda: len(site.agent.callers) >= seen + 10)
        stopped.set()
        assert sum(await asyncio.gather(*workers)) == len(site.agent.callers)
    assert before == _serial(first)
    assert after == _serial(second)
    assert [event.name for event in site.log.events if event.name.startswith("tls.")] == [
        "tls.reload_failed",
        "tls.reloaded",
    ]


async def test_a_step_that_has_begun_runs_to_its_end_although_the_caller_has_gone(site: Site) -> None:
    begun, may_end, done = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def commit() -> pb.AbortLaunchResponse:
        begun.set()
        await may_end.wait()
        done.set()
        return pb.AbortLaunchResponse()

    site.agent.behaviour = lambda _request: shielded(commit())
    async with site.client() as channel:
        error = await site.failure(channel, timeout=0.2, mutating=True)
        assert isinstance(error, OutcomeUnknown)
        assert begun.is_set()
        assert not done.is_set()
        stopping = asyncio.create_task(site.server.stop(0))
        await asyncio.sleep(0)
        assert not stopping.done()
        may_end.set()
        await stopping
    assert done.is_set()


async def test_a_step_that_fails_after_its_caller_has_gone_is_in_the_log(site: Site) -> None:
    may_end = asyncio.Event()
    calls: list[asyncio.Task[Any]] = []

    async def commit() -> pb.AbortLaunchResponse:
        await may_end.wait()
        raise OSError(28, "No space left on device")

    def step(_request: object) -> Coroutine[Any, Any, pb.AbortLaunchResponse]:
        call = asyncio.current_task()
        assert call is not None
        calls.append(call)
        return shielded(commit())

    site.agent.behaviour = step
    async with site.client() as channel:
        # On a loaded machine a short call may end before it reaches the server.
        while not calls:
            await site.failure(channel, timeout=0.2, mutating=True)
        # The step must not fail before the server knows that nobody waits for it.
        await _until(lambda: calls[0].cancelling() > 0)
        may_end.set()
        await _until(lambda: bool(site.log.named("rpc.step_failed")))
    assert isinstance(site.log.named("rpc.step_failed")[0].fields["error"], OSError)


async def test_a_step_that_is_not_shielded_is_cut(site: Site) -> None:
    begun, cut = asyncio.Event(), asyncio.Event()

    async def work(_request: object) -> pb.AbortLaunchResponse:
        begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cut.set()
            raise
        return pb.AbortLaunchResponse()

    site.agent.behaviour = work
    async with site.client() as channel:
        for _ in range(50):
            assert (await site.failure(channel, timeout=0.2, mutating=False)).reason is Reason.UNREACHABLE
            if begun.is_set():
                break
    await _until(cut.is_set)
    assert begun.is_set()


async def test_a_service_that_dies_under_a_mutating_call_leaves_the_outcome_unknown(site: Site) -> None:
    begun = asyncio.Event()

    async def die(_request: object) -> pb.AbortLaunchResponse:
        begun.set()
        await asyncio.Event().wait()
        return pb.AbortLaunchResponse()

    site.agent.behaviour = die
    async with site.client() as channel, site.client("second") as second:
        mutating = asyncio.create_task(site.failure(channel, mutating=True))
        reading = asyncio.create_task(site.failure(second, mutating=False))
        await _until(lambda: len(site.agent.callers) == 2)
        await site.server.stop(0)
        assert isinstance(await mutating, OutcomeUnknown)
        assert isinstance(await reading, Unavailable)


async def test_nothing_can_have_happened_where_nobody_listens(pki: Pki) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        async with open_channel(address, pki.client_tls(Role.ORCHESTRATOR, server=Role.AGENT)) as channel:
            with pytest.raises(Unavailable) as caught:
                await call(
                    rpc.HostAgentServiceStub(channel).AbortLaunch, pb.AbortLaunchRequest(), timeout=20, mutating=True
                )
    assert caught.value.reason is Reason.UNREACHABLE
    assert "Connection refused" in caught.value.message


async def test_the_three_ways_for_tls_to_fail_have_three_hints(site: Site) -> None:
    pki = site.pki
    good, stranger = pki.issue(Role.ORCHESTRATOR), pki.forge(Role.ORCHESTRATOR, authority=pki.stranger())
    # The same listener by another address: through a relay, since the server listens on one.
    relay = await asyncio.start_server(_relay_to(site.address), "127.0.0.2", 0)
    elsewhere = f"127.0.0.2:{relay.sockets[0].getsockname()[1]}"
    hints = []
    for target, pair, server_ca in (
        (site.address, good, pki.owner_ca),
        (elsewhere, good, pki.datacenter_ca),
        (site.address, stranger, pki.datacenter_ca),
    ):
        async with open_channel(target, ClientTls(cert=pair.cert, key=pair.key, server_ca=server_ca)) as channel:
            error = await site.failure(channel, mutating=True)
        assert isinstance(error, Unavailable), target
        hints.append(error.fields["hint"])
    relay.close()
    assert "right CA" in hints[0]
    assert "--dns or --ip" in hints[1]
    assert "for a client" in hints[2]


async def test_probes_ask_the_socket_and_learn_when_the_server_stops(pki: Pki, tmp_path: Path) -> None:
    path = tmp_path / "health.sock"
    assert not await probe(path, timeout=2)
    async with serve(pki, health_socket=path) as site:
        assert path.stat().st_mode & 0o777 == 0o600
        assert await probe(path)
        site.server.health.set("store", ready=False)
        assert not await probe(path)
        site.server.health.set("store", ready=True)
        assert await probe(path)
    assert not await probe(path, timeout=2)
    assert not path.exists()


async def test_the_health_socket_serves_nothing_else(pki: Pki, tmp_path: Path) -> None:
    path = tmp_path / "health.sock"
    async with serve(pki, health_socket=path), grpc.aio.insecure_channel(f"unix:{path}") as channel:
        for method in ("/sevattest.v1.HostAgentService/ExportChain", "/grpc.health.v1.Health/List"):
            raw: Any = channel.unary_unary(method)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await raw(b"", timeout=5)
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_server_whose_certificate_is_about_to_end_is_not_ready(pki: Pki, tmp_path: Path) -> None:
    pair = pki.forge(Role.AGENT, ends=timedelta(minutes=59))
    path = tmp_path / "health.sock"
    async with serve(pki, tls=pki.server_tls(Role.AGENT, cert=pair.cert, key=pair.key), health_socket=path):
        assert not await probe(path)


async def test_two_servers_never_share_a_port(site: Site) -> None:
    second = Server(listen=site.address, tls=site.pki.server_tls(Role.AGENT), log=RecordingLog())
    with pytest.raises(InvalidInput, match=r"cannot listen on 127\.0\.0\.1:\d+: the port is taken"):
        await second.start()


async def test_a_method_that_nobody_may_call_cannot_be_served(pki: Pki) -> None:
    server = Server(listen="127.0.0.1:0", tls=pki.server_tls(Role.AGENT), log=RecordingLog())

    def adder(_servicer: object, target: Any) -> None:
        handler: Any = grpc.unary_unary_rpc_method_handler(lambda _request, _context: b"")
        target.add_registered_method_handlers("sevattest.v1.New", {"Method": handler})

    with pytest.raises(TypeError, match=r"/sevattest\.v1\.New/Method: no role may call it"):
        server.add(adder, object())


async def test_garbage_and_silent_connections_do_not_disturb_others(site: Site) -> None:
    host, port = site.address.split(":")
    silent = [socket.create_connection((host, int(port))) for _ in range(100)]
    for junk in (b"GET / HTTP/1.1\r\n\r\n", bytes(200), b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x16\x03\x01\xff\xff"):
        with socket.create_connection((host, int(port))) as connection, contextlib.suppress(OSError):
            connection.sendall(junk)
    async with site.client() as channel:
        await site.abort(channel, timeout=5)
    for connection in silent:
        connection.close()


async def _until(condition: Callable[[], bool]) -> None:
    """Let the loop run until `condition` holds; pytest's own timeout ends a test where it never does."""
    while not condition():  # noqa: ASYNC110 -- some conditions are in other threads or in gRPC
        await asyncio.sleep(0.005)


async def _code(call: Awaitable[Any]) -> grpc.StatusCode | None:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    except asyncio.CancelledError:
        return grpc.StatusCode.CANCELLED
    return None


def _copy(pair: Pair, folder: Path) -> Pair:
    own = Pair(cert=folder / "own.pem", key=folder / "own.key")
    own.key.touch(mode=0o600)
    own.cert.write_bytes(pair.cert.read_bytes())
    own.key.write_bytes(pair.key.read_bytes())
    return own


def _replace(source: Path, target: Path) -> None:
    fresh = target.with_suffix(".new")
    fresh.touch(mode=0o600)
    fresh.write_bytes(source.read_bytes())
    fresh.replace(target)


def _serial(pair: Pair) -> int:
    return x509.load_pem_x509_certificate(pair.cert.read_bytes()).serial_number


def _served_serial(address: str) -> int:
    host, port = address.split(":")
    # The client's certificate does not matter here: the server has shown its own before it asks for one.
    pem = ssl.get_server_certificate((host, int(port)), timeout=10)
    return x509.load_pem_x509_certificate(pem.encode()).serial_number


def _relay_to(address: str) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
    host, port = address.split(":")

    async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(65536):
                sink.write(data)
                await sink.drain()
        sink.close()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there_writer = await asyncio.open_connection(host, int(port))
        await asyncio.gather(pump(reader, there_writer), pump(there_reader, writer))

    return relay


@contextlib.contextmanager
def _http2(site: Site, version: ssl.TLSVersion) -> Iterator[tuple[ssl.SSLSocket, bytes]]:
    """A connection over exactly this version of TLS with the preface sent, and the header block of an AbortLaunch."""
    pair = site.pki.issue(Role.ORCHESTRATOR)
    context = ssl.create_default_context(cafile=str(site.pki.datacenter_ca))
    context.minimum_version = context.maximum_version = version
    context.load_cert_chain(pair.cert, pair.key)
    context.set_alpn_protocols(["h2"])
    host, port = site.address.split(":")
    headers = {
        ":method": "POST",
        ":scheme": "https",
        ":path": "/sevattest.v1.HostAgentService/AbortLaunch",
        ":authority": "localhost",
        "content-type": "application/grpc",
        "te": "trailers",
        "grpc-timeout": "10S",
    }
    # RFC 7541 6.2.2: literal fields without indexing, new names, no Huffman coding.
    block = b"".join(
        b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
        for name, value in headers.items()
    )
    with (
        socket.create_connection((host, int(port)), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as tls,
    ):
        tls.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(4, 0, 0, b""))
        yield tls, block


def _speak_http2(site: Site, version: ssl.TLSVersion) -> str | None:
    """One AbortLaunch in hand-made HTTP/2 frames; returns the version of TLS that was negotiated."""
    with _http2(site, version) as (tls, block):
        tls.sendall(_frame(1, 4, 1, block) + _frame(0, 1, 1, bytes(5)))
        received = b""
        # The last frame of the answer is HEADERS (1) with END_STREAM (1).
        while not any(kind == 1 and flags & 1 for kind, flags in _frames(received)):
            data = tls.recv(4096)
            if not data:
                break
            received += data
        return tls.version()


def _reset_streams(site: Site, count: int) -> None:
    """Open streams and reset each at once (CVE-2023-44487), until done or cut off."""
    with _http2(site, ssl.TLSVersion.TLSv1_3) as (tls, block), contextlib.suppress(OSError):
        for stream in range(1, 2 * count, 2):
            tls.sendall(_frame(1, 4, stream, block) + _frame(3, 0, stream, struct.pack(">I", 8)))


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """RFC 9113 4.1."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def _frames(data: bytes) -> list[tuple[int, int]]:
    found = []
    while len(data) >= 9:
        size = int.from_bytes(data[:3], "big")
        if len(data) < 9 + size:
            break
        found.append((data[3], data[4]))
        data = data[9 + size :]
    return found
