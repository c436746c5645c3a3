"""The platform's stand-in for AMD's key service: `GET /cek/id/{ID}` from the `kds` folder, over plain HTTP.

ID is 128 hex digits in either case (sevctl sends upper case, sev-tool lower case). A malformed id is 400, an unknown
one 404. With `resign`, each answer for this platform's own chip carries a fresh RSA-PSS signature, as AMD's answers do.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from http import HTTPStatus
from pathlib import Path

from common.sev.abi import CHIP_ID_SIZE
from emulator.keys import Chip

_REQUEST_MAX = 8192  # bytes of a request's head; ours has under 300
_READ_TIMEOUT = 10.0  # seconds for a request's head
_PATH = re.compile(rf"/cek/id/([0-9A-Fa-f]{{{2 * CHIP_ID_SIZE}}})")


class KeyService:
    """One listening key service."""

    def __init__(self, folder: Path, *, resign: Chip | None = None) -> None:
        self._folder = folder
        self._resign = resign
        self._server: asyncio.Server | None = None

    async def start(self, host: str, port: int) -> str:
        """Listen on `host`, port 0 for any free one; returns the service's URL."""
        self._server = await asyncio.start_server(self._serve, host, port, limit=_REQUEST_MAX)
        address = self._server.sockets[0].getsockname()
        shown = f"[{address[0]}]" if ":" in address[0] else address[0]
        return f"http://{shown}:{address[1]}"

    async def stop(self) -> None:
        """Stop listening; a request that is being answered ends with the event loop."""
        if self._server is not None:
            # Not waiting for it to be closed: from Python 3.12 on that waits for every client that says nothing.
            self._server.close()
            self._server = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_READ_TIMEOUT):
                head = await reader.readuntil(b"\r\n\r\n")
            status, body = self._answer(head)
            writer.write(_response(status, body))
            await writer.drain()
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, TimeoutError, ConnectionError):
            pass  # no request, no answer
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    def _answer(self, head: bytes) -> tuple[HTTPStatus, bytes]:
        words = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ")
        if len(words) != 3 or not words[2].startswith("HTTP/1."):
            return HTTPStatus.BAD_REQUEST, b""
        if words[0] != "GET":
            return HTTPStatus.METHOD_NOT_ALLOWED, b""
        found = _PATH.fullmatch(words[1])
        if found is None:
            return HTTPStatus.BAD_REQUEST, b""
        chip_id = bytes.fromhex(found[1])
        if self._resign is not None and chip_id == self._resign.chip_id:
            return HTTPStatus.OK, self._resign.signed_cek().raw
        try:
            return HTTPStatus.OK, (self._folder / f"{chip_id.hex().upper()}.cert").read_bytes()
        except FileNotFoundError:
            return HTTPStatus.NOT_FOUND, b""


def _response(status: HTTPStatus, body: bytes) -> bytes:
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\n"
        "Content-Type: application/octet-stream\r\n"
        f"Content-Length: {len(body)}\r\n"
        "Connection: close\r\n\r\n"
    )
    return head.encode("ascii") + body
