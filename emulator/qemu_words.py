"""QEMU's words for what the device and the firmware answer, and its tolerant base64 (target/i386/sev.c, GLib).

`ret` is what the wrapped ioctl returned: the negative errno from KVM, -1 from /dev/sev. `fw_error` is the firmware's
status, 0 where the firmware was not reached, because QEMU clears the field before each call.
"""

from __future__ import annotations

import base64
import errno
import os
import re
import sys

from common.sev.abi import NO_FIRMWARE_CALL, Status
from emulator.device_client import CommandFailed

# What QEMU calls the firmware's statuses (sev_fw_errlist); anything else is "unknown error".
_STATUS_TEXT = {
    Status.SUCCESS: "",
    Status.INVALID_PLATFORM_STATE: "Platform state is invalid",
    Status.INVALID_GUEST_STATE: "Guest state is invalid",
    Status.INVALID_CONFIG: "Platform configuration is invalid",
    Status.INVALID_LEN: "Buffer too small",
    Status.ALREADY_OWNED: "Platform is already owned",
    Status.INVALID_CERTIFICATE: "Certificate is invalid",
    Status.POLICY_FAILURE: "Policy is not allowed",
    Status.INACTIVE: "Guest is not active",
    Status.INVALID_ADDRESS: "Invalid address",
    Status.BAD_SIGNATURE: "Bad signature",
    Status.BAD_MEASUREMENT: "Bad measurement",
    Status.ASID_OWNED: "ASID is already owned",
    Status.INVALID_ASID: "Invalid ASID",
    Status.WBINVD_REQUIRED: "WBINVD is required",
    Status.DFFLUSH_REQUIRED: "DF_FLUSH is required",
    Status.INVALID_GUEST: "Guest handle is invalid",
    Status.INVALID_COMMAND: "Invalid command",
    Status.ACTIVE: "Guest is active",
    Status.HWSEV_PLATFORM: "Hardware error",
    Status.HWSEV_UNSAFE: "Hardware unsafe",
    Status.UNSUPPORTED: "Feature not supported",
    Status.INVALID_PARAM: "Invalid parameter",
    Status.RESOURCE_LIMIT: "Required firmware resource depleted",
    Status.SECURE_DATA_INVALID: "Part-specific integrity check failure",
}


def decode_base64(text: str) -> bytes:
    """As GLib decodes: characters outside of the alphabet are skipped, an incomplete last group is dropped."""
    symbols = re.sub(r"[^A-Za-z0-9+/=]", "", text)
    symbols = symbols[: len(symbols) // 4 * 4]
    data = bytearray()
    for at in range(0, len(symbols), 4):
        group = symbols[at : at + 4]
        padding = len(group) - len(group.rstrip("="))
        data += base64.b64decode(group.replace("=", "A"))[: 3 - min(padding, 2)]
    return bytes(data)


def firmware_status(error: CommandFailed | OSError) -> tuple[int, str]:
    """The number and the words that QEMU prints for it."""
    code = error.status if isinstance(error, CommandFailed) else NO_FIRMWARE_CALL
    if code == NO_FIRMWARE_CALL:
        return 0, ""  # QEMU clears the field before the call
    try:
        return code, _STATUS_TEXT[Status(code)]
    except ValueError:
        return code, "unknown error"


def kvm_outcome(error: CommandFailed | OSError) -> str:
    """What QEMU prints of a failed KVM_MEMORY_ENCRYPT_OP, whose wrapper returns the negative errno."""
    code, text = firmware_status(error)
    return f"ret=-{error.errno or errno.EIO} fw_error={code} '{text}'"


def ioctl_outcome(error: CommandFailed | OSError) -> str:
    """What QEMU prints of a failed command on /dev/sev."""
    code, text = firmware_status(error)
    return f"ret=-1 fw_err={code} ({text})"


def reason(error: CommandFailed | OSError) -> str:
    """The errno's own sentence."""
    return os.strerror(error.errno or errno.EIO)


def complain(line: str) -> None:
    """Say a sentence on stderr as QEMU does."""
    print(f"qemu-system-x86_64: {line}", file=sys.stderr, flush=True)  # noqa: T201 -- QEMU's stderr
