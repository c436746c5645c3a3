"""The launch session: how the owner's keys reach one platform's firmware, and nobody else.

Source: AMD document 55766, launch session and LAUNCH_START; formats.md section 6. The owner makes one Diffie-Hellman
key (GODH) and one pair of transport keys (TEK, TIK) per launch; a session that is used twice can be replayed by the
host, so nothing here keeps or re-opens one.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from common.errors import InvalidInput, Reason
from common.mac import hmac_sha256
from common.sev.abi import KEY_SIZE, Algo, Usage
from common.sev.certs.sev import SevCertificate, encode
from common.sev.kdf import LABEL_KEK, LABEL_KIK, LABEL_MASTER, derive
from common.sev.policy import GuestPolicy


@dataclass(frozen=True, kw_only=True)
class LaunchKeys:
    """The transport keys of one launch. They never show: not in a repr, not in an error.

    Attributes:
        tek: encrypts the session's secrets, 16 bytes.
        tik: authenticates policy, measurement and secrets, 16 bytes.

    Raises:
        InvalidInput: a key has another size or is all zero (firmware's keys of a launch without a session), or both
            are the same.
    """

    tek: bytes = field(repr=False)
    tik: bytes = field(repr=False)

    def __post_init__(self) -> None:
        for name, key in (("TEK", self.tek), ("TIK", self.tik)):
            if len(key) != KEY_SIZE:
                raise _invalid(f"a {name} has {KEY_SIZE} bytes, not {len(key)}")
            if not any(key):
                raise _invalid(f"the {name} is all zero: that is the key of a launch without a session")
        if hmac.compare_digest(self.tek, self.tik):
            raise _invalid("TEK and TIK are the same key")

    @classmethod
    def generate(cls, random: Callable[[int], bytes]) -> Self:
        """Fresh keys from a source of random bytes, called with the number of bytes wanted.

        Raises:
            InvalidInput: the source is broken: it gave zeros, the same bytes twice, or another size.
        """
        return cls(tek=random(KEY_SIZE), tik=random(KEY_SIZE))

    def __repr__(self) -> str:
        return "LaunchKeys(redacted)"


@dataclass(frozen=True, kw_only=True)
class Session:
    """What the host needs to start the guest; nothing in it is secret.

    Attributes:
        godh: the owner's Diffie-Hellman certificate, unsigned, 2084 bytes.
        blob: the session data of LAUNCH_START, 128 bytes.
    """

    godh: SevCertificate
    blob: bytes


def open_session(
    *,
    pdh: SevCertificate,
    policy: GuestPolicy,
    keys: LaunchKeys,
    godh_key: ec.EllipticCurvePrivateKey,
    nonce: bytes,
    iv: bytes,
) -> Session:
    """Wrap the launch's keys for the platform that owns `pdh`, bound to one guest policy.

    The caller MUST have verified the platform's chain up to this PDH, MUST pass a GODH key, nonce and IV that were
    never used before, and MUST forget the GODH key afterwards.

    Args:
        pdh: the platform's Diffie-Hellman certificate.
        policy: the policy that the firmware will enforce.
        keys: the launch's transport keys.
        godh_key: a fresh P-384 key.
        nonce: 16 random bytes, the context of the key derivation.
        iv: 16 random bytes, the first counter block.

    Raises:
        InvalidInput: the certificate is no PDH, the key is not on P-384, or a size is wrong.
    """
    if pdh.usage is not Usage.PDH or pdh.algo is not Algo.ECDH_SHA256:
        raise _invalid("the certificate to open a session for is no PDH")
    if not isinstance(godh_key.curve, ec.SECP384R1):
        raise _invalid("a GODH key lies on P-384")
    # OpenSSL gives the shared x coordinate as 48 bytes big-endian, which is how the firmware feeds it to the KDF (A8).
    shared = godh_key.exchange(ec.ECDH(), pdh.public_key)
    godh = encode(usage=Usage.PDH, algo=Algo.ECDH_SHA256, public_key=godh_key.public_key())
    blob = _session_blob(shared=shared, policy=policy, tek=keys.tek, tik=keys.tik, nonce=nonce, iv=iv)
    return Session(godh=godh, blob=blob)


def _session_blob(*, shared: bytes, policy: GuestPolicy, tek: bytes, tik: bytes, nonce: bytes, iv: bytes) -> bytes:
    """Nonce 16, wrapped keys 32, IV 16, MAC over the wrapped keys 32, MAC over the policy 32."""
    for name, value in (("nonce", nonce), ("IV", iv)):
        if len(value) != KEY_SIZE:
            raise _invalid(f"a session's {name} has {KEY_SIZE} bytes, not {len(value)}")
    master = derive(shared, LABEL_MASTER, nonce)
    encryptor = Cipher(algorithms.AES(derive(master, LABEL_KEK)), modes.CTR(iv)).encryptor()
    wrapped = encryptor.update(tek + tik) + encryptor.finalize()
    wrap_mac = hmac_sha256(derive(master, LABEL_KIK), wrapped)
    policy_mac = hmac_sha256(tik, policy.to_bytes())
    return nonce + wrapped + iv + wrap_mac + policy_mac


def _invalid(message: str) -> InvalidInput:
    return InvalidInput(Reason.INVALID_ARGUMENT, message)
