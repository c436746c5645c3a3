"""A way to a PostgreSQL that can stand still: sessions are accepted and logged in, and then nothing is answered.

What a stopped process, a disk that hangs or a pooler without its server looks like to whoever connects. Nothing of what
is said while it stands still reaches the server later: a session that stood still once is of no use any more.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from verifier.store import postgres_link
from verifier.store.postgres_engine import PostgresEngine
from verifier.store.sql_store import SqlStore

SOON_S = 0.2
_SOCKET = ".s.PGSQL.5432"  # libpq's name
_READY = b"Z\0\0\0\5I"  # what a login ends with: ReadyForQuery, in no transaction
_CANCEL = (80877102).to_bytes(4, "big")  # in place of the protocol's version: CancelRequest
_CHUNK = 1 << 16


class Relay:
    """Between clients and a server, on Unix sockets.

    Attributes:
        still: whether it stands still: sessions that are open hang, and new ones once they are logged in.
        still_at: words in what a client says with which it begins to stand still; they do not reach the server.
        on_still: called when it begins to stand still.
        logins: how many sessions were logged in.
        cancels: how many requests came, on connections of their own, to cancel a statement.
    """

    def __init__(self, server: Path) -> None:
        """Take the folder of the server's socket."""
        self._server = server / _SOCKET
        self.still = False
        self.still_at: bytes | None = None
        self.on_still: Callable[[], None] = lambda: None
        self.logins = 0
        self.cancels = 0
        self._serving: set[asyncio.Task[None]] = set()

    def stand_still(self) -> None:
        """Answer nothing any more."""
        self.still, self.still_at = True, None
        self.on_still()

    def take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve a connection until either side ends it."""
        serving = asyncio.create_task(self._serve(reader, writer))
        self._serving.add(serving)
        serving.add_done_callback(self._serving.discard)

    async def end(self) -> None:
        """End all connections."""
        for serving in (all_of_them := set(self._serving)):
            serving.cancel()
        await asyncio.gather(*all_of_them, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_unix_connection(self._server)
        try:
            startup = await reader.read(_CHUNK)
            if startup[4:8] == _CANCEL:
                self.cancels += 1
            ways = [
                asyncio.create_task(self._say(startup, reader, back)),
                asyncio.create_task(self._answer(there, writer)),
            ]
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
        finally:
            for end in (back, writer):
                end.close()
                with suppress(OSError):
                    await end.wait_closed()

    async def _say(self, startup: bytes, reader: asyncio.StreamReader, server: asyncio.StreamWriter) -> None:
        said, heard = startup, startup[4:8] != _CANCEL or not self.still
        while said:
            if heard:
                server.write(said)
                await server.drain()
            said = await reader.read(_CHUNK)
            if self.still_at is not None and self.still_at in said:
                self.stand_still()
            heard = heard and not self.still

    async def _answer(self, server: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        logged_in = False
        while said := await server.read(_CHUNK):
            if logged_in and self.still:
                continue
            writer.write(said)
            await writer.drain()
            if not logged_in and said.endswith(_READY):
                logged_in = True
                self.logins += 1
        if self.still:  # whoever stands still ends no session either
            await asyncio.get_running_loop().create_future()


@asynccontextmanager
async def relay_to(server: Path, folder: Path) -> AsyncIterator[Relay]:
    """A relay to the server with this folder; clients name the other one, whose path is short, as `host`."""
    relay = Relay(server)
    listening = await asyncio.start_unix_server(relay.take, folder / _SOCKET)
    try:
        yield relay
    finally:
        listening.close()
        await relay.end()


def hasten(monkeypatch: pytest.MonkeyPatch, *stores: SqlStore) -> None:
    """Let stores give up soon what does not answer; not before it stands still, or a machine that is slow would do."""
    monkeypatch.setattr(postgres_link, "ANSWER_S", SOON_S)
    for store in stores:
        engine = store._engine
        assert isinstance(engine, PostgresEngine)
        for session in (engine._writer, *engine._readers):
            link = session._link
            if link is not None and link._watch is not None:
                link._watch.cancel()
                link._look()
