"""RSASSA-PSS as AMD's ARK and ASK use it: hash and salt follow from the key's size, integers are little-endian.

Sources: AMD document 55766, appendix on certificates; confirmed on AMD's published certificates of five generations.
Naples has 2048-bit keys with SHA-256; Rome, Milan, Genoa and Turin have 4096-bit keys with SHA-384. The mask function
uses the same hash and the salt is as long as the digest: any other salt length is refused.
"""

from __future__ import annotations

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from common.errors import InvalidInput, Reason
from common.sev.abi import Algo
from common.sev.errors import BadSignature

PUBLIC_EXPONENT = 65537

# Key size in bits -> (the algo code that signatures by such a key carry, the hash).
_SCHEMES: dict[int, tuple[Algo, hashes.HashAlgorithm]] = {
    2048: (Algo.RSA_SHA256, hashes.SHA256()),
    4096: (Algo.RSA_SHA384, hashes.SHA384()),
}
KEY_SIZES = frozenset(_SCHEMES)


def algo_of(key_bits: int) -> Algo:
    """The algo code that names a signature by a key of this size.

    Raises:
        InvalidInput: AMD has no keys of this size.
    """
    return _scheme(key_bits)[0]


def fingerprint(body: bytes, key_bits: int) -> bytes:
    """The digest of a certificate body with the hash that belongs to the key's size: 32 or 48 bytes."""
    digest = hashes.Hash(_scheme(key_bits)[1])
    digest.update(body)
    return digest.finalize()


def sign(key: rsa.RSAPrivateKey, message: bytes) -> bytes:
    """Sign `message`; the result is a little-endian integer of the key's size."""
    scheme, digest = _padding(key.key_size)
    return key.sign(message, scheme, digest)[::-1]


def verify(key: rsa.RSAPublicKey, signature: bytes, message: bytes) -> None:
    """Check a little-endian signature of exactly the key's size.

    Raises:
        BadSignature: it is not this key's signature over `message`.
    """
    scheme, digest = _padding(key.key_size)
    if len(signature) != key.key_size // 8:
        raise BadSignature(f"an RSA signature of {len(signature)} bytes is not one by a {key.key_size}-bit key")
    try:
        key.verify(signature[::-1], message, scheme, digest)
    except InvalidSignature as error:
        raise BadSignature("the RSA signature does not verify") from error


def _padding(key_bits: int) -> tuple[padding.PSS, hashes.HashAlgorithm]:
    digest = _scheme(key_bits)[1]
    return padding.PSS(mgf=padding.MGF1(digest), salt_length=digest.digest_size), digest


def _scheme(key_bits: int) -> tuple[Algo, hashes.HashAlgorithm]:
    try:
        return _SCHEMES[key_bits]
    except KeyError:
        raise InvalidInput(Reason.INVALID_ARGUMENT, f"AMD's certificates have no {key_bits}-bit keys") from None
