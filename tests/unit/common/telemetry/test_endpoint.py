"""The endpoint: who may read, what is answered, and what a peer that means no good can take."""

from __future__ import annotations

import asyncio
import http.client
import os
import ssl
import sys
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from common import config as configuration
from common.errors import InvalidInput, Reason
from common.rpc.identity import Role
from common.telemetry import endpoint as under_test
from common.telemetry.endpoint import Endpoint, MetricsConfig
from common.telemetry.metrics import Counter, Gauge
from tests.support.eventually import until
from tests.support.metrics import Page, client_context, fetch, scrape, silent
from tests.support.pki import Pair, Pki
from tests.support.recording_log import RecordingLog

ASKED = Counter(name="asked_total", meaning="how often")
BROKEN = Gauge(name="broken", meaning="cannot be read")
LOOPBACK = MetricsConfig(listen="127.0.0.1:0")


@asynccontextmanager
async def shown(config: MetricsConfig, log: RecordingLog | None = None) -> AsyncIterator[tuple[Endpoint, str]]:
    endpoint = Endpoint(config, log or RecordingLog())
    address = await endpoint.start()
    try:
        yield endpoint, address
    finally:
        await endpoint.stop()


def files(pki: Pki, **changes: Any) -> dict[str, Any]:
    """What the configuration names for TLS: the datacenter's CA stands for a monitoring's own."""
    pair = pki.issue(Role.AGENT, "metrics", ip=["127.0.0.1"])
    return {"cert": pair.cert, "key": pair.key, "client_ca": pki.datacenter_ca, **changes}


# Who may read, by the configuration.


@pytest.mark.parametrize("listen", ["127.0.0.1:9464", "127.8.8.8:0", "[::1]:9464"])
def test_on_this_machine_alone_nothing_else_is_needed(listen: str) -> None:
    assert MetricsConfig(listen=listen).context() is None


@pytest.mark.parametrize(
    "listen", ["0.0.0.0:9464", "[::]:9464", "192.0.2.1:9464", "localhost:9464", "monitor.example:9464", "10.0.0.1:1"]
)
def test_on_any_other_address_tls_is_required(listen: str, pki: Pki) -> None:
    with pytest.raises(InvalidInput) as caught:
        MetricsConfig(listen=listen)
    assert caught.value.reason is Reason.INVALID_CONFIGURATION
    assert caught.value.message == (
        f"listen: {listen} is not an address of this machine alone (127.0.0.1, [::1]): "
        "cert, key and client_ca must be set"
    )
    assert MetricsConfig(listen=listen, **files(pki)).context() is not None


@pytest.mark.parametrize("left_out", ["cert", "key", "client_ca"])
@pytest.mark.parametrize("listen", ["127.0.0.1:0", "0.0.0.0:0"])
def test_half_of_tls_is_none(listen: str, left_out: str, pki: Pki) -> None:
    with pytest.raises(InvalidInput, match="cert, key and client_ca go together"):
        MetricsConfig(listen=listen, **files(pki, **{left_out: None}))


def test_the_loader_says_where_it_stands_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "some.toml"
    path.write_text('listen = "0.0.0.0:9464"\n')
    with pytest.raises(InvalidInput, match=r"some\.toml: listen: 0\.0\.0\.0:9464 is not an address of this machine"):
        configuration.load(path, MetricsConfig, {})
    path.write_text('listen = "nowhere"\n')
    with pytest.raises(InvalidInput, match=r"some\.toml: listen: 'nowhere' is not an address to listen on"):
        configuration.load(path, MetricsConfig, {})


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ("client_ca", "metrics.client_ca: {file}: holds no certificate authority in PEM form"),
        ("cert", "metrics.cert: {file}, {key}: are not a certificate and its key in PEM form"),
        ("key", "metrics.cert: {cert}, {file}: are not a certificate and its key in PEM form"),
    ],
)
@pytest.mark.parametrize("content", [None, b"", b"nothing of the kind"])
def test_a_file_that_cannot_be_used_is_named(
    wrong: str, sentence: str, content: bytes | None, pki: Pki, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    if content is not None:
        file.touch(mode=0o600)
        file.write_bytes(content)
    given = files(pki, **{wrong: file})
    with pytest.raises(InvalidInput) as caught:
        Endpoint(MetricsConfig(listen="127.0.0.1:0", **given), RecordingLog())
    expected = sentence.format(file=file, cert=given["cert"], key=given["key"])
    if wrong == "key" and content is None:
        expected = f"{file}: no such file or directory"
    assert caught.value.message == expected


def test_a_key_that_others_can_read_is_none(pki: Pki, tmp_path: Path) -> None:
    given = files(pki)
    open_key = tmp_path / "open.key"
    open_key.write_bytes(given["key"].read_bytes())
    open_key.chmod(0o644)
    with pytest.raises(InvalidInput, match=r"open\.key: can be used by others \(mode 0644\)"):
        MetricsConfig(listen="127.0.0.1:0", **files(pki, key=open_key)).context()


def test_without_the_extra_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.delitem(sys.modules, "common.telemetry.prometheus", raising=False)
    monkeypatch.delattr("common.telemetry.prometheus", raising=False)
    with pytest.raises(InvalidInput, match=r"metrics: needs the extra sevattest\[metrics\]") as caught:
        Endpoint(LOOPBACK, RecordingLog())
    assert caught.value.fields == {"hint": "pip install 'sevattest[metrics]'"}


async def test_a_port_that_is_taken_is_named() -> None:
    async with shown(LOOPBACK) as (_, address):
        second = Endpoint(MetricsConfig(listen=address), RecordingLog())
        with pytest.raises(InvalidInput, match=rf"metrics\.listen: cannot listen on {address}: the port is taken"):
            await second.start()


# What is answered.


async def test_the_page_is_shown_and_nothing_else_is_there() -> None:
    log = RecordingLog()
    async with shown(LOOPBACK, log) as (endpoint, address):
        endpoint.meter.add(ASKED, by=2)
        assert (await scrape(address)).of("asked_total") == 2
        assert (await fetch(address, target="/metrics?name=x"))[0] == 200
        assert (await fetch(address, target="/"))[0] == 404
        assert (await fetch(address, target="/metrics/../etc/passwd"))[0] == 404
        for method in ("HEAD", "POST", "DELETE", "get", "OPTIONS"):
            assert (await fetch(address, method=method))[0] == 405, method
        assert [event.fields for event in log.named("metrics.listening")] == [{"address": address, "tls": False}]
    assert len(log.events) == 1
    with pytest.raises(ConnectionRefusedError):
        await fetch(address)


async def test_over_ipv6_too() -> None:
    try:
        async with shown(MetricsConfig(listen="[::1]:0")) as (endpoint, address):
            endpoint.meter.add(ASKED)
            assert address.startswith("[::1]:")
            assert (await scrape(address)).of("asked_total") == 1
    except InvalidInput:
        pytest.skip("no IPv6 on loopback")


async def test_a_gauge_that_cannot_be_read_is_a_defect_and_the_next_request_is_answered() -> None:
    log = RecordingLog()
    async with shown(LOOPBACK, log) as (endpoint, address):
        endpoint.meter.watch(BROKEN, lambda: {(): 1 / 0})
        for _ in range(2):
            assert await fetch(address) == (500, "the service's log says why\n")
    assert [event.name for event in log.events] == ["metrics.listening", "metrics.defect", "metrics.defect"]


# TLS.


async def test_with_tls_who_has_a_certificate_of_the_ca_reads(pki: Pki) -> None:
    async with shown(MetricsConfig(listen="127.0.0.1:0", **files(pki))) as (endpoint, address):
        endpoint.meter.add(ASKED)
        context = client_context(pki.datacenter_ca, pki.issue(Role.ORCHESTRATOR, "prometheus"))
        assert (await scrape(address, context)).of("asked_total") == 1


def nobody(_pki: Pki) -> Pair | None:
    return None


def stranger(pki: Pki) -> Pair | None:
    return pki.forge(Role.ORCHESTRATOR, authority=pki.stranger())


def the_other_site(pki: Pki) -> Pair | None:
    return pki.issue(Role.OWNER)


def a_server(pki: Pki) -> Pair | None:
    return pki.issue(Role.AGENT, "no-client")


@pytest.mark.parametrize("who", [nobody, stranger, the_other_site, a_server])
async def test_with_tls_nobody_else_does(who: Any, pki: Pki) -> None:
    log = RecordingLog()
    async with shown(MetricsConfig(listen="127.0.0.1:0", **files(pki)), log) as (endpoint, address):
        endpoint.meter.add(ASKED)
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await scrape(address, client_context(pki.datacenter_ca, who(pki)))
        assert log.named("metrics.defect") == []
        # … and who does not speak TLS at all, or an older one.
        with pytest.raises((OSError, http.client.HTTPException)):
            await scrape(address)
        old = client_context(pki.datacenter_ca, pki.issue(Role.ORCHESTRATOR, "prometheus"))
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        with pytest.raises(ssl.SSLError):
            await scrape(address, old)


async def test_renewed_files_count_at_once_and_bad_ones_are_said(pki: Pki, tmp_path: Path) -> None:
    cert, key = tmp_path / "cert", tmp_path / "key"
    key.touch(mode=0o600)

    def put(pair: Pair) -> None:
        cert.write_bytes(pair.cert.read_bytes())
        key.write_bytes(pair.key.read_bytes())

    put(pki.issue(Role.AGENT, "metrics", ip=["127.0.0.1"]))
    config = MetricsConfig(listen="127.0.0.1:0", **files(pki, cert=cert, key=key))
    log, reader = RecordingLog(), client_context(pki.datacenter_ca, pki.issue(Role.ORCHESTRATOR, "prometheus"))
    elsewhere = client_context(pki.owner_ca, pki.issue(Role.ORCHESTRATOR, "prometheus"))
    async with shown(config, log) as (_, address):
        await scrape(address, reader)
        put(pki.issue(Role.VERIFIER, "metrics", ip=["127.0.0.1"]))
        await scrape(address, elsewhere)
        key.write_bytes(b"half copied")
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await scrape(address, elsewhere)
        (said,) = log.named("metrics.not_served")
        assert said.fields["text"].endswith("are not a certificate and its key in PEM form")
        put(pki.issue(Role.AGENT, "metrics", ip=["127.0.0.1"]))
        await scrape(address, reader)


# Peers that mean no good.


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 -- as cheap as it can be


@pytest.mark.parametrize("tls", [False, True])
async def test_who_says_nothing_costs_four_connections_however_many_are_opened(
    tls: bool,  # noqa: FBT001 -- a parameter of the test
    pki: Pki,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(under_test, "_PATIENCE", 3600.0)
    monkeypatch.setattr(under_test, "_INTERVAL", 0.0)
    config = MetricsConfig(listen="127.0.0.1:0", **(files(pki) if tls else {}))
    async with shown(config) as (endpoint, address):
        with ExitStack() as stack:
            idle = descriptors()
            opened = [silent(address, stack) for _ in range(60)]
            await until(lambda: len(endpoint._tasks) >= 5)
            # Each side of a connection that was accepted takes one; those that wait with the kernel only the peer's.
            for _ in range(20):
                await asyncio.sleep(0)
            assert (len(endpoint._tasks), descriptors() - idle - len(opened)) == (1 + 4, 4)
        await until(lambda: len(endpoint._tasks) == 1)


async def scraped_at_last(address: str, context: ssl.SSLContext | None) -> Page:
    """The page, asked for until it comes: an honest reader has no more time than the others."""
    async with asyncio.timeout(60):
        while True:
            with suppress(OSError, http.client.HTTPException):
                return await scrape(address, context)


@pytest.mark.parametrize("said", [b"", b"GET /metrics HTTP/1.1\r\nHost: x\r\n", b"\x16\x03\x01"])
@pytest.mark.parametrize("tls", [False, True])
async def test_whoever_is_slow_is_let_go_and_the_next_one_reads(
    tls: bool,  # noqa: FBT001 -- a parameter of the test
    said: bytes,
    pki: Pki,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(under_test, "_PATIENCE", 1.0)  # in which an honest one must have read
    config = MetricsConfig(listen="127.0.0.1:0", **(files(pki) if tls else {}))
    context = client_context(pki.datacenter_ca, pki.issue(Role.ORCHESTRATOR, "prometheus")) if tls else None
    async with shown(config) as (endpoint, address):
        endpoint.meter.add(ASKED)
        with ExitStack() as stack:
            for _ in range(8):
                silent(address, stack).sendall(said)
            assert (await scraped_at_last(address, context)).of("asked_total") == 1


async def test_a_request_without_an_end_is_cut_off() -> None:
    async with shown(LOOPBACK) as (endpoint, address):
        host, _, port = address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET /metrics HTTP/1.1\r\n" + b"x: y\r\n" * 5000)
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await reader.readexactly(1)
        writer.close()
        endpoint.meter.add(ASKED)
        assert (await scrape(address)).of("asked_total") == 1


async def test_a_peer_that_reads_nothing_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(under_test, "_PATIENCE", 0.2)

    async def long() -> bytes:
        return bytes(1 << 26)  # more than the kernel holds for a peer

    async with shown(LOOPBACK) as (endpoint, address):
        endpoint._page = long
        with ExitStack() as stack:
            deaf = silent(address, stack)
            deaf.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
            await until(lambda: len(endpoint._tasks) == 2)
            await until(lambda: len(endpoint._tasks) == 1)
