"""A guest owner for one test launch: fresh keys, in memory only, for a secret that is none.

So that a host can be tried without anybody else. What is launched so is worth nothing to anybody: whoever tries the
host holds the keys, and nothing here decides on a platform.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from uuid import UUID

from cryptography.hazmat.primitives.asymmetric import ec

from common.sev.abi import KEY_SIZE
from common.sev.certs.sev import SevCertificate
from common.sev.explain import Catalogue, Expected, explain
from common.sev.measurement import FirmwareVersion, MeasurementBlob, match
from common.sev.policy import GuestPolicy
from common.sev.secret import SecretEntry, SecretPacket, build_table, seal_packet
from common.sev.session import LaunchKeys, Session, open_session


class ThrowawayOwner:
    """The owner of one test launch.

    Args:
        pdh: the platform's, verified or not.
        policy: the guest policy.
        random: gives as many random bytes as it is asked for.

    Attributes:
        session: for the host to start the guest with.
    """

    def __init__(self, pdh: SevCertificate, policy: GuestPolicy, random: Callable[[int], bytes]) -> None:
        self._policy = policy
        self._random = random
        self._keys = LaunchKeys.generate(random)
        self.session: Session = open_session(
            pdh=pdh,
            policy=policy,
            keys=self._keys,
            godh_key=ec.generate_private_key(ec.SECP384R1()),
            nonce=random(KEY_SIZE),
            iv=random(KEY_SIZE),
        )

    def __repr__(self) -> str:
        return "ThrowawayOwner(redacted)"

    def match(self, blob: MeasurementBlob, firmware: FirmwareVersion, digests: Sequence[bytes]) -> int | None:
        """Which of the launch digests was measured, or None; see `common.sev.measurement.match`."""
        return match(tik=self._keys.tik, blob=blob, firmware=firmware, policy=self._policy, digests=digests)

    def explain(
        self, blob: MeasurementBlob, firmware: FirmwareVersion, expected: Sequence[Expected], catalogue: Catalogue
    ) -> str:
        """Why nothing matched, a sentence; see `common.sev.explain`."""
        return explain(
            blob=blob,
            keys=self._keys,
            firmware=firmware,
            policy=self._policy,
            expected=expected,
            catalogue=catalogue,
        ).sentence

    def packet(self, guid: UUID, data: bytes, *, blob: MeasurementBlob, area_size: int) -> SecretPacket:
        """A packet with one harmless secret for the guest that was measured so; the measurement MUST have matched.

        Args:
            guid: the secret's name.
            data: what the guest may read.
            blob: the measurement.
            area_size: bytes of the firmware's area for secrets.

        Raises:
            WrongState: `NO_SECRET_AREA` or `SECRET_TOO_LARGE`.
        """
        return seal_packet(
            keys=self._keys,
            table=build_table([SecretEntry(guid=guid, data=data)]),
            measurement=blob.measurement,
            iv=self._random(KEY_SIZE),
            area_size=area_size,
        )
