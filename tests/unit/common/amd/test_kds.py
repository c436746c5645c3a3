"""The key service's client against a loopback service that answers as AMD's does, and worse."""

from __future__ import annotations

import asyncio
import socket
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from common.amd.kds import MAX_REQUESTS, FolderKeyService, HttpKeyService, key_service
from common.errors import InvalidInput, NotFound, Reason, Unavailable
from common.sev.certs.sev import SevCertificate
from common.sev.certs.verify import attach_cek, verify_platform
from tests.support.chains import SyntheticPlatform, make_platform


@dataclass
class Answer:
    """What the fake service says once."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class FakeService:
    """A key service on loopback: CEKs by id, and answers to give before those."""

    url: str
    ceks: dict[str, bytes] = field(default_factory=dict)
    next: list[Answer] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)

    def add(self, platform: SyntheticPlatform) -> None:
        self.ceks[platform.chip_id.hex().upper()] = platform.chain.cek.raw

    def answer(self, path: str) -> Answer:
        self.paths.append(path)
        if self.next:
            return self.next.pop(0)
        prefix, _, name = path.rpartition("/")
        if prefix != "/cek/id" or name.upper() not in self.ceks:
            return Answer(404, b"<html>not found</html>")
        return Answer(200, self.ceks[name.upper()])


@pytest.fixture
def service() -> Iterator[FakeService]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer = fake.answer(self.path)
            self.send_response(answer.status)
            for name, value in ({"Content-Length": str(len(answer.body))} | answer.headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answer.body)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 -- the library's name
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # a client that hangs up early is part of some tests

    server = Server(("127.0.0.1", 0), Handler)
    fake = FakeService(url=f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield fake
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def platform() -> SyntheticPlatform:
    return make_platform()


class Pauses:
    """Takes the place of sleeping, and remembers what was asked for."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)


# --- the service -------------------------------------------------------------------------------------------------


async def test_the_signed_cek_completes_a_platforms_chain(service: FakeService, platform: SyntheticPlatform) -> None:
    service.add(platform)
    cek = await HttpKeyService(service.url).signed_cek(platform.chip_id)
    verify_platform(attach_cek(platform.unsigned_chain, cek), [platform.root])
    assert service.paths == [f"/cek/id/{platform.chip_id.hex().upper()}"]


@pytest.mark.parametrize("suffix", ["", "/", "/cek/id", "/cek/id/"])
async def test_the_address_may_end_as_people_write_it(
    service: FakeService, platform: SyntheticPlatform, suffix: str
) -> None:
    service.add(platform)
    assert await HttpKeyService(service.url + suffix).signed_cek(platform.chip_id) == platform.chain.cek


@pytest.mark.parametrize("status", [400, 404])
async def test_an_unknown_chip_is_not_found(service: FakeService, platform: SyntheticPlatform, status: int) -> None:
    service.next.append(Answer(status, b"Bad Request"))
    with pytest.raises(NotFound, match="does not know this chip"):
        await HttpKeyService(service.url).signed_cek(platform.chip_id)


async def test_a_busy_service_is_asked_again_after_its_own_pause(
    service: FakeService, platform: SyntheticPlatform
) -> None:
    service.add(platform)
    service.next += [Answer(429, headers={"Retry-After": "7"}), Answer(429)]
    pauses = Pauses()
    assert await HttpKeyService(service.url, sleep=pauses).signed_cek(platform.chip_id) == platform.chain.cek
    assert pauses.seconds == [7.0, 5.0]
    assert len(service.paths) == 3


async def test_a_service_that_stays_busy_is_unavailable(service: FakeService, platform: SyntheticPlatform) -> None:
    # The last answer of a busy service is never taken for a certificate, whatever its body holds.
    service.next += [Answer(429, platform.chain.cek.raw, {"Retry-After": "1"}) for _ in range(3)]
    pauses = Pauses()
    with pytest.raises(Unavailable, match="asks to come back later") as refused:
        await HttpKeyService(service.url, sleep=pauses).signed_cek(platform.chip_id)
    assert refused.value.reason is Reason.KEY_SERVICE_UNAVAILABLE
    assert pauses.seconds == [1.0, 1.0]
    assert len(service.paths) == 3


async def test_a_pause_longer_than_a_call_is_reported_and_not_waited_for(
    service: FakeService, platform: SyntheticPlatform
) -> None:
    service.next.append(Answer(429, headers={"Retry-After": "3600"}))
    pauses = Pauses()
    with pytest.raises(Unavailable) as refused:
        await HttpKeyService(service.url, sleep=pauses).signed_cek(platform.chip_id)
    assert refused.value.fields == {"retry_after": "3600"}
    assert pauses.seconds == []


@pytest.mark.parametrize(
    ("text", "seconds"), [("0", 1.0), ("-5", 5.0), ("soon", 5.0), ("Wed, 21 Oct 2037 07:28:00 GMT", 5.0), ("²", 5.0)]
)
async def test_an_odd_retry_after_still_gives_a_pause(
    service: FakeService, platform: SyntheticPlatform, text: str, seconds: float
) -> None:
    service.add(platform)
    service.next.append(Answer(429, headers={"Retry-After": text}))
    pauses = Pauses()
    await HttpKeyService(service.url, sleep=pauses).signed_cek(platform.chip_id)
    assert pauses.seconds == [seconds]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_is_refused(service: FakeService, platform: SyntheticPlatform, status: int) -> None:
    service.add(platform)
    service.next.append(Answer(status, headers={"Location": f"/cek/id/{platform.chip_id.hex()}"}))
    with pytest.raises(Unavailable, match=f"HTTP status {status}"):
        await HttpKeyService(service.url).signed_cek(platform.chip_id)
    assert len(service.paths) == 1


@pytest.mark.parametrize("status", [401, 403, 418, 500, 502, 503])
async def test_other_answers_are_unavailable(service: FakeService, platform: SyntheticPlatform, status: int) -> None:
    service.next.append(Answer(status, platform.chain.cek.raw))
    with pytest.raises(Unavailable, match=f"HTTP status {status}"):
        await HttpKeyService(service.url).signed_cek(platform.chip_id)


async def test_what_is_no_signed_cek_is_unavailable(service: FakeService, platform: SyntheticPlatform) -> None:
    cek = platform.chain.cek.raw
    for body, sentence in (
        (b"", "no CEK"),
        (b"<!DOCTYPE html><html><body>Request rejected</body></html>", "no CEK"),
        (cek[:-1], "no CEK"),
        (cek + b"\0", "no CEK"),
        (bytes(50_000_000), "no CEK"),
        (bytes(2084), "no CEK"),
        (platform.chain.pek.raw, "is a PEK, not a CEK"),
        (platform.unsigned_chain.cek.raw, "carries no signature"),
    ):
        service.next.append(Answer(200, body))
        with pytest.raises(Unavailable, match=sentence):
            await HttpKeyService(service.url).signed_cek(platform.chip_id)


async def test_an_answer_that_breaks_off_is_unavailable(service: FakeService, platform: SyntheticPlatform) -> None:
    service.next.append(Answer(200, platform.chain.cek.raw[:100], {"Content-Length": "2084"}))
    with pytest.raises(Unavailable):
        await HttpKeyService(service.url, timeout=1).signed_cek(platform.chip_id)


async def test_a_service_that_is_not_there_is_unavailable(platform: SyntheticPlatform) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(Unavailable, match=r"127\.0\.0\.1:\d+ cannot be reached"):
        await HttpKeyService(f"http://127.0.0.1:{port}").signed_cek(platform.chip_id)


async def test_a_service_that_says_nothing_is_given_up(platform: SyntheticPlatform) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(Unavailable):
            await HttpKeyService(url, timeout=0.05).signed_cek(platform.chip_id)


def test_a_service_that_trickles_holds_up_neither_other_work_nor_the_end() -> None:
    ended = threading.Event()

    def trickle(listener: socket.socket) -> None:
        # One byte at a time: no single wait on the network is ever long.
        peers = []
        with suppress(OSError):
            while True:
                peers.append(listener.accept()[0])
                peers[-1].sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2084\r\n\r\n")
                threading.Thread(target=drip, args=(peers[-1],)).start()

    def drip(peer: socket.socket) -> None:
        with suppress(OSError), peer:
            while not ended.wait(0.02):
                peer.sendall(b"x")

    async def ask(url: str) -> None:
        client = HttpKeyService(url, timeout=0.1)
        more = MAX_REQUESTS + 2
        answers = await asyncio.gather(
            *(client.signed_cek(bytes([number]) * 64) for number in range(more)), return_exceptions=True
        )
        assert [type(answer) for answer in answers] == [Unavailable] * more
        assert await asyncio.to_thread(str, "other work") == "other work"

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=trickle, args=(listener,), daemon=True).start()
        began = time.monotonic()
        asyncio.run(ask(f"http://127.0.0.1:{listener.getsockname()[1]}"))
        assert time.monotonic() - began < 30
        ended.set()


async def test_a_system_without_threads_is_no_answer_and_costs_no_later_one(
    service: FakeService, platform: SyntheticPlatform, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.add(platform)
    client = HttpKeyService(service.url, timeout=20)
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "key-service":
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        for _ in range(MAX_REQUESTS):
            with pytest.raises(Unavailable, match="no thread") as failure:
                await client.signed_cek(platform.chip_id)
            assert failure.value.reason is Reason.KEY_SERVICE_UNAVAILABLE
    assert await client.signed_cek(platform.chip_id) == platform.chain.cek


async def test_of_an_answer_without_end_no_more_is_read_than_a_cek_and_a_byte(platform: SyntheticPlatform) -> None:
    taken = 0

    async def pour(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal taken
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        with suppress(ConnectionError):
            while taken < 1 << 26:
                writer.write(bytes(1 << 16))
                await writer.drain()
                taken += 1 << 16
        writer.close()

    async with await asyncio.start_server(pour, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        with pytest.raises(Unavailable, match="something that is no CEK"):
            await HttpKeyService(f"http://{host}:{port}").signed_cek(platform.chip_id)
    assert taken < 1 << 24  # what two sockets hold, and not the answer


async def test_a_service_that_speaks_no_http_is_unavailable(platform: SyntheticPlatform) -> None:
    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"220 mail.example ESMTP\r\n")
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(speak, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        with pytest.raises(Unavailable):
            await HttpKeyService(url).signed_cek(platform.chip_id)


@pytest.mark.parametrize("size", [0, 63, 65, 128])
async def test_an_id_of_another_size_is_refused_before_anything_is_asked(service: FakeService, size: int) -> None:
    with pytest.raises(InvalidInput, match=f"64 bytes, not {size}"):
        await HttpKeyService(service.url).signed_cek(bytes(size))
    assert service.paths == []


async def test_no_message_names_the_chip(service: FakeService, platform: SyntheticPlatform, tmp_path: Path) -> None:
    for source in (service.url, str(tmp_path)):
        with pytest.raises(NotFound) as refused:
            await key_service(source).signed_cek(platform.chip_id)
        shown = f"{refused.value} {refused.value.fields}".upper()
        assert platform.chip_id.hex().upper()[:16] not in shown


@pytest.mark.parametrize(
    "url",
    [
        "ftp://127.0.0.1/",
        "file:///etc/passwd",
        "http://",
        "https:///cek",
        "http://user:pw@127.0.0.1",
        "http://a/?b=c",
        "http://a:99999",
        "http://a:x",
        "http://[::1",
        "http://a b/",
        "http://é/",
        "http://a\n/",
    ],
)
def test_an_address_of_another_kind_is_refused(url: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        HttpKeyService(url)
    assert "pw" not in refused.value.message


# --- the cache ---------------------------------------------------------------------------------------------------


async def test_a_cek_that_leads_to_a_trusted_root_is_fetched_once_for_ever(
    service: FakeService, platform: SyntheticPlatform, tmp_path: Path
) -> None:
    service.add(platform)
    cache = tmp_path / "state" / "ceks"
    first = await HttpKeyService(service.url, cache, roots=[platform.root]).signed_cek(platform.chip_id)
    # Another process, later, with the service gone.
    service.ceks.clear()
    service.next.append(Answer(500))
    again = await HttpKeyService(service.url, cache, roots=[platform.root]).signed_cek(platform.chip_id)
    assert again == first == platform.chain.cek
    assert len(service.paths) == 1
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert [file.name for file in cache.iterdir()] == [f"{platform.chip_id.hex().upper()}.cert"]


async def test_a_cek_of_an_untrusted_root_is_never_kept(
    service: FakeService, platform: SyntheticPlatform, tmp_path: Path
) -> None:
    service.add(platform)
    client = HttpKeyService(service.url, tmp_path / "ceks")
    for _ in range(2):
        assert await client.signed_cek(platform.chip_id) == platform.chain.cek
    assert len(service.paths) == 2
    assert not (tmp_path / "ceks").exists()


@pytest.mark.parametrize("damage", ["empty", "cut", "foreign", "unsigned", "folder"])
async def test_a_damaged_cache_entry_is_fetched_again(
    service: FakeService, platform: SyntheticPlatform, tmp_path: Path, damage: str
) -> None:
    service.add(platform)
    file = tmp_path / f"{platform.chip_id.hex().upper()}.cert"
    cek = platform.chain.cek
    forged = SevCertificate.parse(cek.raw[:1060] + bytes([cek.raw[1060] ^ 1]) + cek.raw[1061:])
    if damage == "folder":
        file.mkdir()
    else:
        contents = {"empty": b"", "cut": cek.raw[:-1], "foreign": forged.raw, "unsigned": cek.raw[:1044] + bytes(1040)}
        file.write_bytes(contents[damage])
    client = HttpKeyService(service.url, tmp_path, roots=[platform.root])
    assert await client.signed_cek(platform.chip_id) == cek
    assert len(service.paths) == 1
    if damage != "folder":
        assert file.read_bytes() == cek.raw


async def test_many_launches_on_one_chip_ask_once(
    service: FakeService, platform: SyntheticPlatform, tmp_path: Path
) -> None:
    service.add(platform)
    client = HttpKeyService(service.url, tmp_path, roots=[platform.root])
    answers = await asyncio.gather(*(client.signed_cek(platform.chip_id) for _ in range(20)))
    assert {answer.raw for answer in answers} == {platform.chain.cek.raw}
    assert len(service.paths) == 1


async def test_a_cache_that_cannot_be_written_costs_no_launch(
    service: FakeService, platform: SyntheticPlatform, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    service.add(platform)
    (tmp_path / "file").write_bytes(b"in the way")
    client = HttpKeyService(service.url, tmp_path / "file" / "ceks", roots=[platform.root])
    assert await client.signed_cek(platform.chip_id) == platform.chain.cek
    assert "could not be kept" in caplog.text
    assert platform.chip_id.hex().upper() not in caplog.text.upper()


# --- the folder --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("upper", [True, False])
async def test_a_folder_answers_without_a_network(tmp_path: Path, platform: SyntheticPlatform, *, upper: bool) -> None:
    name = platform.chip_id.hex()
    (tmp_path / f"{name.upper() if upper else name}.cert").write_bytes(platform.chain.cek.raw)
    service = key_service(str(tmp_path))
    assert isinstance(service, FolderKeyService)
    assert await service.signed_cek(platform.chip_id) == platform.chain.cek


async def test_a_folder_without_the_chip_says_so(tmp_path: Path, platform: SyntheticPlatform) -> None:
    with pytest.raises(NotFound):
        await FolderKeyService(tmp_path).signed_cek(platform.chip_id)
    with pytest.raises(NotFound):
        await FolderKeyService(tmp_path).signed_copy_of(platform.chain.cek)


async def test_a_folder_that_is_not_there_knows_nothing_about_any_chip(
    tmp_path: Path, platform: SyntheticPlatform
) -> None:
    # Not mounted yet, perhaps. "This chip is unknown" would be an answer, and a deny-list would build on it.
    (tmp_path / "file").touch()
    for absent in ("absent", "file"):
        with pytest.raises(Unavailable, match=f"there is no folder .*/{absent}|/{absent} cannot be read"):
            await FolderKeyService(tmp_path / absent).signed_cek(platform.chip_id)
        with pytest.raises(Unavailable, match=f"there is no folder .*/{absent}|/{absent} cannot be read"):
            await FolderKeyService(tmp_path / absent).signed_copy_of(platform.chain.cek)


async def test_a_folder_with_something_else_under_the_name_is_unavailable(
    tmp_path: Path, platform: SyntheticPlatform
) -> None:
    file = tmp_path / f"{platform.chip_id.hex().upper()}.cert"
    for content in (b"", b"<html>", platform.chain.oca.raw, platform.unsigned_chain.cek.raw, bytes(5_000_000)):
        file.write_bytes(content)
        with pytest.raises(Unavailable):
            await FolderKeyService(tmp_path).signed_cek(platform.chip_id)
    file.unlink()
    file.mkdir()
    with pytest.raises(Unavailable, match="cannot be read"):
        await FolderKeyService(tmp_path).signed_cek(platform.chip_id)


async def test_a_folder_finds_the_signed_copy_of_a_cek_without_its_id(
    tmp_path: Path, platform: SyntheticPlatform
) -> None:
    (tmp_path / "a.cert").write_bytes(b"")
    (tmp_path / "b.cert").mkdir()
    (tmp_path / "c.cert").write_bytes(make_platform().chain.cek.raw)
    (tmp_path / "d.cert").write_bytes(platform.unsigned_chain.cek.raw)
    (tmp_path / "e.cert").write_bytes(platform.chain.cek.raw)
    assert await FolderKeyService(tmp_path).signed_copy_of(platform.unsigned_chain.cek) == platform.chain.cek


def test_a_source_is_an_address_or_a_folder(tmp_path: Path) -> None:
    assert isinstance(key_service("https://kdsintf.amd.com"), HttpKeyService)
    assert isinstance(key_service("http://127.0.0.1:8080/"), HttpKeyService)
    assert isinstance(key_service(str(tmp_path)), FolderKeyService)
    with pytest.raises(InvalidInput, match="key service's address"):
        key_service("ldap://directory.example")
