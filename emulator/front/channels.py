"""Opens the devices of `channel_spec` and hands over one client after the other.

A server takes one client at a time: a second one's connect() succeeds and hears nothing until the first one leaves, as
with QEMU, whose listen backlog is one. A channel that goes to its peer is a client of that one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import AsyncGenerator
from typing import NamedTuple

from emulator.errors import MachineDied
from emulator.front.channel_spec import ChannelSpec, Kind
from emulator.qemu_words import complain

_LINE_LIMIT = 1 << 20
_SOCKET_PATH_MAX = 107
_CHUNK = 1 << 16
_LAST_WORDS = 2.0  # seconds for whoever reads standard output to take what is left


class Client(NamedTuple):
    """Whoever speaks QMP to a monitor."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter


class Channel:
    """One device, opened; closing it removes the socket that it made.

    Attributes:
        spec: what it is.
        reached: set when the first client is there.
    """

    def __init__(self, spec: ChannelSpec) -> None:
        """Open it.

        Raises:
            MachineDied: with QEMU's words.
        """
        self.spec = spec
        self.reached = asyncio.Event()
        self._made: str | None = None
        self._first: socket.socket | None = None
        self._last_words: threading.Thread | None = None
        self._listener = self._listen() if spec.server and spec.kind is not Kind.STDIO else None
        if not spec.server and spec.reconnect is None:
            self._first = self._reach()
        if spec.wait:
            where = f"disconnected:{spec.kind}:{spec.address},server=on"
            complain(f"{spec.option}: info: QEMU waiting for connection on: {where}")

    async def clients(self) -> AsyncGenerator[Client]:
        """Every client, each after the one before it has gone; ends when there can be no more."""
        while True:
            connection = await self._next()
            reader, writer = await asyncio.open_connection(sock=connection, limit=_LINE_LIMIT)
            self.reached.set()
            try:
                yield Client(reader, writer)
            finally:
                writer.close()
            if self._listener is None and self.spec.reconnect is None:
                return

    def close(self) -> None:
        """Close it, once the last client is gone."""
        if self._last_words is not None:
            self._last_words.join(_LAST_WORDS)
        for opened in (self._listener, self._first):
            if opened is not None:
                opened.close()
        if self._made is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._made)  # noqa: PTH108 -- a socket's address, which need not be a path

    async def _next(self) -> socket.socket:
        spec = self.spec
        if spec.kind is Kind.STDIO:
            connection, self._last_words = _standard_streams()
            return connection
        if self._listener is not None:
            return (await asyncio.get_running_loop().sock_accept(self._listener))[0]
        if self._first is not None:
            first, self._first = self._first, None
            return first
        while True:
            connection, address = _socket_for(spec)
            try:
                await asyncio.get_running_loop().sock_connect(connection, address)
            except OSError:
                connection.close()
                await asyncio.sleep(spec.reconnect or 0)
            else:
                return connection

    def _reach(self) -> socket.socket:
        """The peer, which must be there."""
        spec = self.spec
        if spec.kind is Kind.FD:
            return _inherited(spec)
        connection, address = _socket_for(spec)
        try:
            connection.settimeout(None)
            connection.connect(address)
        except OSError as error:
            connection.close()
            raise MachineDied(f"{spec.option}: Failed to connect to '{spec.address}': {error.strerror}") from error
        connection.settimeout(0)
        return connection

    def _listen(self) -> socket.socket:
        if self.spec.kind is Kind.FD:
            listener = _inherited(self.spec)
        else:
            listener, address = _socket_for(self.spec)
            try:
                self._bind(listener, address)
            except BaseException:
                listener.close()
                raise
        listener.listen(1)
        return listener

    def _bind(self, listener: socket.socket, address: tuple[str, int] | str) -> None:
        option = self.spec.option
        if not isinstance(address, str):
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind(address)
            except OSError as error:
                raise MachineDied(f"{option}: Failed to find an available port: {error.strerror}") from error
            return
        if len(os.fsencode(address)) > _SOCKET_PATH_MAX:
            hint = "Path must be less than 108 bytes"
            raise MachineDied(f"{option}: UNIX socket path '{address}' is too long\n{hint}")
        try:
            with contextlib.suppress(FileNotFoundError, ValueError):  # ValueError: an abstract address
                os.unlink(address)  # noqa: PTH108 -- as QEMU does
        except OSError as error:
            raise MachineDied(f"{option}: Failed to unlink socket {address}: {error.strerror}") from error
        try:
            listener.bind(address)
        except OSError as error:
            raise MachineDied(f"{option}: Failed to bind socket to {address}: {error.strerror}") from error
        if not address.startswith("\0"):
            self._made = os.path.abspath(address)  # noqa: PTH100 -- before anybody changes the directory


def _socket_for(spec: ChannelSpec) -> tuple[socket.socket, tuple[str, int] | str]:
    """A socket of the right family, and the address to bind or to connect it to."""
    if spec.kind is Kind.UNIX:
        family, address = socket.AF_UNIX, spec.address
        connection = socket.socket(family, socket.SOCK_STREAM)
        connection.settimeout(0)
        return connection, address
    host, _, port = spec.address.rpartition(":")
    host = host.strip("[]")
    if not port.isdecimal() or int(port) > 0xFFFF:
        raise MachineDied(f"{spec.option}: address resolution failed for {spec.address}")
    connection = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    connection.settimeout(0)
    return connection, (host, int(port))


def _inherited(spec: ChannelSpec) -> socket.socket:
    try:
        connection = socket.socket(fileno=int(spec.address))
    except (OSError, ValueError) as error:
        raise MachineDied(f"{spec.option}: File descriptor '{spec.address}' is not a socket") from error
    connection.settimeout(0)
    return connection


def _standard_streams() -> tuple[socket.socket, threading.Thread]:
    """One end of a pair whose other end is standard input and output, whatever kind of file they are.

    The thread ends when all that was written before the end was closed is on standard output.
    """
    ours, theirs = socket.socketpair()
    ours.settimeout(0)

    def pump_in() -> None:
        with contextlib.suppress(OSError):
            while data := os.read(0, _CHUNK):
                theirs.sendall(data)
            theirs.shutdown(socket.SHUT_WR)

    def pump_out() -> None:
        with contextlib.suppress(OSError):
            while data := theirs.recv(_CHUNK):
                while data:
                    data = data[os.write(1, data) :]

    pumps = [threading.Thread(target=pump, daemon=True) for pump in (pump_in, pump_out)]
    for pump in pumps:
        pump.start()
    return ours, pumps[1]
