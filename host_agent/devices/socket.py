"""The SEV device on a unix socket, as the software platform serves it (docs/software-platform.md).

A request is `u32 command, u32 length` and the payload; the answer `i32 errno, u32 fw_error, u32 length` and the
payload; all little-endian, payloads of at most 65536 bytes. A connection starts with an "open" that says whether it may
change the platform, as open(2) does for /dev/sev. Payloads: `commands.py`.

One connection a command: there is no state to lose, and a connection on which an answer is late is never used again.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from common.errors import Reason, Unavailable
from common.sev.abi import DeviceCommand
from host_agent.devices.commands import LENGTH, CommandDevice, DeviceFailure, LostTrack, nonsense

_REQUEST = struct.Struct("<II")
_REPLY = struct.Struct("<iII")
_OPEN = 0xFFFF0000
_READ_ONLY = 0
_READ_WRITE = 1
_PAYLOAD_MAX = 65536
_ERRNO_MAX = 4095  # MAX_ERRNO of the Linux kernel


class SocketDevice(CommandDevice):
    """The SEV device behind a unix socket.

    Args:
        path: the socket.
        timeout: seconds that one command may take, connection included.
    """

    def __init__(self, path: Path, *, timeout: float) -> None:
        self._path = path
        self._timeout = timeout

    async def _issue(self, command: DeviceCommand, payload: bytes, *, writable: bool) -> bytes:
        mode = LENGTH.pack(_READ_WRITE if writable else _READ_ONLY)
        sent = False
        try:
            async with asyncio.timeout(self._timeout), self._connection() as (reader, writer):
                await _ask(reader, writer, None, mode)
                sent = True
                return await _ask(reader, writer, command, payload)
        except TimeoutError:
            lost = f"{command.name} had no answer in {self._timeout:g} s"
        except asyncio.IncompleteReadError:
            lost = f"the SEV device closed the connection during {command.name}"
        except OSError as error:
            lost = f"the SEV device cannot be reached: {error.strerror or error}"
        if sent:
            raise LostTrack(lost)
        raise Unavailable(Reason.PLATFORM_UNAVAILABLE, lost)

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        reader, writer = await asyncio.open_unix_connection(self._path, limit=_PAYLOAD_MAX)
        try:
            yield reader, writer
        finally:
            # Nothing that is still to be written matters, and waiting for a peer that hangs would.
            writer.transport.abort()


async def _ask(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, command: DeviceCommand | None, payload: bytes
) -> bytes:
    """One request, one answer; `None` is "open"."""
    number = _OPEN if command is None else command
    writer.write(_REQUEST.pack(number, len(payload)) + payload)
    await writer.drain()
    failed, fw_error, length = _REPLY.unpack(await reader.readexactly(_REPLY.size))
    if length > _PAYLOAD_MAX or not 0 <= failed <= _ERRNO_MAX:
        raise nonsense(f"an answer of {length} bytes with errno {failed}")
    data = await reader.readexactly(length)
    if failed:
        raise DeviceFailure(command, failed, fw_error, data)
    return data
