"""Numbers of the SEV API: sizes, codes, states and firmware statuses. Nothing here computes.

Sources: AMD document 55766 (SEV API), `include/uapi/linux/psp-sev.h`, `include/uapi/linux/kvm.h`.
All integers on the wire are little-endian.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag

# Sizes in bytes.
SEV_CERT_SIZE = 2084
SEV_CERT_BODY_SIZE = 1044  # version to the end of the public key: what both signatures cover
SEV_SIGNATURE_SIZE = 512
AMD_CERT_SIZE_2048 = 832
AMD_CERT_SIZE_4096 = 1600
SESSION_SIZE = 128
KEY_SIZE = 16  # TEK, TIK, KEK, KIK, master secret, nonces and IVs
DIGEST_SIZE = 32
MEASUREMENT_SIZE = 32  # the HMAC
MEASUREMENT_BLOB_SIZE = 48  # the HMAC and the firmware's nonce
PACKET_HEADER_SIZE = 52
PACKET_MAX_SIZE = 0x4000  # SEV_FW_BLOB_MAX_SIZE of the Linux driver
REPORT_SIZE = 208
CHIP_ID_SIZE = 64
VMSA_SIZE = 4096
PEK_OCA_CEK_SIZE = 3 * SEV_CERT_SIZE
CHAIN_SIZE = 4 * SEV_CERT_SIZE

# First byte of what each MAC covers.
MAC_SECRET = 0x01
MAC_MEASURE = 0x04

# Below API 0.17 the measurement does not cover the firmware's version, nor the packet the measurement.
MINIMUM_API = (0, 17)


class Usage(IntEnum):
    """What a key is for (certificate field `pubkey_usage`)."""

    ARK = 0x0
    ASK = 0x13
    NONE = 0x1000
    OCA = 0x1001
    PEK = 0x1002
    PDH = 0x1003
    CEK = 0x1004


class Algo(IntEnum):
    """What a key does (certificate field `pubkey_algo`)."""

    NONE = 0x0
    RSA_SHA256 = 0x1
    ECDSA_SHA256 = 0x2
    ECDH_SHA256 = 0x3
    RSA_SHA384 = 0x101
    ECDSA_SHA384 = 0x102
    ECDH_SHA384 = 0x103


CURVE_P384 = 2


class PolicyBit(IntFlag):
    """Low bits of the 32-bit guest policy; bits 16 to 31 hold the minimum API version."""

    NODBG = 1 << 0
    NOKS = 1 << 1
    ES = 1 << 2
    NOSEND = 1 << 3
    DOMAIN = 1 << 4
    SEV = 1 << 5


class PlatformState(IntEnum):
    """PLATFORM_STATUS, field `state`."""

    UNINIT = 0
    INIT = 1
    WORKING = 2


PLATFORM_OWNED = 0x1
PLATFORM_ES = 0x100


class GuestState(IntEnum):
    """GUEST_STATUS, field `state`."""

    UNINIT = 0
    LUPDATE = 1
    LSECRET = 2
    RUNNING = 3
    SUPDATE = 4
    RUPDATE = 5
    SENT = 6


class DeviceCommand(IntEnum):
    """`SEV_ISSUE_CMD` on /dev/sev (linux/psp-sev.h)."""

    FACTORY_RESET = 0
    PLATFORM_STATUS = 1
    PEK_GEN = 2
    PEK_CSR = 3
    PDH_GEN = 4
    PDH_CERT_EXPORT = 5
    PEK_CERT_IMPORT = 6
    GET_ID = 7
    GET_ID2 = 8


class Status(IntEnum):
    """Firmware status codes (55766 section 5.1; the Linux header's later codes are known to have been wrong)."""

    SUCCESS = 0x00
    INVALID_PLATFORM_STATE = 0x01
    INVALID_GUEST_STATE = 0x02
    INVALID_CONFIG = 0x03
    INVALID_LEN = 0x04
    ALREADY_OWNED = 0x05
    INVALID_CERTIFICATE = 0x06
    POLICY_FAILURE = 0x07
    INACTIVE = 0x08
    INVALID_ADDRESS = 0x09
    BAD_SIGNATURE = 0x0A
    BAD_MEASUREMENT = 0x0B
    ASID_OWNED = 0x0C
    INVALID_ASID = 0x0D
    WBINVD_REQUIRED = 0x0E
    DFFLUSH_REQUIRED = 0x0F
    INVALID_GUEST = 0x10
    INVALID_COMMAND = 0x11
    ACTIVE = 0x12
    HWSEV_PLATFORM = 0x13
    HWSEV_UNSAFE = 0x14
    UNSUPPORTED = 0x15
    INVALID_PARAM = 0x16
    RESOURCE_LIMIT = 0x17
    SECURE_DATA_INVALID = 0x18


# What the kernel reports where the firmware was never called.
NO_FIRMWARE_CALL = 0xFFFFFFFF


def status_name(code: int) -> str:
    """`BAD_MEASUREMENT (0x0b)`, or the bare number for a code that has no name here."""
    try:
        return f"{Status(code).name} (0x{code:02x})"
    except ValueError:
        return f"0x{code:02x}"
