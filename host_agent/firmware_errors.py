"""What the SEV firmware's status codes mean to a caller: a refusal, or a failure.

Shared by everything that hears the firmware: the device driver, QEMU's monitor and QEMU's dying words. Codes: 55766
section 5.1 (common/sev/abi.py); which of them are verdicts: decisions.md 12.
"""

from __future__ import annotations

import re

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


def firmware_failure(code: int, sentence: str) -> SevattestError:
    """The error for firmware status `code`, which `sentence` tells of."""
    fields = {"fw_error": str(code)}
    message = f"the firmware answered {status_name(code)}: {sentence}"
    if code in _VERDICTS:
        return Refused(_VERDICTS[Status(code)], message, **fields)
    return PlatformFailed(Reason.FIRMWARE_FAILED, message, **fields)


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
