"""What the flow needs of either side of a launch, and the values that it carries between them.

The orchestrator understands none of the bytes in these values and chooses none of them: it relays. A driver gives up
after `within` seconds and raises only `common.errors`: `OutcomeUnknown` where a call that changes something may have
been carried out, `Unavailable` where it was not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol
from uuid import UUID

from common.errors import Reason
from common.sev.measurement import FirmwareVersion

# Answers to a repeat that nobody looked at, or not to its end: they do not say what became of the call before.
SAYS_NOTHING = frozenset({Reason.UNAUTHENTICATED, Reason.ROLE_NOT_ALLOWED, Reason.TOO_MANY_REQUESTS, Reason.INTERNAL})


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """The host's word on its platform.

    Attributes:
        chain: PDH, PEK, OCA and CEK, 8336 bytes.
        chip_id: 64 bytes, or none where the platform gives none.
    """

    chain: bytes
    chip_id: bytes


@dataclass(frozen=True, kw_only=True)
class Session:
    """The verifier's answer to a platform that it accepts: all that the host needs to start the guest.

    Attributes:
        launch_id: the verifier's id of the launch.
        workload_version: the version of the workload that counts for this launch.
        generation: of the platform, `emulated` for a root that only the verifier's configuration names.
        fingerprint: SHA-256 of the CEK's signed body, hex; names the chip.
        policy: the guest policy that the session is bound to.
        godh: the owner's Diffie-Hellman certificate, 2084 bytes.
        blob: the session blob, 128 bytes.
        pdh_fingerprint: SHA-256 of the signed body of the PDH that the session is for, 32 bytes.
    """

    launch_id: UUID
    workload_version: str
    generation: str
    fingerprint: str
    policy: int
    godh: bytes
    blob: bytes
    pdh_fingerprint: bytes


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A paused guest's measurement.

    Attributes:
        blob: measurement and nonce, 48 bytes.
        firmware: the version of the platform's firmware, which the measurement covers.
    """

    blob: bytes
    firmware: FirmwareVersion


@dataclass(frozen=True, kw_only=True)
class Packet:
    """The secret packet, which only the measured guest can open, and the owner's receipt for it.

    Attributes:
        header: 52 bytes.
        payload: ciphertext.
        receipt: what was released to what, a JSON object (docs/receipt.md).
    """

    header: bytes
    payload: bytes
    receipt: str


class Host(Protocol):
    """The host's side of a launch."""

    async def export_chain(self, *, within: float) -> Evidence:
        """Read the platform's certificates and chip id."""
        ...

    async def start(self, session: Session, guest: str, *, request_id: UUID, within: float) -> None:
        """Start the guest paused, under the owner's session and policy."""
        ...

    async def measure(self, launch_id: UUID, *, within: float) -> Measured:
        """Read the paused guest's measurement."""
        ...

    async def inject(self, launch_id: UUID, packet: Packet, *, request_id: UUID, within: float) -> None:
        """Hand the secret packet to the platform's firmware."""
        ...

    async def resume(self, launch_id: UUID, *, request_id: UUID, within: float) -> None:
        """Let the guest run, which has its secret now."""
        ...

    async def abort(self, launch_id: UUID, *, request_id: UUID, within: float) -> None:
        """End the launch and the machine that was started for it."""
        ...


class Owner(Protocol):
    """The guest owner's side of a launch."""

    async def begin(
        self, evidence: Evidence, workload: str, grant: str | None, *, request_id: UUID, within: float
    ) -> Session:
        """Have the platform verified and a launch opened."""
        ...

    async def release(self, launch_id: UUID, measured: Measured, *, request_id: UUID, within: float) -> Packet:
        """Have the measurement judged; the answer is the secret packet for it, at most once in a launch's life."""
        ...

    async def abandon(self, launch_id: UUID, reason: Reason | None, *, request_id: UUID, within: float) -> None:
        """Give the launch up; its keys are erased."""
        ...
