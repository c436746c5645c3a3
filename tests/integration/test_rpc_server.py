"""The life of a server: its port, its certificates, its health, and what becomes of the calls that it ends under."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Coroutine
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509

from common.errors import InvalidInput, OutcomeUnknown, Reason, Unauthenticated, Unavailable
from common.rpc.client import open_channel
from common.rpc.health import probe
from common.rpc.identity import Role
from common.rpc.server import OPTIONS, Limits, Server
from common.rpc.steps import shielded
from common.rpc.tls import ClientTls
from sevattest.v1 import host_agent_service_pb2 as pb
from tests.support.eventually import until
from tests.support.pki import Pair, Pki, renew
from tests.support.recording_log import RecordingLog
from tests.support.rpc import SettableClock
from tests.support.rpc_site import Site, serve, site

__all__ = ["site"]  # a fixture


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


def test_a_connection_at_the_end_of_its_life_waits_for_the_longest_call() -> None:
    assert dict(OPTIONS)["grpc.max_connection_age_grace_ms"] > Limits().deadline * 1000


async def test_a_renewed_certificate_is_served_without_losing_a_call(pki: Pki, tmp_path: Path) -> None:
    first, second = pki.forge(Role.AGENT, name="one"), pki.forge(Role.AGENT, name="two")
    own = first.copy_to(tmp_path)
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
        await until(lambda: len(site.agent.callers) >= 10)
        renew(own.key, second.key.read_bytes())
        assert not site.server.certificates.poll()  # half done: the new key, the old certificate
        assert not site.server.certificates.healthy
        renew(own.cert, second.cert.read_bytes())
        assert site.server.certificates.poll()
        after = await asyncio.to_thread(_served_serial, site.address)
        seen = len(site.agent.callers)
        await until(lambda: len(site.agent.callers) >= seen + 10)
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
        # On a loaded machine a short call may end before it reaches the server.
        while not begun.is_set():
            assert isinstance(await site.failure(channel, timeout=0.2, mutating=True), OutcomeUnknown)
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
        await until(lambda: calls[0].cancelling() > 0)
        may_end.set()
        await until(lambda: bool(site.log.named("rpc.step_failed")))
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
    await until(cut.is_set)
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
        await until(lambda: len(site.agent.callers) == 2)
        await site.server.stop(0)
        assert isinstance(await mutating, OutcomeUnknown)
        assert isinstance(await reading, Unavailable)


async def test_probes_ask_the_socket_and_learn_when_the_server_stops(pki: Pki, tmp_path: Path) -> None:
    path = tmp_path / "health.sock"
    with pytest.raises(Unavailable, match=r"nobody answers on the health socket .*: no such file or directory"):
        await probe(path, timeout=30)
    async with serve(pki, health_socket=path) as site:
        assert path.stat().st_mode & 0o777 == 0o600
        assert await probe(path)
        site.server.health.set("store", ready=False)
        assert not await probe(path)
        site.server.health.set("store", ready=True)
        assert await probe(path)
    assert not path.exists()
    with pytest.raises(Unavailable):
        await probe(path, timeout=30)


@pytest.mark.parametrize(
    ("listens", "why"), [(False, "connection refused"), (True, "it takes a connection and does not answer")]
)
async def test_a_socket_that_says_nothing_is_no_server_that_is_not_ready(
    tmp_path: Path, *, listens: bool, why: str
) -> None:
    path = tmp_path / "health.sock"
    with socket.socket(socket.AF_UNIX) as mute:
        mute.bind(str(path))
        if listens:
            mute.listen()
        with pytest.raises(Unavailable, match=f"nobody answers on the health socket {path}: {why}"):
            await probe(path, timeout=1 if listens else 30)


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


def _serial(pair: Pair) -> int:
    return x509.load_pem_x509_certificate(pair.cert.read_bytes()).serial_number


def _served_serial(address: str) -> int:
    host, port = address.split(":")
    # The client's certificate does not matter here: the server has shown its own before it asks for one.
    pem = ssl.get_server_certificate((host, int(port)), timeout=10)
    return x509.load_pem_x509_certificate(pem.encode()).serial_number
