"""A peer that speaks as no client of ours would, in HTTP/2 frames made by hand where need be, and its neighbours."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import pytest

from common.rpc.identity import Role
from common.rpc.server import Limits
from common.telemetry.log import SILENCE
from tests.support.eventually import until
from tests.support.pki import Pki, raw_channel
from tests.support.rpc_site import Site, serve, site, status_of

__all__ = ["site"]  # a fixture


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


async def test_half_open_streams_hold_only_their_own_callers_share(pki: Pki) -> None:
    async def never() -> AsyncIterator[bytes]:
        await asyncio.Event().wait()
        yield b""

    async with serve(pki, limits=Limits(in_flight=8)) as site:
        pair = pki.issue(Role.ORCHESTRATOR, "attacker")
        async with raw_channel(site.address, pki.datacenter_ca, pair) as channel, site.client("legit") as legit:
            method: Any = channel.stream_unary("/sevattest.v1.HostAgentService/AbortLaunch")
            # Without a deadline none of them is kept at all, although no byte of a request has come.
            refused = await asyncio.gather(*(status_of(method(never())) for _ in range(20)))
            assert set(refused) == {grpc.StatusCode.INVALID_ARGUMENT}
            kept = [method(never(), timeout=30) for _ in range(40)]
            tasks = [asyncio.create_task(status_of(stream)) for stream in kept]
            await until(lambda: sum(task.done() for task in tasks) == 32)
            assert {task.result() for task in tasks if task.done()} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
            await site.abort(legit, timeout=20)
            for stream in kept:
                stream.cancel()
            await asyncio.gather(*tasks)
            await until(lambda: not site.server._gatekeeper._in_flight)


async def test_twenty_thousand_reset_streams_do_not_slow_another_caller_down(pki: Pki) -> None:
    async with serve(pki, log=SILENCE) as site, site.client("legit") as channel:
        attack = asyncio.create_task(asyncio.to_thread(_reset_streams, site, 20_000))
        calls = 0
        while not attack.done() or calls < 5:
            await site.abort(channel, timeout=20)
            calls += 1
        await attack


async def test_tls_1_2_is_refused_before_the_servicer(site: Site) -> None:
    status = await asyncio.to_thread(_speak_http2, site, ssl.TLSVersion.TLSv1_2)
    assert status == "TLSv1.2"
    await until(lambda: any(event.name == "rpc" for event in site.log.events))
    assert site.log.named("rpc")[0].fields["text"] == "the connection must use TLS 1.3"
    assert site.agent.callers == []


async def test_the_same_bytes_over_tls_1_3_are_served(site: Site) -> None:
    assert await asyncio.to_thread(_speak_http2, site, ssl.TLSVersion.TLSv1_3) == "TLSv1.3"
    await until(lambda: len(site.agent.callers) == 1)


async def test_garbage_and_silent_connections_do_not_disturb_others(site: Site) -> None:
    host, port = site.address.split(":")
    silent = [socket.create_connection((host, int(port))) for _ in range(100)]
    for junk in (b"GET / HTTP/1.1\r\n\r\n", bytes(200), b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x16\x03\x01\xff\xff"):
        with socket.create_connection((host, int(port))) as connection, contextlib.suppress(OSError):
            connection.sendall(junk)
    async with site.client() as channel:
        await site.abort(channel, timeout=20)
    for connection in silent:
        connection.close()


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
