"""Numbers and structures of `include/uapi/linux/psp-sev.h`: what an ioctl on /dev/sev is made of. Nothing here calls.

There is one ioctl, `SEV_ISSUE_CMD`; its 16-byte argument names the command and points at the command's own structure.
All structures are packed, their integers little-endian (the PSP exists on x86-64 only). "out" is written by the kernel,
"in/out" too, also when the call fails. tests/contract/test_psp_sev_header.py holds every number against the header.
"""

from __future__ import annotations

from ctypes import LittleEndianStructure, c_uint8, c_uint32, c_uint64

from common.sev.abi import CHIP_ID_SIZE, DeviceCommand

DEFAULT_PATH = "/dev/sev"

# _IOWR(type, nr, struct) of include/uapi/asm-generic/ioctl.h: direction, size, type, number, from the top bits down.
_READ_WRITE = 3
_SEV_TYPE = ord("S")
_ISSUE_NUMBER = 0


class _Packed(LittleEndianStructure):
    """A structure without padding."""

    _pack_ = 1
    _layout_ = "ms"  # what `_pack_` means; newer Pythons want to hear it


class IssueCommand(_Packed):
    """`struct sev_issue_cmd`, 16 bytes.

    Attributes:
        cmd: in; a `DeviceCommand`.
        data: in; address of the command's structure, 0 where it has none.
        error: out; the firmware's status, or 0xFFFFFFFF where the firmware was not called (newer kernels).
    """

    _fields_ = (("cmd", c_uint32), ("data", c_uint64), ("error", c_uint32))
    cmd: int
    data: int
    error: int


class PlatformStatusData(_Packed):
    """`struct sev_user_data_status`, 12 bytes, all out; `common.sev.abi` has the state's and flags' values."""

    _fields_ = (
        ("api_major", c_uint8),
        ("api_minor", c_uint8),
        ("state", c_uint8),
        ("flags", c_uint32),
        ("build", c_uint8),
        ("guest_count", c_uint32),
    )


class PekCsrData(_Packed):
    """`struct sev_user_data_pek_csr`, 12 bytes.

    Attributes:
        address: in; buffer for the certificate.
        length: in/out; bytes of it.
    """

    _fields_ = (("address", c_uint64), ("length", c_uint32))
    address: int
    length: int


class PekCertImportData(_Packed):
    """`struct sev_user_data_pek_cert_import`, 24 bytes, all in: addresses and lengths of two certificates."""

    _fields_ = (
        ("pek_cert_address", c_uint64),
        ("pek_cert_len", c_uint32),
        ("oca_cert_address", c_uint64),
        ("oca_cert_len", c_uint32),
    )


class PdhCertExportData(_Packed):
    """`struct sev_user_data_pdh_cert_export`, 24 bytes.

    Attributes:
        pdh_cert_address: in; buffer for the PDH.
        pdh_cert_len: in/out; bytes of it.
        cert_chain_address: in; buffer for PEK, OCA and CEK.
        cert_chain_len: in/out; bytes of it.
    """

    _fields_ = (
        ("pdh_cert_address", c_uint64),
        ("pdh_cert_len", c_uint32),
        ("cert_chain_address", c_uint64),
        ("cert_chain_len", c_uint32),
    )
    pdh_cert_address: int
    pdh_cert_len: int
    cert_chain_address: int
    cert_chain_len: int


class GetIdData(_Packed):
    """`struct sev_user_data_get_id`, 128 bytes, out: a chip id for each of two sockets."""

    _fields_ = (("socket1", c_uint8 * CHIP_ID_SIZE), ("socket2", c_uint8 * CHIP_ID_SIZE))


class GetId2Data(_Packed):
    """`struct sev_user_data_get_id2`, 12 bytes.

    Attributes:
        address: in; buffer for the id.
        length: in/out; bytes of it.
    """

    _fields_ = (("address", c_uint64), ("length", c_uint32))
    address: int
    length: int


def iowr(kind: int, number: int, size: int) -> int:
    """The number of an ioctl whose argument, `size` bytes, is read and written."""
    return _READ_WRITE << 30 | size << 16 | kind << 8 | number


SEV_ISSUE_CMD = iowr(_SEV_TYPE, _ISSUE_NUMBER, 16)  # 0xC0105300

# Which structure a command takes; None takes none.
DATA_OF: dict[DeviceCommand, type[_Packed] | None] = {
    DeviceCommand.FACTORY_RESET: None,
    DeviceCommand.PLATFORM_STATUS: PlatformStatusData,
    DeviceCommand.PEK_GEN: None,
    DeviceCommand.PEK_CSR: PekCsrData,
    DeviceCommand.PDH_GEN: None,
    DeviceCommand.PDH_CERT_EXPORT: PdhCertExportData,
    DeviceCommand.PEK_CERT_IMPORT: PekCertImportData,
    DeviceCommand.GET_ID: GetIdData,
    DeviceCommand.GET_ID2: GetId2Data,
}
