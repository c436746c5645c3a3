"""What the SEV firmware's status codes mean to a caller: a refusal, or a failure.

Shared by everything that hears the firmware: the device driver, QEMU's monitor and QEMU's dying words. Codes: 55766
section 5.1 (common/sev/abi.py); which of them are verdicts: decisions.md 12.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from common.errors import PlatformFailed, Reason, Refused, SevattestError
from common.sev.abi import NO_FIRMWARE_CALL, Status, status_name

# The firmware's verdicts on what the owner sent; every other code says that the platform failed.
_VERDICTS = {
    Status.BAD_MEASUREMENT: Reason.FIRMWARE_BAD_MEASUREMENT,
    Status.POLICY_FAILURE: Reason.FIRMWARE_POLICY_FAILURE,
    Status.BAD_SIGNATURE: Reason.FIRMWARE_BAD_SIGNATURE,
}
# QEMU's target/i386/sev.c prints `ret=%d fw_error=%d '%s'`; where the firmware was not called, 0 or -1.
_FW_ERROR = re.compile(r"\bfw_error=(0x[0-9a-fA-F]{1,8}|\d{1,10})")
_SENTENCE_MAX = 300

# What a person at the host does about a status; the statuses' meanings: 55766 section 5.1 and AMD's published firmware.
ADVICE: dict[Status, str] = {
    Status.INVALID_PLATFORM_STATE: "the platform is not in a state for this: while guests exist its keys cannot be "
    "replaced, and a reset wants it idle",
    Status.INVALID_GUEST_STATE: "the guest's launch is not at this step; start the launch again",
    Status.INVALID_CONFIG: "the platform's configuration does not allow this; see the BIOS settings for SEV",
    Status.INVALID_LEN: "a buffer has another size than this firmware wants",
    Status.ALREADY_OWNED: "the platform has an owner; `sevattest reset` gives it back, and makes new keys",
    Status.INVALID_CERTIFICATE: "the certificate is not one that this platform takes: the PEK must be the one that "
    "PEK_CSR gave, signed by the OCA, and the OCA by itself",
    Status.POLICY_FAILURE: "the guest's policy is not allowed here: most often it asks for a newer firmware API",
    Status.INACTIVE: "the guest has no key in the memory controller any more; start it again",
    Status.INVALID_ADDRESS: "an address is not aligned, or is not memory that the firmware may use",
    Status.BAD_SIGNATURE: "a signature does not verify with the key that it names",
    Status.BAD_MEASUREMENT: "a MAC does not verify: most often the session was made for another PDH, so export the "
    "platform's certificates again",
    Status.ASID_OWNED: "the guest's ASID belongs to another guest",
    Status.INVALID_ASID: "the ASID is out of range: SEV-ES guests need ASIDs of their own, a BIOS setting",
    Status.WBINVD_REQUIRED: "the caches must be flushed first, which is the kernel's work: update the kernel",
    Status.DFFLUSH_REQUIRED: "the data fabric must be flushed first, which is the kernel's work: update the kernel",
    Status.INVALID_GUEST: "the firmware does not know this guest; it has ended, or the platform was shut down",
    Status.INVALID_COMMAND: "this firmware does not know the command; a newer one may (linux-firmware, the BIOS)",
    Status.ACTIVE: "the guest still runs; end it first",
    Status.HWSEV_PLATFORM: "memory encryption is not enabled on every core: enable SME (SMEE) in the BIOS",
    Status.HWSEV_UNSAFE: "the hardware reports a state that is not safe to go on in: reboot the host",
    Status.UNSUPPORTED: "this platform does not have the feature, or it is off: SEV-ES is a BIOS and kernel setting",
    Status.INVALID_PARAM: "a parameter is out of range for this firmware",
    Status.RESOURCE_LIMIT: "the firmware has no room left: end guests, or reboot the host",
    Status.SECURE_DATA_INVALID: "the firmware's stored keys are damaged: `sevattest reset` makes new ones",
}


def advice(code: int) -> str | None:
    """What to do about a firmware status; None for one that has no name here."""
    try:
        return ADVICE.get(Status(code))
    except ValueError:
        return None


def firmware_failure(code: int, sentence: str) -> SevattestError:
    """The error for firmware status `code`, which `sentence` tells of; its advice is the field `hint`."""
    fields = {"fw_error": str(code)}
    if hint := advice(code):
        fields["hint"] = hint
    message = f"the firmware answered {status_name(code)}: {sentence}"
    if code in _VERDICTS:
        return Refused(_VERDICTS[Status(code)], message, **fields)
    return PlatformFailed(Reason.FIRMWARE_FAILED, message, **fields)


def status_in(fields: Mapping[str, str]) -> str:
    """The name of the firmware status in an error's fields; `OTHER` for one without a name, empty where there is none.

    A machine's words carry any number: what is counted must be of a fixed set.
    """
    code = fields.get("fw_error")
    try:
        return "" if code is None else Status(int(code)).name
    except ValueError:
        return "OTHER"


def find_firmware_error(text: str) -> int | None:
    """The firmware status that `text` of QEMU's names; None if it names none, or the firmware was not called."""
    match = _FW_ERROR.search(text)
    if match is None:
        return None
    code = int(match[1], 0)
    return None if code in {Status.SUCCESS, NO_FIRMWARE_CALL} else code


def hypervisor_failure(prefix: str, sentence: str) -> SevattestError:
    """The error for a sentence of the hypervisor's: the firmware's where it names a status, else its own."""
    said = printable(sentence)
    code = find_firmware_error(said)
    if code is not None:
        return firmware_failure(code, f"{prefix}: {said}")
    return PlatformFailed(Reason.HYPERVISOR_FAILED, f"{prefix}: {said}" if said else prefix)


def printable(text: str) -> str:
    """One line of at most 300 printable characters, whatever a peer wrote."""
    line = "".join(char if char.isprintable() else " " for char in text[: 4 * _SENTENCE_MAX])
    line = " ".join(line.split())
    return line if len(line) <= _SENTENCE_MAX else f"{line[: _SENTENCE_MAX - 1]}…"
