"""A Vault on a loopback port, as far as reading from the key-value engine goes, and every way of not answering.

It speaks HTTPS with a certificate of the test's choice, knows one token and one namespace, keeps versions, and answers
a deleted one as Vault does (404 with its metadata). `answers` puts something else in the next answers' place.
"""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.support.pki import Pair


class FakeVault(ThreadingHTTPServer):
    """The server.

    Attributes:
        token: the only one that it knows.
        namespace: the one that requests must name; None for none.
        secrets: versions from 1 by mount and path; None for a deleted one.
        answers: writes the answer in place of the engine, where a test sets it.
        heard: method, path and token of each request.
        leaving: set when the server goes; whoever keeps a client waiting waits for it.
    """

    daemon_threads = True

    def __init__(self, pair: Pair | None, token: str, namespace: str | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.token = token
        self.namespace = namespace
        self.secrets: dict[tuple[str, str], list[dict[str, Any] | None]] = {}
        self.answers: Callable[[BaseHTTPRequestHandler], None] | None = None
        self.heard: list[tuple[str, str, str | None]] = []
        self.leaving = threading.Event()
        if pair is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(pair.cert, pair.key)
            # The handshake is the handler's, in a thread of its own.
            self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"https://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients that go away are what tests are about."""


class _Handler(BaseHTTPRequestHandler):
    server: FakeVault

    def do_GET(self) -> None:
        vault = self.server
        token = self.headers.get("X-Vault-Token")
        vault.heard.append((self.command, self.path, token))
        if vault.answers is not None:
            vault.answers(self)
        elif token != vault.token or self.headers.get("X-Vault-Namespace") != vault.namespace:
            say(self, 403, {"errors": ["permission denied"]})
        else:
            say(self, *self._engine())

    def _engine(self) -> tuple[int, Any]:
        url = urlsplit(self.path)
        mount, _, path = unquote(url.path).removeprefix("/v1/").partition("/data/")
        versions = self.server.secrets.get((mount, path), [])
        number = int(parse_qs(url.query).get("version", ["0"])[0]) or len(versions)
        if not 0 < number <= len(versions):
            return 404, {"errors": []}
        data = versions[number - 1]
        deleted = "" if data is not None else "2026-03-01T12:00:00.000000Z"
        metadata = {"created_time": "2026-02-01T12:00:00Z", "deletion_time": deleted, "destroyed": False}
        inner = {"data": data, "metadata": {**metadata, "custom_metadata": None, "version": number}}
        return (404 if data is None else 200), {"request_id": "x", "lease_duration": 0, "data": inner, "auth": None}

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 -- the base class's name
        pass


def say(handler: BaseHTTPRequestHandler, status: int, body: Any, **headers: str) -> None:
    """Answer with a status and a body: JSON, or bytes as they are."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    handler.send_response(status)
    for name, value in {"Content_Type": "application/json", **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Content-Length", str(len(raw)))
    handler.end_headers()
    handler.wfile.write(raw)


def say_nothing(handler: BaseHTTPRequestHandler) -> None:
    """Keep the client waiting for a first byte."""
    server = handler.server
    assert isinstance(server, FakeVault)
    server.leaving.wait(60)


def say_slowly(handler: BaseHTTPRequestHandler) -> None:
    """Answer byte by byte, each one in time, without an end."""
    server = handler.server
    assert isinstance(server, FakeVault)
    _begin(handler)
    with suppress(OSError):
        while not server.leaving.wait(0.02):
            handler.wfile.write(b" ")


def say_without_end(handler: BaseHTTPRequestHandler) -> None:
    """Answer as fast as the client reads, without an end."""
    _begin(handler)
    with suppress(OSError):
        while True:
            handler.wfile.write(bytes(1 << 16))


def say_half(handler: BaseHTTPRequestHandler) -> None:
    """Answer with less than was promised, and go."""
    handler.send_response(200)
    handler.send_header("Content-Length", "100")
    handler.end_headers()
    handler.wfile.write(b"{")
    handler.close_connection = True


def _begin(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.end_headers()


@contextmanager
def fake_vault(pair: Pair | None, token: str, namespace: str | None = None) -> Iterator[FakeVault]:
    """A server that is gone afterwards; without a pair it speaks HTTP in clear."""
    server = FakeVault(pair, token, namespace)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.leaving.set()
        server.shutdown()
        thread.join()
        server.server_close()


def write_token(path: Path, token: str) -> Path:
    """A token's file, for its owner alone."""
    path.touch(mode=0o600)
    path.write_text(token + "\n")
    return path
