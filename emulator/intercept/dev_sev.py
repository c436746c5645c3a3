"""/dev/sev for unmodified programs: the file that they get for it, and SEV_ISSUE_CMD on that file.

Which argument is looked at when, and which errno that gives, is the kernel's (drivers/crypto/ccp/sev-dev.c, Linux 6.1);
what depends on the platform's state is the driver's behind the link.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable

from common.sev.abi import NO_FIRMWARE_CALL, PACKET_MAX_SIZE, DeviceCommand, Status
from emulator import protocol
from emulator.device_client import CommandFailed
from emulator.errors import KernelRefused
from emulator.intercept import psp_sev
from emulator.intercept.link import Link
from emulator.intercept.memory import Memory
from emulator.intercept.processes import access_of, inode_of

_PATH = [b"dev", b"sev"]
_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
# Flags of open(2) that a description keeps; the others are about names, of which this file has none.
_KEPT = os.O_ACCMODE | os.O_NONBLOCK
_WRITABLE = {os.O_WRONLY, os.O_RDWR}


def is_path(path: bytes) -> bool:
    """Whether a path names the device as it is written, by no link and no folder that was entered before.

    `/dev//sev` and `/./dev/sev` do; `/dev/../dev/sev` may lead anywhere, and `/dev/sev/` to a folder only.
    """
    parts = path.split(b"/")
    return (
        path.startswith(b"/")
        and parts[-1] == _PATH[-1]
        and [part for part in parts if part not in {b"", b"."}] == _PATH
    )


class DeviceFile:
    """One empty file in memory, which stays so. A program that opens the device gets a description of its own of it.

    So a descriptor is told by its inode, its access by its own flags, and nothing need be kept or cleaned up for it:
    dup, fork, passing it on and close are the kernel's.
    """

    def __init__(self) -> None:
        self._file = os.memfd_create("sev", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        # Or one program would read what another has written.
        fcntl.fcntl(self._file, fcntl.F_ADD_SEALS, _SEALS)
        status = os.fstat(self._file)
        self._inode = (status.st_dev, status.st_ino)

    def open(self, flags: int) -> int:
        """A new description, to be closed by who asked.

        Raises:
            OSError: EEXIST or ENOTDIR for flags that say that it must not exist or be a folder.
        """
        if flags & os.O_CREAT and flags & os.O_EXCL:
            raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))
        if flags & os.O_DIRECTORY:
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        return os.open(f"/proc/self/fd/{self._file}", flags & _KEPT | os.O_CLOEXEC)

    def is_behind(self, thread: int, descriptor: int) -> bool:
        """Whether this descriptor of that thread is an open device."""
        return inode_of(thread, descriptor) == self._inode

    def close(self) -> None:
        """Close it here; programs keep theirs."""
        os.close(self._file)


class IssuedCommand:
    """One SEV_ISSUE_CMD on its way."""

    def __init__(self, memory: Memory, link: Link, *, writable: bool) -> None:
        self._memory = memory
        self._link = link
        self._writable = writable
        self._data = 0
        self._error = 0
        self._commands: dict[int, Callable[[], None]] = {
            DeviceCommand.FACTORY_RESET: lambda: self._plain(DeviceCommand.FACTORY_RESET),
            DeviceCommand.PLATFORM_STATUS: self._platform_status,
            DeviceCommand.PEK_GEN: lambda: self._plain(DeviceCommand.PEK_GEN),
            DeviceCommand.PEK_CSR: self._pek_csr,
            DeviceCommand.PDH_GEN: lambda: self._plain(DeviceCommand.PDH_GEN),
            DeviceCommand.PDH_CERT_EXPORT: self._pdh_cert_export,
            DeviceCommand.PEK_CERT_IMPORT: self._pek_cert_import,
            DeviceCommand.GET_ID: self._get_id,
            DeviceCommand.GET_ID2: self._get_id2,
        }

    def carry_out(self, argument: int) -> None:
        """Do what the `struct sev_issue_cmd` at this address says, and write it back with the firmware's status.

        Where the firmware was not called the status stays what the caller had put there.

        Raises:
            KernelRefused: what the ioctl fails with; EIO for the firmware's refusal.
        """
        command, self._data, self._error = psp_sev.ISSUE_CMD.unpack(self._memory.read(argument, psp_sev.ISSUE_CMD.size))
        carry_out = self._commands.get(command)
        if carry_out is None:
            raise KernelRefused(errno.EINVAL)
        try:
            carry_out()
        finally:
            self._memory.write(argument, psp_sev.ISSUE_CMD.pack(command, self._data, self._error))

    def _plain(self, command: DeviceCommand) -> None:
        self._ask(command)

    def _platform_status(self) -> None:
        self._memory.write(self._data, self._ask(DeviceCommand.PLATFORM_STATUS))

    def _pek_csr(self) -> None:
        self._want_writable()
        address, length = psp_sev.PEK_CSR.unpack(self._memory.read(self._data, psp_sev.PEK_CSR.size))
        self._fill(DeviceCommand.PEK_CSR, address, length)

    def _get_id2(self) -> None:
        address, length = psp_sev.GET_ID2.unpack(self._memory.read(self._data, psp_sev.GET_ID2.size))
        self._fill(DeviceCommand.GET_ID2, address, length)

    def _fill(self, command: DeviceCommand, address: int, length: int) -> None:
        """A command with one buffer: without address or length it asks for the length, which is told in any case."""
        question = protocol.LENGTH.pack(length if address else 0)
        try:
            answer = self._ask(command, question)
        except CommandFailed as failure:
            if failure.payload:
                self._memory.write(self._data, psp_sev.GET_ID2.pack(address, *protocol.LENGTH.unpack(failure.payload)))
            raise
        blob = answer[protocol.LENGTH.size :]
        self._memory.write(self._data, psp_sev.GET_ID2.pack(address, len(blob)))
        self._memory.write(address, blob)

    def _pdh_cert_export(self) -> None:
        layout = psp_sev.PDH_CERT_EXPORT
        pdh_at, pdh_length, chain_at, chain_length = layout.unpack(self._memory.read(self._data, layout.size))
        is_question = not (pdh_at and pdh_length and chain_at)
        lengths = (0, 0) if is_question else (pdh_length, chain_length)
        try:
            answer = self._ask(DeviceCommand.PDH_CERT_EXPORT, protocol.TWO_LENGTHS.pack(*lengths))
        except CommandFailed as failure:
            if failure.payload:
                pdh_length, chain_length = protocol.TWO_LENGTHS.unpack(failure.payload)
                self._memory.write(self._data, layout.pack(pdh_at, pdh_length, chain_at, chain_length))
            raise
        pdh_length, chain_length = protocol.TWO_LENGTHS.unpack_from(answer)
        blobs = answer[protocol.TWO_LENGTHS.size :]
        self._memory.write(self._data, layout.pack(pdh_at, pdh_length, chain_at, chain_length))
        self._memory.write(pdh_at, blobs[:pdh_length])
        self._memory.write(chain_at, blobs[pdh_length:])

    def _pek_cert_import(self) -> None:
        self._want_writable()
        layout = psp_sev.PEK_CERT_IMPORT
        pek_at, pek_length, oca_at, oca_length = layout.unpack(self._memory.read(self._data, layout.size))
        pek, oca = read_blob(self._memory, pek_at, pek_length), read_blob(self._memory, oca_at, oca_length)
        self._ask(DeviceCommand.PEK_CERT_IMPORT, protocol.TWO_LENGTHS.pack(len(pek), len(oca)) + pek + oca)

    def _get_id(self) -> None:
        self._memory.write(self._data, self._ask(DeviceCommand.GET_ID))

    def _ask(self, command: DeviceCommand, payload: bytes = b"") -> bytes:
        try:
            answer = self._link.issue(command, payload, writable=self._writable)
        except CommandFailed as failure:
            if failure.status != NO_FIRMWARE_CALL:
                self._error = failure.status
            raise
        self._error = Status.SUCCESS
        return answer

    def _want_writable(self) -> None:
        # The driver says so too, but only after the arguments were read.
        if not self._writable:
            raise KernelRefused(errno.EPERM)


def is_writable(thread: int, descriptor: int) -> bool:
    """Whether a descriptor of the device was opened for writing."""
    return access_of(thread, descriptor) in _WRITABLE


def read_blob(memory: Memory, address: int, length: int) -> bytes:
    """A blob that a command is given, as the kernel's psp_copy_user_blob.

    Raises:
        KernelRefused: EINVAL without address or length or above 16 KiB, EFAULT where it cannot be read.
    """
    if not address or not 0 < length <= PACKET_MAX_SIZE:
        raise KernelRefused(errno.EINVAL)
    return memory.read(address, length)
