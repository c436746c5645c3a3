"""AMD's own certificates, ASK and ARK, and the pair of them. Decode, encode, check; which ones to believe is `roots`.

Layout (AMD document 55766, AMD certificate format), integers little-endian:

    0   version u32 = 1          4   key_id[16]             20  certifying_id[16]
    36  usage u32                40  reserved[16] = 0       56  exponent size u32, in bits
    60  modulus size u32, in bits
    64  exponent, modulus, signature: each as long as the modulus (256 or 512 bytes)

A signature covers everything before it: 576 bytes for 2048-bit keys (832 in all), 1088 for 4096-bit keys (1600 in all).
The Naples ARK was first published without its signature; `roots` recognises that one file, the parser does not.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Self

from cryptography.hazmat.primitives.asymmetric import rsa

from common.errors import InvalidInput, Reason
from common.sev.abi import AMD_CERT_SIZE_2048, AMD_CERT_SIZE_4096, SEV_SIGNATURE_SIZE, Algo, Usage
from common.sev.certs import pss
from common.sev.errors import BadSignature, ParseError

KEY_ID_SIZE = 16
_HEAD = struct.Struct(f"<I{KEY_ID_SIZE}s{KEY_ID_SIZE}sI16sII")
# Size of the file in bytes -> size of the key in bits.
_KEY_BITS = {AMD_CERT_SIZE_2048: 2048, AMD_CERT_SIZE_4096: 4096}
_USAGES = frozenset({Usage.ARK, Usage.ASK})


@dataclass(frozen=True, kw_only=True)
class AmdCertificate:
    """An ASK or ARK that `parse` accepted: well formed, not yet believed. Equal when all bytes are.

    Attributes:
        raw: all 832 or 1600 bytes.
        key_id: AMD's name for the key, 16 bytes; anybody can write it.
        certifying_id: the key id of the signer, 16 bytes.
        usage: ASK or ARK.
        public_key: RSA, 2048 or 4096 bits.
    """

    raw: bytes = field(repr=False)
    key_id: bytes = field(compare=False, repr=False)
    certifying_id: bytes = field(compare=False, repr=False)
    usage: Usage = field(compare=False)
    public_key: rsa.RSAPublicKey = field(compare=False, repr=False)

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Decode 832 or 1600 bytes.

        Raises:
            ParseError: these are not the bytes of an ASK or ARK.
        """
        bits = _KEY_BITS.get(len(data))
        if bits is None:
            raise ParseError(f"an AMD certificate has 832 or 1600 bytes, not {len(data)}")
        data = bytes(data)
        version, key_id, certifying_id, usage, reserved, exponent_bits, modulus_bits = _HEAD.unpack_from(data)
        if version != 1:
            raise ParseError(f"AMD certificate version {version} is unknown")
        if usage not in _USAGES:
            raise ParseError(f"an AMD certificate has no usage 0x{usage:x}")
        if any(reserved):
            raise ParseError("the reserved bytes of the AMD certificate are not zero")
        if (exponent_bits, modulus_bits) != (bits, bits):
            raise ParseError(f"an AMD certificate of {len(data)} bytes has a {bits}-bit key, not what its fields say")
        size = bits // 8
        exponent, modulus = (int.from_bytes(data[at : at + size], "little") for at in (_HEAD.size, _HEAD.size + size))
        return cls(
            raw=data,
            key_id=key_id,
            certifying_id=certifying_id,
            usage=Usage(usage),
            public_key=_rsa_key(exponent, modulus, bits),
        )

    @property
    def body(self) -> bytes:
        """What the signature covers: 576 or 1088 bytes."""
        return self.raw[: -self.public_key.key_size // 8]

    @property
    def signature(self) -> bytes:
        """The little-endian signature: 256 or 512 bytes."""
        return self.raw[-self.public_key.key_size // 8 :]

    @property
    def fingerprint(self) -> bytes:
        """Digest of the body with the hash of the key's size: 32 bytes (SHA-256) or 48 bytes (SHA-384)."""
        return pss.fingerprint(self.body, self.public_key.key_size)

    @property
    def algo(self) -> Algo:
        """The algorithm that signatures by this key carry."""
        return pss.algo_of(self.public_key.key_size)

    def check(self, message: bytes, signature: bytes) -> None:
        """Check a signature by this key, in a SEV certificate's 512-byte slot or bare.

        Raises:
            BadSignature: it does not verify, or something follows it in the slot.
        """
        size = self.public_key.key_size // 8
        if len(signature) == SEV_SIGNATURE_SIZE and any(signature[size:]):
            raise BadSignature("bytes follow the RSA signature in its slot")
        pss.verify(self.public_key, signature[:size], message)


@dataclass(frozen=True, kw_only=True)
class CaChain:
    """An ASK with the ARK beside it: kinds are right, nothing is verified."""

    ask: AmdCertificate
    ark: AmdCertificate

    def __post_init__(self) -> None:
        if (self.ask.usage, self.ark.usage) != (Usage.ASK, Usage.ARK):
            raise ParseError("AMD's certificates are not an ASK followed by an ARK")

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Decode ASK‖ARK as AMD publishes them: 1664 or 3200 bytes.

        Raises:
            ParseError: these are not an ASK and an ARK, in this order.
        """
        if len(data) not in {2 * AMD_CERT_SIZE_2048, 2 * AMD_CERT_SIZE_4096}:
            raise ParseError(f"an ASK and an ARK have 1664 or 3200 bytes together, not {len(data)}")
        half = len(data) // 2
        return cls(ask=AmdCertificate.parse(data[:half]), ark=AmdCertificate.parse(data[half:]))

    def to_bytes(self) -> bytes:
        """ASK‖ARK."""
        return self.ask.raw + self.ark.raw


def encode(
    *, usage: Usage, key_id: bytes, certifying_id: bytes, public_key: rsa.RSAPublicKey, signer: rsa.RSAPrivateKey
) -> AmdCertificate:
    """Build and sign an ASK or ARK; for platforms with a root of their own.

    Raises:
        InvalidInput: no such certificate exists, or the keys differ in size.
    """
    bits = public_key.key_size
    if usage not in _USAGES or bits not in pss.KEY_SIZES or signer.key_size != bits:
        raise InvalidInput(Reason.INVALID_ARGUMENT, "an ASK or ARK has a 2048- or 4096-bit key, as its signer has")
    if (len(key_id), len(certifying_id)) != (KEY_ID_SIZE, KEY_ID_SIZE):
        raise InvalidInput(Reason.INVALID_ARGUMENT, "key ids have 16 bytes")
    body = encode_body(usage=usage, key_id=key_id, certifying_id=certifying_id, public_key=public_key)
    return AmdCertificate.parse(body + pss.sign(signer, body))


def encode_body(*, usage: Usage, key_id: bytes, certifying_id: bytes, public_key: rsa.RSAPublicKey) -> bytes:
    """The bytes that the signature of an ASK or ARK covers: 576 or 1088."""
    numbers, bits = public_key.public_numbers(), public_key.key_size
    head = _HEAD.pack(1, key_id, certifying_id, usage, bytes(16), bits, bits)
    return head + numbers.e.to_bytes(bits // 8, "little") + numbers.n.to_bytes(bits // 8, "little")


def verify_amd_signature(cert: AmdCertificate, signer: AmdCertificate) -> None:
    """Check that the ARK `signer` signed `cert`, which names it.

    Raises:
        BadSignature: the signer is no ARK, `cert` names another key, or the signature does not verify.
    """
    if signer.usage is not Usage.ARK:
        raise BadSignature(f"{signer.usage.name} does not sign AMD's certificates")
    if cert.certifying_id != signer.key_id:
        raise BadSignature(f"{cert.usage.name} names another key as its signer")
    try:
        pss.verify(signer.public_key, cert.signature, cert.body)
    except BadSignature as error:
        raise BadSignature(f"{signer.usage.name} did not sign this {cert.usage.name}") from error


def _rsa_key(exponent: int, modulus: int, bits: int) -> rsa.RSAPublicKey:
    # All of AMD's keys have this exponent; a modulus shorter than its field would give one key two encodings.
    if exponent != pss.PUBLIC_EXPONENT:
        raise ParseError("the public exponent of the AMD certificate is not 65537")
    if modulus.bit_length() != bits:
        raise ParseError(f"the modulus of the AMD certificate does not have {bits} bits")
    try:
        return rsa.RSAPublicNumbers(exponent, modulus).public_key()
    except ValueError:
        raise ParseError("the key of the AMD certificate is not an RSA key") from None
