"""The SEV device of the Linux kernel, /dev/sev, by the ioctl `SEV_ISSUE_CMD` (numbers and structures: `ioctl.py`).

Every command opens the device and closes it again: read-only unless the command changes the platform or the kernel
says that it must initialise it first. All of that happens in a thread, one command at a time in this process
(`single_flight.py`): the PSP may take 100 s, and the kernel lets nobody interrupt it.

The kernel copies as many bytes as the firmware says that it wrote. So every buffer has room for the largest blob that
the kernel handles at all, whatever length is announced for it, and an answer of another length than asked is refused.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from ctypes import CDLL, addressof, byref, create_string_buffer
from pathlib import Path
from typing import NamedTuple

from common.errors import Reason, Unavailable
from common.sev.abi import NO_FIRMWARE_CALL, PACKET_MAX_SIZE, DeviceCommand, Status
from host_agent.devices.commands import (
    LENGTH,
    TWO_LENGTHS,
    CommandDevice,
    DeviceFailure,
    LostTrack,
)
from host_agent.devices.ioctl import (
    SEV_ISSUE_CMD,
    GetId2Data,
    GetIdData,
    IssueCommand,
    PdhCertExportData,
    PekCertImportData,
    PekCsrData,
    PlatformStatusData,
)
from host_agent.devices.single_flight import NotMade, SingleFlight

# Issues a command on an open device and returns 0 or an errno; the structure is filled in either way.
Ioctl = Callable[[int, IssueCommand], int]

_BUFFER_SIZE = PACKET_MAX_SIZE  # SEV_FW_BLOB_MAX_SIZE of the Linux driver
_PROCESS = SingleFlight()  # one PSP, so one for the process

_OPEN_ADVICE = {
    errno.ENOENT: "this host has no SEV device at that path: see `dmesg | grep -i sev`, the BIOS settings for SME and "
    "SEV, and whether the kernel's ccp driver is loaded",
    errno.EACCES: "give this user access to the device, by a group and a udev rule; reading is enough for a launch",
}
_OPEN_ADVICE[errno.EPERM] = _OPEN_ADVICE[errno.EACCES]
_OPEN_ADVICE[errno.ENXIO] = _OPEN_ADVICE[errno.ENODEV] = _OPEN_ADVICE[errno.ENOENT]


class DevSevDevice(CommandDevice):
    """The SEV device behind a device node.

    Args:
        path: the node.
        timeout: seconds that one command may take, the wait for the one before included.
        ioctl: issues a command; the kernel's own unless a test has another.
        flight: whose turn it is; the process's own unless a test has another.
    """

    def __init__(
        self, path: Path, *, timeout: float, ioctl: Ioctl | None = None, flight: SingleFlight = _PROCESS
    ) -> None:
        self._path = path
        self._timeout = timeout
        self._ioctl = ioctl or call_kernel
        self._flight = flight

    async def _issue(self, command: DeviceCommand, payload: bytes, *, writable: bool) -> bytes:
        try:
            return await self._flight.run(
                command.name, lambda: self._in_kernel(command, payload, writable=writable), limit=self._timeout
            )
        except TimeoutError:
            raise LostTrack(f"{command.name} had no answer in {self._timeout:g} s") from None
        except NotMade as reason:
            raise Unavailable(
                Reason.PLATFORM_UNAVAILABLE,
                f"{command.name} was not sent to the SEV device: {reason.message}",
                hint="a command that the PSP does not answer blocks all others: see the kernel's log (ccp)",
            ) from None

    def _in_kernel(self, command: DeviceCommand, payload: bytes, *, writable: bool) -> bytes:
        """Open, issue, close: what blocks."""
        call = _prepare(command, payload)
        descriptor = self._open(writable=writable)
        try:
            request = IssueCommand(cmd=command, data=call.address, error=NO_FIRMWARE_CALL)
            failed = self._ioctl(descriptor, request)
        finally:
            os.close(descriptor)
        if failed:
            wanted = call.lengths() if request.error == Status.INVALID_LEN else b""
            raise DeviceFailure(command, failed, request.error, wanted)
        return call.answer()

    def _open(self, *, writable: bool) -> int:
        try:
            return os.open(self._path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
        except OSError as error:
            fields = {"errno": errno.errorcode.get(error.errno or 0, "")}
            if hint := _OPEN_ADVICE.get(error.errno or 0):
                fields["hint"] = hint
            how = "for writing" if writable else "for reading"
            raise Unavailable(
                Reason.PLATFORM_UNAVAILABLE, f"{self._path} cannot be opened {how}: {error.strerror}", **fields
            ) from None


class _Call(NamedTuple):
    """A command's structure in memory.

    Attributes:
        memory: the structure, and the buffers that it points at: they must outlive the kernel's work.
        address: of the structure; 0 where the command has none.
        answer: what the command gives, once the kernel has filled everything in.
        lengths: what the kernel has written for the buffers' lengths.
    """

    memory: tuple[object, ...] = ()
    address: int = 0
    answer: Callable[[], bytes] = bytes
    lengths: Callable[[], bytes] = bytes


def _prepare(command: DeviceCommand, payload: bytes) -> _Call:
    """What `commands.py` says in bytes, as the kernel's structure."""
    match command:
        case DeviceCommand.PLATFORM_STATUS | DeviceCommand.GET_ID:
            plain = PlatformStatusData() if command is DeviceCommand.PLATFORM_STATUS else GetIdData()
            return _Call((plain,), addressof(plain), lambda: bytes(plain))
        case DeviceCommand.PEK_CSR | DeviceCommand.GET_ID2:
            return _sized(PekCsrData if command is DeviceCommand.PEK_CSR else GetId2Data, payload)
        case DeviceCommand.PDH_CERT_EXPORT:
            return _export(payload)
        case DeviceCommand.PEK_CERT_IMPORT:
            return _import(payload)
        case _:
            return _Call()


def _sized(kind: type[PekCsrData | GetId2Data], payload: bytes) -> _Call:
    (length,) = LENGTH.unpack(payload)
    blob = create_string_buffer(_BUFFER_SIZE)
    data = kind(address=addressof(blob), length=length)

    def lengths() -> bytes:
        return LENGTH.pack(data.length)

    return _Call((data, blob), addressof(data), lambda: lengths() + blob.raw[: data.length], lengths)


def _export(payload: bytes) -> _Call:
    pdh_length, chain_length = TWO_LENGTHS.unpack(payload)
    pdh, chain = create_string_buffer(_BUFFER_SIZE), create_string_buffer(_BUFFER_SIZE)
    data = PdhCertExportData(
        pdh_cert_address=addressof(pdh),
        pdh_cert_len=pdh_length,
        cert_chain_address=addressof(chain),
        cert_chain_len=chain_length,
    )

    def lengths() -> bytes:
        return TWO_LENGTHS.pack(data.pdh_cert_len, data.cert_chain_len)

    def answer() -> bytes:
        return lengths() + pdh.raw[: data.pdh_cert_len] + chain.raw[: data.cert_chain_len]

    return _Call((data, pdh, chain), addressof(data), answer, lengths)


def _import(payload: bytes) -> _Call:
    pek_length, oca_length = TWO_LENGTHS.unpack_from(payload)
    blob = create_string_buffer(payload[TWO_LENGTHS.size :])
    data = PekCertImportData(
        pek_cert_address=addressof(blob),
        pek_cert_len=pek_length,
        oca_cert_address=addressof(blob) + pek_length,
        oca_cert_len=oca_length,
    )
    return _Call((data, blob), addressof(data))


_libc = CDLL(None, use_errno=True)
_libc.ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)
_libc.ioctl.restype = ctypes.c_int


def call_kernel(descriptor: int, request: IssueCommand) -> int:
    """`ioctl(2)` with `SEV_ISSUE_CMD`; returns 0 or the errno. Lets other threads run meanwhile."""
    # Not fcntl.ioctl: the kernel writes into the structure also when it fails, and that must not be lost.
    if _libc.ioctl(descriptor, SEV_ISSUE_CMD, byref(request)) == -1:
        return ctypes.get_errno() or errno.EIO
    return 0
