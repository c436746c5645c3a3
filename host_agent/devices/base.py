"""What is asked of the platform's SEV device, whichever driver reaches it.

Split by power: `Device` reads, and is all that the agent has; `Administration` changes the platform, and is for the
person at the host. The drivers: `dev_sev.py` (/dev/sev), `socket.py` (the software platform), `qmp.py` (a QEMU).
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
    """PLATFORM_STATUS; None is what a driver cannot learn (`qmp.py`), and nobody may take it for a no or a zero.

    Attributes:
        firmware: API version and build.
        state: of the SEV firmware.
        externally_owned: somebody other than the platform holds the OCA's key.
        es_enabled: initialised for SEV-ES.
        guest_count: guests that the firmware knows.
    """

    firmware: FirmwareVersion | None
    state: PlatformState
    externally_owned: bool | None
    es_enabled: bool | None
    guest_count: int | None


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
        """The chip's id, 64 bytes (GET_ID2, else GET_ID), or none where the platform has neither command."""
        ...


class Administration(Protocol):
    """The half of /dev/sev that changes the platform; the device is opened for writing.

    Every method raises as those of `Device` do, and `OutcomeUnknown` where the command was sent and no answer came: the
    platform may have changed. Sessions that were made for the PDH before are good for nothing after any but `pek_csr`.
    """

    async def factory_reset(self) -> None:
        """FACTORY_RESET: forgets owner and keys; new ones are made when they are needed. Not while guests exist."""
        ...

    async def pek_gen(self) -> None:
        """PEK_GEN: new OCA, PEK and PDH; the platform owns itself again. Not while guests exist."""
        ...

    async def pdh_gen(self) -> None:
        """PDH_GEN: a new PDH, signed by the same PEK."""
        ...

    async def pek_csr(self) -> bytes:
        """PEK_CSR: the PEK without signatures, 2084 bytes, for an owner to sign; the kernel wants write access."""
        ...

    async def pek_cert_import(self, pek: bytes, oca: bytes) -> None:
        """PEK_CERT_IMPORT: the PEK of `pek_csr` with the owner's signature, and the owner's OCA, 2084 bytes each."""
        ...


class AdministeredDevice(Device, Administration, Protocol):
    """Both halves."""
