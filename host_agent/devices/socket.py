"""The SEV device on a unix socket, as the software platform serves it (docs/software-platform.md).

A request is `u32 command, u32 length` and the payload; the answer `i32 errno, u32 fw_error, u32 length` and the
payload; all little-endian, payloads of at most 65536 bytes. A connection starts with an "open" that says whether it may
change the platform, as open(2) does for /dev/sev. Commands and structures: include/uapi/linux/psp-sev.h.

One connection a command: there is no state to lose, and a connection on which an answer is late is never used again.
"""

from __future__ import annotations

import asyncio
import errno
import os
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from common.errors import PlatformFailed, Reason, SevattestError, Unavailable
from common.sev.abi import (
    CHAIN_SIZE,
    CHIP_ID_SIZE,
    NO_FIRMWARE_CALL,
    PEK_OCA_CEK_SIZE,
    PLATFORM_ES,
    PLATFORM_OWNED,
    SEV_CERT_SIZE,
    DeviceCommand,
    PlatformState,
    Status,
)
from common.sev.measurement import FirmwareVersion
from host_agent.devices.base import PlatformStatus
from host_agent.firmware_errors import firmware_failure

_REQUEST = struct.Struct("<II")
_REPLY = struct.Struct("<iII")
_OPEN = 0xFFFF0000
_READ_ONLY = 0
_READ_WRITE = 1
_PAYLOAD_MAX = 65536
_ERRNO_MAX = 4095  # MAX_ERRNO of the Linux kernel

_STATUS = struct.Struct("<BBBIBI")  # struct sev_user_data_status, packed: 12 bytes
_EXPORT = struct.Struct("<II")  # pdh_cert_len, cert_chain_len
_LENGTH = struct.Struct("<I")

# The kernel's ways to say that the PSP is busy, dead or absent: asking later may help.
_NO_ANSWER = frozenset({errno.EBUSY, errno.ETIMEDOUT, errno.ENODEV, errno.ENXIO, errno.EAGAIN, errno.EINTR})
# … and that it does not know the command.
_UNKNOWN_COMMAND = frozenset({errno.EINVAL, errno.ENOTTY, errno.ENOSYS, errno.EOPNOTSUPP})
_UNSUPPORTED = frozenset({Status.UNSUPPORTED, Status.INVALID_COMMAND})


class _Failure(Exception):
    """The device answered a command with an error."""

    def __init__(self, command: DeviceCommand | None, number: int, fw_error: int, payload: bytes) -> None:
        super().__init__(number, fw_error)
        self.command = command
        self.errno = number
        self.fw_error = fw_error
        self.payload = payload

    def error(self) -> SevattestError:
        """What to tell the caller."""
        what = "opening the SEV device" if self.command is None else self.command.name
        name = errno.errorcode.get(self.errno, str(self.errno))
        if self.fw_error not in {Status.SUCCESS, NO_FIRMWARE_CALL}:
            return firmware_failure(self.fw_error, what)
        sentence = f"{what} failed with {name} ({os.strerror(self.errno)})"
        if self.errno in _NO_ANSWER:
            return Unavailable(Reason.PLATFORM_UNAVAILABLE, sentence, errno=name)
        return PlatformFailed(Reason.FIRMWARE_FAILED, sentence, errno=name)


class SocketDevice:
    """The SEV device behind a unix socket.

    Args:
        path: the socket.
        timeout: seconds that one command may take, connection included.
    """

    def __init__(self, path: Path, *, timeout: float) -> None:
        self._path = path
        self._timeout = timeout

    async def status(self) -> PlatformStatus:
        """The platform's state; see `Device`."""
        data = await self._command(DeviceCommand.PLATFORM_STATUS)
        if len(data) != _STATUS.size:
            raise _nonsense(f"PLATFORM_STATUS has {len(data)} bytes, not {_STATUS.size}")
        major, minor, state, flags, build, guests = _STATUS.unpack(data)
        try:
            platform_state = PlatformState(state)
        except ValueError:
            raise _nonsense(f"PLATFORM_STATUS has the unknown state {state}") from None
        return PlatformStatus(
            firmware=FirmwareVersion(major, minor, build),
            state=platform_state,
            externally_owned=bool(flags & PLATFORM_OWNED),
            es_enabled=bool(flags & PLATFORM_ES),
            guest_count=guests,
        )

    async def export_chain(self) -> bytes:
        """PDH, PEK, OCA, CEK, 8336 bytes; see `Device`."""
        data = await self._command(DeviceCommand.PDH_CERT_EXPORT, _EXPORT.pack(SEV_CERT_SIZE, PEK_OCA_CEK_SIZE))
        lengths, chain = data[: _EXPORT.size], data[_EXPORT.size :]
        if lengths != _EXPORT.pack(SEV_CERT_SIZE, PEK_OCA_CEK_SIZE) or len(chain) != CHAIN_SIZE:
            raise _nonsense(f"PDH_CERT_EXPORT has {len(data)} bytes that are not a PDH and its chain")
        return chain

    async def chip_id(self) -> bytes:
        """The chip's id, 64 bytes or none; see `Device`."""
        try:
            data = await self._exchange(DeviceCommand.GET_ID2, _LENGTH.pack(CHIP_ID_SIZE), mode=_READ_ONLY)
        except _Failure as failure:
            if failure.fw_error in _UNSUPPORTED or failure.errno in _UNKNOWN_COMMAND:
                return b""
            raise failure.error() from None
        if len(data) != _LENGTH.size + CHIP_ID_SIZE or _LENGTH.unpack_from(data) != (CHIP_ID_SIZE,):
            raise _nonsense(f"GET_ID2 has {len(data)} bytes that are not a length and an id")
        return data[_LENGTH.size :]

    async def _command(self, command: DeviceCommand, payload: bytes = b"") -> bytes:
        """Run a command read-only; once more with write access where the kernel has to initialise the platform."""
        try:
            return await self._exchange(command, payload, mode=_READ_ONLY)
        except _Failure as failure:
            if failure.errno != errno.EPERM:
                raise failure.error() from None
        try:
            return await self._exchange(command, payload, mode=_READ_WRITE)
        except _Failure as failure:
            raise failure.error() from None

    async def _exchange(self, command: DeviceCommand, payload: bytes, *, mode: int) -> bytes:
        try:
            async with asyncio.timeout(self._timeout), self._connection() as (reader, writer):
                await _ask(reader, writer, None, _LENGTH.pack(mode))
                return await _ask(reader, writer, command, payload)
        except TimeoutError:
            raise Unavailable(
                Reason.PLATFORM_UNAVAILABLE, f"{command.name} had no answer in {self._timeout:g} s"
            ) from None
        except asyncio.IncompleteReadError as error:
            raise Unavailable(
                Reason.PLATFORM_UNAVAILABLE, f"the SEV device closed the connection during {command.name}"
            ) from error
        except OSError as error:
            raise Unavailable(
                Reason.PLATFORM_UNAVAILABLE, f"the SEV device cannot be reached: {error.strerror or error}"
            ) from error

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
        raise _nonsense(f"an answer of {length} bytes with errno {failed}")
    data = await reader.readexactly(length)
    if failed:
        raise _Failure(command, failed, fw_error, data)
    return data


def _nonsense(what: str) -> PlatformFailed:
    return PlatformFailed(Reason.FIRMWARE_FAILED, f"the SEV device gave an answer that makes no sense: {what}")
