"""The device socket seen from the other end: what the stand-in machine and `sevattest platform show` call.

Blocking, as the ioctls that it stands for. Imports neither asyncio nor cryptography, so that a machine starts fast.
"""

from __future__ import annotations

import errno
import socket
from pathlib import Path
from types import TracebackType
from typing import Self

from common.errors import Reason, Unavailable
from common.sev.abi import NO_FIRMWARE_CALL
from emulator import protocol
from emulator.protocol import GuestRequest


class CommandFailed(Unavailable):
    """A command came back with an errno.

    Attributes:
        errno: positive errno value.
        status: the firmware's status; NO_FIRMWARE_CALL where it was not reached.
        payload: what came back with the error: the lengths that the firmware wants.
    """

    def __init__(self, number: int, status: int, payload: bytes = b"") -> None:
        super().__init__(
            Reason.PLATFORM_UNAVAILABLE, f"the platform answers {errno.errorcode.get(number, str(number))}"
        )
        self.errno = number
        self.status = status
        self.payload = payload


class Device:
    """An open device. Closing it ends its guest."""

    def __init__(self, path: Path, *, writable: bool = True, timeout: float = 30.0) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(timeout)
            self._socket.connect(str(path))
            flags = protocol.READ_WRITE if writable else protocol.READ_ONLY
            self.issue(protocol.OPEN, protocol.LENGTH.pack(flags))
        except BaseException:
            self._socket.close()
            raise

    def issue(self, command: int, payload: bytes = b"") -> bytes:
        """Send one command and return what it answers.

        Raises:
            CommandFailed: the kernel's or the firmware's refusal.
            OSError: the platform went away or took too long. The device is closed: what comes late would be taken for
                the answer to the next command.
        """
        try:
            self._socket.sendall(protocol.REQUEST.pack(command, len(payload)) + payload)
            number, status, length = protocol.REPLY.unpack(self._read(protocol.REPLY.size))
            answer = self._read(length)
        except OSError:
            self.close()
            raise
        if number:
            raise CommandFailed(number, status, answer)
        return answer

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Guest commands, in the order of a launch.

    def launch_start(self, *, policy: int, shared: int, godh: bytes, session: bytes) -> int:
        """Start a launch; empty `godh` for one without owner. Returns the handle."""
        head = protocol.LAUNCH_START.pack(shared, policy, len(godh), len(session))
        (handle,) = protocol.LENGTH.unpack(self.issue(GuestRequest.LAUNCH_START, head + godh + session))
        return int(handle)

    def launch_update_data(self, address: int, data: bytes | memoryview) -> None:
        """Measure guest memory, in pieces that fit a frame; the digest does not see where one ends."""
        step = protocol.MAX_PAYLOAD // 2
        for start in range(0, len(data), step):
            piece = bytes(data[start : start + step])
            self.issue(GuestRequest.LAUNCH_UPDATE_DATA, protocol.UPDATE.pack(address + start) + piece)

    def launch_update_vmsa(self, vmsa: bytes) -> None:
        """Measure one vCPU's save area."""
        self.issue(GuestRequest.LAUNCH_UPDATE_VMSA, protocol.UPDATE.pack(0) + vmsa)

    def launch_measure(self) -> bytes:
        """Measurement and nonce; asks for the length first, as QEMU does."""
        try:
            self.issue(GuestRequest.LAUNCH_MEASURE, protocol.LENGTH.pack(0))
        except CommandFailed as failure:
            if len(failure.payload) != protocol.LENGTH.size:
                raise
            wanted = failure.payload
        else:
            raise CommandFailed(errno.EPROTO, NO_FIRMWARE_CALL)
        return self.issue(GuestRequest.LAUNCH_MEASURE, wanted)[protocol.LENGTH.size :]

    def launch_secret(self, address: int, header: bytes, packet: bytes) -> bytes:
        """Open a packet; returns what belongs at `address`."""
        head = protocol.LAUNCH_SECRET.pack(address, len(header), len(packet), len(packet))
        return self.issue(GuestRequest.LAUNCH_SECRET, head + header + packet)

    def launch_finish(self) -> None:
        """Let the guest run."""
        self.issue(GuestRequest.LAUNCH_FINISH)

    def attestation(self, nonce: bytes, length: int) -> bytes:
        """A report over this nonce (16 bytes)."""
        return self.issue(GuestRequest.ATTESTATION, protocol.ATTESTATION.pack(nonce, length))[protocol.LENGTH.size :]

    def _read(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            piece = self._socket.recv(size - len(data))
            if not piece:
                raise ConnectionResetError(errno.ECONNRESET, "the platform closed the connection")
            data += piece
        return bytes(data)
