"""Serves the driver on a unix stream socket: frames in, frames out, one request at a time a connection.

A peer can do nothing to the server or to other connections: lengths are checked before anything is read, half frames
wait in their own task, and a connection that breaks the framing is closed after it was told so.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import stat
import sys
from pathlib import Path
from typing import TextIO

from common.sev.abi import NO_FIRMWARE_CALL, DeviceCommand, Status
from emulator import protocol
from emulator.driver import Descriptor, Driver, Reply
from emulator.errors import KernelRefused, StateFolderUnusable
from emulator.faults import Faults
from emulator.protocol import GuestRequest

# More than one host's agent and machines ever hold; a peer that opens connections in a loop meets this.
MAX_CONNECTIONS = 512


class DeviceServer:
    """The device socket of one platform."""

    def __init__(
        self, driver: Driver, path: Path, *, faults: Faults | None = None, trace: TextIO | None = None
    ) -> None:
        self._driver = driver
        self._path = path
        self._faults = faults or Faults()
        self._trace = trace
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._count = 0

    async def start(self) -> None:
        """Listen. A stale socket file is replaced.

        Raises:
            StateFolderUnusable: something answers on the socket already, or the path is no socket.
        """
        _clear_the_way(self._path)
        listener = _private_listener(self._path)
        # Linux refuses (EAGAIN) whom the backlog has no room for, however patient the client.
        self._server = await asyncio.start_unix_server(
            self._serve, sock=listener, limit=protocol.MAX_PAYLOAD, backlog=MAX_CONNECTIONS
        )

    async def stop(self) -> None:
        """Close every connection, which ends its guest, and remove the socket."""
        if self._server is None:
            return
        self._server.close()
        for task in tuple(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        await self._server.wait_closed()
        self._server = None
        self._path.unlink(missing_ok=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is None or len(self._connections) >= MAX_CONNECTIONS:
            writer.close()
            return
        self._connections.add(task)
        self._count += 1
        try:
            await _Connection(self._driver, self._faults, self._tracer(self._count)).run(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the peer went away, between frames or within one
        except asyncio.CancelledError:
            # `stop` did this; the stream's own callback would report a cancelled task as an error.
            pass
        finally:
            self._connections.discard(task)
            writer.close()
            with contextlib.suppress(ConnectionError, asyncio.CancelledError):
                await writer.wait_closed()

    def _tracer(self, number: int) -> _Tracer:
        return _Tracer(self._trace, number)


class _Tracer:
    """One line a command, without payloads."""

    def __init__(self, stream: TextIO | None, connection: int) -> None:
        self._stream = stream
        self._connection = connection

    def __call__(self, command: int, reply: Reply) -> None:
        if self._stream is None:
            return
        status = "-" if reply.status == NO_FIRMWARE_CALL else _name(Status, reply.status)
        what = "OPEN" if command == protocol.OPEN else _name(GuestRequest, command, _name(DeviceCommand, command))
        line = f"connection {self._connection}: {what} errno {reply.errno} status {status}"
        print(line, file=self._stream, flush=True)


class _Connection:
    """From OPEN to the end of one connection."""

    def __init__(self, driver: Driver, faults: Faults, trace: _Tracer) -> None:
        self._driver = driver
        self._faults = faults
        self._trace = trace
        self._descriptor: Descriptor | None = None

    async def run(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._one(reader, writer):
                pass
        finally:
            if self._descriptor is not None:
                self._descriptor.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        command, length = protocol.REQUEST.unpack(await reader.readexactly(protocol.REQUEST.size))
        if length > protocol.MAX_PAYLOAD:
            # What follows cannot be told from the next frame, so this is the last one.
            await self._answer(writer, command, Reply(errno.EMSGSIZE, NO_FIRMWARE_CALL, b""))
            return False
        payload = await reader.readexactly(length)
        reply = await self._reply(command, payload)
        await self._answer(writer, command, reply)
        return self._descriptor is not None

    async def _reply(self, command: int, payload: bytes) -> Reply:
        fault = self._faults.take(command)
        if fault is not None:
            await asyncio.sleep(fault.delay)
            return Reply(fault.errno, fault.status, b"")
        if self._descriptor is None:
            return self._open(command, payload)
        try:
            return self._descriptor.issue(command, payload)
        except Exception as error:  # noqa: BLE001 -- a defect or a full disk must not end the platform of everybody else
            print(f"sevattest platform: command 0x{command:x} failed: {error!r}", file=sys.stderr)  # noqa: T201 -- a program's own stderr
            return Reply(errno.EIO, NO_FIRMWARE_CALL, b"")

    def _open(self, command: int, payload: bytes) -> Reply:
        if command != protocol.OPEN:
            return Reply(errno.EBADF, NO_FIRMWARE_CALL, b"")
        if len(payload) != protocol.LENGTH.size:
            return Reply(errno.EINVAL, NO_FIRMWARE_CALL, b"")
        try:
            self._descriptor = self._driver.open(*protocol.LENGTH.unpack(payload))
        except KernelRefused as refusal:
            return Reply(refusal.errno, NO_FIRMWARE_CALL, b"")
        return Reply(0, NO_FIRMWARE_CALL, b"")

    async def _answer(self, writer: asyncio.StreamWriter, command: int, reply: Reply) -> None:
        self._trace(command, reply)
        writer.write(protocol.REPLY.pack(reply.errno, reply.status, len(reply.payload)) + reply.payload)
        await writer.drain()


def _private_listener(path: Path) -> socket.socket:
    """A socket that was never open to anybody else: chmod(2) afterwards would leave a moment."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        listener.bind(str(path))
    except OSError:
        listener.close()
        raise
    finally:
        os.umask(mask)
    return listener


def _clear_the_way(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise StateFolderUnusable(f"{path} exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()  # its server died without removing it
            return
    raise StateFolderUnusable(f"a platform is served on {path} already")


def _name(kind: type[Status | GuestRequest | DeviceCommand], number: int, unknown: str = "") -> str:
    try:
        return kind(number).name
    except ValueError:
        return unknown or f"0x{number:x}"
