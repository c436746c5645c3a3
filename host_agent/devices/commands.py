"""The nine device commands in bytes, and what their failures mean; every driver is a way to issue them.

What a command takes and gives, integers u32 little-endian (the software platform's socket has the same form; the ioctl
driver makes the kernel's structures of it):

    FACTORY_RESET, PEK_GEN, PDH_GEN   nothing; nothing
    PLATFORM_STATUS                   nothing; 12 bytes, `struct sev_user_data_status`
    PEK_CSR, GET_ID2                  length of the buffer; length, that many bytes
    PDH_CERT_EXPORT                   two lengths; two lengths, PDH, chain
    PEK_CERT_IMPORT                   two lengths, PEK, OCA; nothing
    GET_ID                            nothing; 128 bytes, a chip id for each of two sockets

The lengths are the format's own; a firmware that wants others is not believed.
"""

from __future__ import annotations

import errno
import os
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

from common.errors import OutcomeUnknown, PlatformFailed, Reason, SevattestError, Unavailable
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

STATUS = struct.Struct("<BBBIBI")  # struct sev_user_data_status, packed
LENGTH = struct.Struct("<I")
TWO_LENGTHS = struct.Struct("<II")
GET_ID_SIZE = 2 * CHIP_ID_SIZE

# Linux's own ENOTSUPP, which errno.h does not have: the driver's answer to GET_ID below API 0.16.
ENOTSUPP = 524
# The kernel's ways to say that the PSP is busy, dead or absent: asking later may help.
_NO_ANSWER = frozenset({errno.EBUSY, errno.ETIMEDOUT, errno.ENODEV, errno.ENXIO, errno.EAGAIN, errno.EINTR})
# … and that it does not know the command.
_UNKNOWN_COMMAND = frozenset({errno.EINVAL, errno.ENOTTY, errno.ENOSYS, errno.EOPNOTSUPP, ENOTSUPP})
_UNSUPPORTED = frozenset({Status.UNSUPPORTED, Status.INVALID_COMMAND})
# drivers/crypto/ccp/sev-dev.c
_ADVICE = {
    errno.EPERM: "the command needs write access to the device: the device node must be writable for this user",
    errno.EBUSY: "guests are running (a reset must wait for their end), or the PSP is dead: see the kernel's log (ccp)",
    errno.ETIMEDOUT: "the kernel now takes the PSP for dead: no SEV command is answered until the host is rebooted",
    errno.ENODEV: "the PSP has no SEV firmware that answers: see the kernel's log (ccp), and enable SEV in the BIOS",
    errno.ENOTTY: "this is no SEV device",
    ENOTSUPP: "the SEV firmware is too old for the command",
}

_LOOK = "the platform may have changed: look at it (sevattest show, sevattest export) before you go on"


class DeviceFailure(Exception):
    """The device answered a command with an errno.

    Attributes:
        command: which one; None is the opening of the device.
        errno: positive.
        fw_error: the firmware's status; `NO_FIRMWARE_CALL` where it was not called, 0 where the kernel does not tell.
        payload: with INVALID_LEN the length or lengths that the firmware wants.
    """

    def __init__(
        self, command: DeviceCommand | None, number: int, fw_error: int = NO_FIRMWARE_CALL, payload: bytes = b""
    ) -> None:
        super().__init__(number, fw_error)
        self.command = command
        self.errno = number
        self.fw_error = fw_error
        self.payload = payload

    @property
    def is_unknown_command(self) -> bool:
        """Whether kernel or firmware do not have the command."""
        return self.fw_error in _UNSUPPORTED or self.errno in _UNKNOWN_COMMAND

    def error(self) -> SevattestError:
        """What to tell the caller."""
        what = "opening the SEV device" if self.command is None else self.command.name
        # Only with EIO is the status the firmware's word on this command.
        if self.errno == errno.EIO and self.fw_error not in {Status.SUCCESS, NO_FIRMWARE_CALL}:
            return firmware_failure(self.fw_error, what + self._wanted())
        name = "ENOTSUPP" if self.errno == ENOTSUPP else errno.errorcode.get(self.errno, str(self.errno))
        fields = {"errno": name}
        if hint := _ADVICE.get(self.errno):
            fields["hint"] = hint
        sentence = f"{what} failed with {name} ({os.strerror(self.errno)})"
        if self.errno in _NO_ANSWER:
            return Unavailable(Reason.PLATFORM_UNAVAILABLE, sentence, **fields)
        return PlatformFailed(Reason.FIRMWARE_FAILED, sentence, **fields)

    def _wanted(self) -> str:
        if self.fw_error != Status.INVALID_LEN or len(self.payload) not in {LENGTH.size, TWO_LENGTHS.size}:
            return ""
        lengths = (str(length) for (length,) in LENGTH.iter_unpack(self.payload))
        return f"; it wants {' and '.join(lengths)} bytes"


class LostTrack(Exception):
    """A command was sent, and its answer did not come: what it did is not known.

    Attributes:
        message: what happened, a sentence.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class CommandDevice(ABC):
    """A SEV device by a way to issue its commands; is a `Device` and an `Administration`."""

    @abstractmethod
    async def _issue(self, command: DeviceCommand, payload: bytes, *, writable: bool) -> bytes:
        """Issue one command and return what it gives.

        Args:
            command: which one.
            payload: what it takes, in the module's form.
            writable: whether the device is opened for writing.

        Raises:
            DeviceFailure: the device answers with an errno.
            LostTrack: there is no answer.
            Unavailable: the device cannot be reached; the command was not sent.
            PlatformFailed: the answer has no form.
        """

    async def status(self) -> PlatformStatus:
        """The platform's state; see `Device`."""
        data = await self._read(DeviceCommand.PLATFORM_STATUS)
        if len(data) != STATUS.size:
            raise nonsense(f"PLATFORM_STATUS has {len(data)} bytes, not {STATUS.size}")
        major, minor, state, flags, build, guests = STATUS.unpack(data)
        try:
            platform_state = PlatformState(state)
        except ValueError:
            raise nonsense(f"PLATFORM_STATUS has the unknown state {state}") from None
        return PlatformStatus(
            firmware=FirmwareVersion(major, minor, build),
            state=platform_state,
            externally_owned=bool(flags & PLATFORM_OWNED),
            es_enabled=bool(flags & PLATFORM_ES),
            guest_count=guests,
        )

    async def export_chain(self) -> bytes:
        """PDH, PEK, OCA, CEK, 8336 bytes; see `Device`."""
        lengths = TWO_LENGTHS.pack(SEV_CERT_SIZE, PEK_OCA_CEK_SIZE)
        data = await self._read(DeviceCommand.PDH_CERT_EXPORT, lengths)
        if data[: len(lengths)] != lengths or len(data) != len(lengths) + CHAIN_SIZE:
            raise nonsense(f"PDH_CERT_EXPORT has {len(data)} bytes that are not a PDH and its chain")
        return data[len(lengths) :]

    async def chip_id(self) -> bytes:
        """The chip's id, 64 bytes or none; see `Device`."""
        with _explained():
            try:
                return await self._sized(DeviceCommand.GET_ID2, CHIP_ID_SIZE, writable=False)
            except DeviceFailure as failure:
                if not failure.is_unknown_command:
                    raise
            # What kernels had before GET_ID2.
            try:
                both = await self._issue(DeviceCommand.GET_ID, b"", writable=False)
            except DeviceFailure as failure:
                if not failure.is_unknown_command:
                    raise
                return b""
        if len(both) != GET_ID_SIZE:
            raise nonsense(f"GET_ID has {len(both)} bytes, not {GET_ID_SIZE}")
        return both[:CHIP_ID_SIZE]

    async def factory_reset(self) -> None:
        """Forget owner and keys; see `Administration`."""
        await self._change(DeviceCommand.FACTORY_RESET)

    async def pek_gen(self) -> None:
        """Make new OCA, PEK and PDH; see `Administration`."""
        await self._change(DeviceCommand.PEK_GEN)

    async def pdh_gen(self) -> None:
        """Make a new PDH; see `Administration`."""
        await self._change(DeviceCommand.PDH_GEN)

    async def pek_csr(self) -> bytes:
        """The PEK without signatures, 2084 bytes; see `Administration`."""
        with _explained():
            return await self._sized(DeviceCommand.PEK_CSR, SEV_CERT_SIZE, writable=True)

    async def pek_cert_import(self, pek: bytes, oca: bytes) -> None:
        """Give the platform an owner; see `Administration`."""
        await self._change(DeviceCommand.PEK_CERT_IMPORT, TWO_LENGTHS.pack(len(pek), len(oca)) + pek + oca)

    async def _read(self, command: DeviceCommand, payload: bytes = b"") -> bytes:
        """Issue read-only; once more with write access where the kernel has to initialise the platform."""
        with _explained():
            try:
                return await self._issue(command, payload, writable=False)
            except DeviceFailure as failure:
                if failure.errno != errno.EPERM:
                    raise
            return await self._issue(command, payload, writable=True)

    async def _sized(self, command: DeviceCommand, size: int, *, writable: bool) -> bytes:
        """Issue a command that gives one blob, of exactly `size` bytes."""
        length = LENGTH.pack(size)
        data = await self._issue(command, length, writable=writable)
        if data[: len(length)] != length or len(data) != len(length) + size:
            raise nonsense(f"{command.name} has {len(data)} bytes that are not a length and as many bytes")
        return data[len(length) :]

    async def _change(self, command: DeviceCommand, payload: bytes = b"") -> None:
        with _explained(changes=True):
            data = await self._issue(command, payload, writable=True)
        if data:
            raise nonsense(f"{command.name} has {len(data)} bytes, and should have none")


def nonsense(what: str) -> PlatformFailed:
    """The error for an answer that is none."""
    return PlatformFailed(Reason.FIRMWARE_FAILED, f"the SEV device gave an answer that makes no sense: {what}")


@contextmanager
def _explained(*, changes: bool = False) -> Iterator[None]:
    """Turn what a driver raises into the one tree's errors; a change without an answer may have happened."""
    try:
        yield
    except DeviceFailure as failure:
        error, lost = failure.error(), failure.errno == errno.ETIMEDOUT
    except LostTrack as untold:
        error, lost = Unavailable(Reason.PLATFORM_UNAVAILABLE, untold.message), True
    else:
        return
    if changes and lost:
        raise OutcomeUnknown(Reason.OUTCOME_UNKNOWN, error.message, hint=_LOOK)
    raise error
