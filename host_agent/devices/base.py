"""What the agent asks of the platform's SEV device, whichever driver reaches it.

The drivers: `socket.py` (the software platform). The `/dev/sev` ioctl driver takes its place beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from common.errors import PlatformFailed, Reason
from common.sev.abi import SEV_CERT_SIZE, PlatformState
from common.sev.certs.sev import SevCertificate
from common.sev.errors import ParseError
from common.sev.measurement import FirmwareVersion


@dataclass(frozen=True, kw_only=True)
class PlatformStatus:
    """PLATFORM_STATUS.

    Attributes:
        firmware: API version and build.
        state: of the SEV firmware.
        externally_owned: somebody other than the platform holds the OCA's key.
        es_enabled: initialised for SEV-ES.
        guest_count: guests that the firmware knows.
    """

    firmware: FirmwareVersion
    state: PlatformState
    externally_owned: bool
    es_enabled: bool
    guest_count: int


def pdh_fingerprint(chain: bytes) -> bytes:
    """SHA-256 over the body of the PDH that an exported chain begins with, 32 bytes.

    Raises:
        PlatformFailed: `FIRMWARE_FAILED`; it does not begin with a certificate.
    """
    try:
        return SevCertificate.parse(chain[:SEV_CERT_SIZE]).fingerprint
    except ParseError as error:
        raise PlatformFailed(
            Reason.FIRMWARE_FAILED, f"the SEV device exported a PDH that is none: {error.message}"
        ) from error


class Device(Protocol):
    """The read-only half of /dev/sev: what a launch needs.

    Every method raises `Unavailable(PLATFORM_UNAVAILABLE)` where the device gives no answer in time,
    `PlatformFailed(FIRMWARE_FAILED)` where the answer is an error or makes no sense, and `Refused` for the firmware's
    verdicts. Nothing is spent by any of them.
    """

    async def status(self) -> PlatformStatus:
        """The platform's state."""
        ...

    async def export_chain(self) -> bytes:
        """PDH, PEK, OCA, CEK as the firmware exports them: 8336 bytes, not verified."""
        ...

    async def chip_id(self) -> bytes:
        """The chip's id by GET_ID2: 64 bytes, or none where the platform does not have the command."""
        ...
