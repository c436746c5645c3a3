"""The one place where a launch's fresh keys are born: the GODH private key lives inside one call and nowhere else."""

from __future__ import annotations

import os
from collections.abc import Callable

from cryptography.hazmat.primitives.asymmetric import ec

from common.sev.abi import KEY_SIZE
from common.sev.certs.sev import SevCertificate
from common.sev.policy import GuestPolicy
from common.sev.session import LaunchKeys, Session, open_session


def fresh_session(
    pdh: SevCertificate, policy: GuestPolicy, random: Callable[[int], bytes] = os.urandom
) -> tuple[Session, LaunchKeys]:
    """A session for one launch on one platform, and its transport keys. Every key, nonce and IV in it is new.

    Args:
        pdh: the platform's Diffie-Hellman certificate, out of a chain that was verified.
        policy: the policy that the firmware will enforce.
        random: gives as many random bytes as it is asked for.
    """
    keys = LaunchKeys.generate(random)
    session = open_session(
        pdh=pdh,
        policy=policy,
        keys=keys,
        godh_key=ec.generate_private_key(ec.SECP384R1()),
        nonce=random(KEY_SIZE),
        iv=random(KEY_SIZE),
    )
    return session, keys
