"""A call over mutual TLS: what it carries, how long and how large it may be, what its caller learns of a failure."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable

import grpc
import pytest

from common.errors import CLASS_OF, InvalidInput, LimitExceeded, OutcomeUnknown, PlatformFailed, Reason, Unavailable
from common.rpc import MAX_MESSAGE, MAX_STREAMS
from common.rpc.client import call, follow, open_channel
from common.rpc.identity import Role
from common.rpc.server import Limits
from common.rpc.tls import ClientTls
from common.telemetry.log import SILENCE
from sevattest.v1 import host_agent_service_pb2 as pb
from sevattest.v1 import host_agent_service_pb2_grpc as rpc
from tests.support.eventually import until
from tests.support.pki import Pki, raw_channel
from tests.support.rpc_site import Site, serve, site, status_of
from verifier.config import LimitsConfig

__all__ = ["site"]  # a fixture


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
    await until(lambda: site.agent.watchers == 0)


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


class _Nonsense(grpc.GenericRpcHandler):
    """Answers every call with bytes that are no message."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes]:
        async def one(_request: bytes, _context: object) -> bytes:
            return b"\xff\xff"

        async def many(_request: bytes, _context: object) -> AsyncIterator[bytes]:
            yield b"\xff\xff"

        if handler_call_details.method.endswith("/WatchLaunches"):
            return grpc.unary_stream_rpc_method_handler(many)
        return grpc.unary_unary_rpc_method_handler(one)


async def test_an_answer_that_is_no_message_is_none_and_what_was_asked_for_may_have_been_done() -> None:
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((_Nonsense(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = rpc.HostAgentServiceStub(channel)
            with pytest.raises(PlatformFailed, match="no message") as failure:
                await call(stub.ExportChain, pb.ExportChainRequest(), timeout=20, mutating=False)
            assert failure.value.reason is Reason.INTERNAL
            with pytest.raises(OutcomeUnknown):
                await call(stub.ResumeGuest, pb.ResumeGuestRequest(), timeout=20, mutating=True)
            with pytest.raises(PlatformFailed, match="no message"):
                async for _ in follow(stub.WatchLaunches, pb.WatchLaunchesRequest(), timeout=20):
                    pass
    finally:
        await server.stop(None)


async def test_one_caller_cannot_take_more_than_its_share_and_others_keep_theirs(pki: Pki) -> None:
    async with serve(pki, limits=Limits(in_flight=3)) as site:
        release = asyncio.Event()

        async def wait(_request: object) -> pb.AbortLaunchResponse:
            await release.wait()
            return pb.AbortLaunchResponse()

        site.agent.behaviour = wait
        async with site.client("greedy") as greedy, site.client("greedy") as second, site.client("other") as other:
            under_way = [asyncio.create_task(site.abort(channel)) for channel in (greedy, second, greedy)]
            await until(lambda: len(site.agent.callers) == 3)
            error = await site.failure(second)
            assert isinstance(error, LimitExceeded)
            assert error.reason is Reason.TOO_MANY_REQUESTS
            neighbour = asyncio.create_task(site.abort(other))
            await until(lambda: len(site.agent.callers) == 4)
            release.set()
            await asyncio.gather(neighbour, *under_way)
            await site.abort(greedy)


async def test_a_caller_with_one_connection_is_never_over_the_verifiers_share(pki: Pki) -> None:
    async with serve(pki, limits=Limits(in_flight=LimitsConfig().calls)) as site:
        release = asyncio.Event()

        async def wait(_request: object) -> pb.AbortLaunchResponse:
            await release.wait()
            return pb.AbortLaunchResponse()

        site.agent.behaviour = wait
        async with site.client() as channel:
            calls = [asyncio.create_task(site.abort(channel)) for _ in range(MAX_STREAMS + 1)]
            await until(lambda: len(site.agent.callers) == MAX_STREAMS or any(call.done() for call in calls))
            release.set()  # one call more waits at the client for a stream
            await asyncio.gather(*calls)
        assert len(site.agent.callers) == MAX_STREAMS + 1


async def test_a_burst_of_calls_on_few_connections_is_answered_to_the_last(pki: Pki) -> None:
    """Left to its defaults, gRPC drops a part of this: from its queue at random, or as streams beyond their cap."""
    async with serve(pki, log=SILENCE) as site:
        channels = [site.client(f"c{i}") for i in range(4)]
        stubs = [rpc.HostAgentServiceStub(channel) for channel in channels]
        calls = (status_of(stubs[i % 4].AbortLaunch(pb.AbortLaunchRequest(), timeout=59)) for i in range(2000))
        assert set(await asyncio.gather(*calls)) == {None}
        await asyncio.gather(*(channel.close() for channel in channels))


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
