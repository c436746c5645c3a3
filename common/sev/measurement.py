"""The launch measurement: the firmware's HMAC over its own version, the guest policy and the launch digest.

Source: AMD document 55766, LAUNCH_MEASURE; formats.md section 8. Only the form of API 0.17 and later is known here:
before it the HMAC covered no version, so that an old firmware could not be told from a new one.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

from common.errors import InvalidInput, Reason, Refused
from common.mac import hmac_sha256
from common.sev.abi import (
    DIGEST_SIZE,
    KEY_SIZE,
    MAC_MEASURE,
    MEASUREMENT_BLOB_SIZE,
    MEASUREMENT_SIZE,
    MINIMUM_API,
)
from common.sev.errors import ParseError
from common.sev.policy import GuestPolicy

_VERSION = re.compile(r"(\d{1,3})\.(\d{1,3})\.(\d{1,3})", re.ASCII)
_BYTE_MAX = 0xFF


class FirmwareVersion(NamedTuple):
    """Version of the SEV firmware: each number 0 to 255. Versions compare as tuples do."""

    api_major: int
    api_minor: int
    build: int

    @classmethod
    def parse(cls, text: str) -> FirmwareVersion:
        """The version that `major.minor.build` spells in decimal.

        Raises:
            ParseError: it does not, or a number is above 255.
        """
        match = _VERSION.fullmatch(text)
        if match is None or any(int(number) > _BYTE_MAX for number in match.groups()):
            raise ParseError("a firmware version is written major.minor.build, each 0 to 255")
        return cls(*(int(number) for number in match.groups()))

    def __str__(self) -> str:
        return f"{self.api_major}.{self.api_minor}.{self.build}"


@dataclass(frozen=True, kw_only=True)
class MeasurementBlob:
    """What the host hands in.

    Attributes:
        measurement: the HMAC, 32 bytes.
        nonce: the firmware's own, 16 bytes, one per launch.
    """

    measurement: bytes
    nonce: bytes

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """The two parts of a 48-byte blob.

        Raises:
            ParseError: it has another size.
        """
        if len(data) != MEASUREMENT_BLOB_SIZE:
            raise ParseError(f"a measurement blob has {MEASUREMENT_BLOB_SIZE} bytes, not {len(data)}")
        return cls(measurement=bytes(data[:MEASUREMENT_SIZE]), nonce=bytes(data[MEASUREMENT_SIZE:]))

    def to_bytes(self) -> bytes:
        """The blob, 48 bytes."""
        return self.measurement + self.nonce


def measure(*, tik: bytes, firmware: FirmwareVersion, policy: GuestPolicy, digest: bytes, nonce: bytes) -> bytes:
    """The measurement that firmware of this version makes of this launch digest: 32 bytes.

    Args:
        tik: the launch's integrity key, 16 bytes.
        firmware: the version of the firmware that measures, at least API 0.17.
        policy: the guest policy of the launch.
        digest: the launch digest, 32 bytes.
        nonce: the measurement's nonce, 16 bytes.

    Raises:
        Refused: the firmware's API is below 0.17 (FIRMWARE_TOO_OLD).
        InvalidInput: a size or a version number is wrong.
    """
    _require(tik, firmware, nonce)
    return hmac_sha256(tik, _prefix(firmware, policy) + _digest(digest) + nonce)


def match(
    *, tik: bytes, blob: MeasurementBlob, firmware: FirmwareVersion, policy: GuestPolicy, digests: Sequence[bytes]
) -> int | None:
    """Which of the expected launch digests was measured.

    Every digest is tried and compared in constant time, whether or not an earlier one matched. After a match, and only
    then, the host's word on the firmware's version is true: the HMAC covers it. The caller MUST apply version floors
    after this, never before.

    Args:
        tik: the launch's integrity key, 16 bytes, not zero: firmware uses the zero key where there was no session.
        blob: what the host handed in.
        firmware: the version that the host reports.
        policy: the policy that the owner's session was made for, never the host's word.
        digests: what the owner expects, 32 bytes each.

    Returns:
        The index of the first digest that matches, None if there is none.

    Raises:
        Refused: the firmware's API is below 0.17 (FIRMWARE_TOO_OLD); nothing was computed.
        InvalidInput: a size or a version number is wrong, or the key is zero.
    """
    _require(tik, firmware, blob.nonce)
    if not any(tik):
        raise _invalid("the TIK is all zero: it is the key of a launch without a session, and proves nothing")
    prefix = _prefix(firmware, policy)
    found: int | None = None
    for index, digest in enumerate(digests):
        measurement = hmac_sha256(tik, prefix + _digest(digest) + blob.nonce)
        if hmac.compare_digest(measurement, blob.measurement) and found is None:
            found = index
    return found


def _require(tik: bytes, firmware: FirmwareVersion, nonce: bytes) -> None:
    if any(not 0 <= number <= _BYTE_MAX for number in firmware):
        raise _invalid("a number of the firmware version is not 0 to 255")
    if firmware[:2] < MINIMUM_API:
        raise Refused(
            Reason.FIRMWARE_TOO_OLD,
            f"firmware {firmware} is below API {MINIMUM_API[0]}.{MINIMUM_API[1]}: its measurement covers no version",
            firmware=str(firmware),
        )
    if len(tik) != KEY_SIZE:
        raise _invalid(f"a TIK has {KEY_SIZE} bytes, not {len(tik)}")
    if len(nonce) != KEY_SIZE:
        raise _invalid(f"a measurement's nonce has {KEY_SIZE} bytes, not {len(nonce)}")


def _prefix(firmware: FirmwareVersion, policy: GuestPolicy) -> bytes:
    return bytes((MAC_MEASURE, *firmware)) + policy.to_bytes()


def _digest(digest: bytes) -> bytes:
    if len(digest) != DIGEST_SIZE:
        raise _invalid(f"a launch digest has {DIGEST_SIZE} bytes, not {len(digest)}")
    return digest


def _invalid(message: str) -> InvalidInput:
    return InvalidInput(Reason.INVALID_ARGUMENT, message)
