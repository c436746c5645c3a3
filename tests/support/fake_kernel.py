"""The kernel's end of `SEV_ISSUE_CMD` in this process, over the software platform's firmware; pointers are followed.

Written from drivers/crypto/ccp/sev-dev.c: the caller's structure is read, buffers by address, lengths are written back
also where the firmware wants others, `error` always. The descriptor is a real one, of any file, so that its access
mode decides what it may do, and a leak shows.
"""

from __future__ import annotations

import errno
import fcntl
import os
from ctypes import memmove, string_at
from dataclasses import dataclass, field

from common.sev.abi import DeviceCommand, Status
from emulator import protocol
from emulator.driver import Driver, Reply
from host_agent.devices.ioctl import (
    GetId2Data,
    GetIdData,
    IssueCommand,
    PdhCertExportData,
    PekCertImportData,
    PekCsrData,
    PlatformStatusData,
)

C = DeviceCommand
_EMPTY = frozenset({C.FACTORY_RESET, C.PEK_GEN, C.PDH_GEN})


@dataclass
class FakeKernel:
    """Answers as a kernel would whose PSP is `driver`'s.

    Attributes:
        driver: rules and firmware.
        seen: each command, and whether its descriptor could write.
    """

    driver: Driver
    seen: list[tuple[DeviceCommand, bool]] = field(default_factory=list)

    def ioctl(self, descriptor: int, request: IssueCommand) -> int:
        """One ioctl; 0 or an errno."""
        writable = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
        try:
            command = DeviceCommand(request.cmd)
        except ValueError:
            return errno.EINVAL
        self.seen.append((command, writable))
        if command not in _EMPTY and not request.data:
            return errno.EFAULT
        opened = self.driver.open(protocol.READ_WRITE if writable else protocol.READ_ONLY)
        try:
            reply = opened.issue(command, _payload(command, request.data))
        finally:
            opened.close()
        request.error = reply.status
        _write_back(command, request.data, reply)
        return reply.errno


def _payload(command: DeviceCommand, address: int) -> bytes:
    """What the platform's driver takes, from the caller's memory."""
    if command in {C.PEK_CSR, C.GET_ID2}:
        return protocol.LENGTH.pack(PekCsrData.from_address(address).length)
    if command is C.PDH_CERT_EXPORT:
        export = PdhCertExportData.from_address(address)
        return protocol.TWO_LENGTHS.pack(export.pdh_cert_len, export.cert_chain_len)
    if command is C.PEK_CERT_IMPORT:
        certs = PekCertImportData.from_address(address)
        pek = string_at(certs.pek_cert_address, certs.pek_cert_len)
        oca = string_at(certs.oca_cert_address, certs.oca_cert_len)
        return protocol.TWO_LENGTHS.pack(len(pek), len(oca)) + pek + oca
    return b""


def _write_back(command: DeviceCommand, address: int, reply: Reply) -> None:
    """What the kernel copies to the caller."""
    told = reply.payload
    if not told:
        return
    lengths_only = reply.status == Status.INVALID_LEN
    match command:
        case C.PLATFORM_STATUS:
            memmove(address, told, len(bytes(PlatformStatusData())))
        case C.GET_ID:
            memmove(address, told, len(bytes(GetIdData())))
        case C.PEK_CSR | C.GET_ID2:
            data = (PekCsrData if command is C.PEK_CSR else GetId2Data).from_address(address)
            (data.length,) = protocol.LENGTH.unpack_from(told)
            if not lengths_only:
                memmove(data.address, told[protocol.LENGTH.size :], data.length)
        case C.PDH_CERT_EXPORT:
            export = PdhCertExportData.from_address(address)
            export.pdh_cert_len, export.cert_chain_len = protocol.TWO_LENGTHS.unpack_from(told)
            if not lengths_only:
                blobs = told[protocol.TWO_LENGTHS.size :]
                memmove(export.pdh_cert_address, blobs[: export.pdh_cert_len], export.pdh_cert_len)
                memmove(export.cert_chain_address, blobs[export.pdh_cert_len :], export.cert_chain_len)
