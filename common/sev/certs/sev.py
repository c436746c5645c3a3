"""The 2084-byte SEV certificate: PDH, PEK, OCA, CEK and the owner's GODH. Decode, encode, sign, check one signature.

Layout (AMD document 55766, certificate format; confirmed on real chains), integers little-endian:

    0     version u32 = 1           4  api_major u8    5  api_minor u8    6  reserved u16 = 0
    8     usage u32                 12 algo u32
    16    curve u32 = 2 (P-384)     20 x[72]           92 y[72]           164 zero up to 1044
    1044  slot 1: signer's usage u32, signer's algo u32, signature[512]
    1564  slot 2: the same          2084 end

A signature covers bytes 0 to 1043. The parser is strict, so that one key has one encoding and one fingerprint, and no
byte of a certificate is free to change: coordinates below the field's prime (the library below reduces them silently),
zero where padding is due (but in an OCA, whose own signature covers it), signature scalars in range, and only the
usages and algorithms that AMD's firmware makes.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from typing import Protocol, Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from common.errors import InvalidInput, Reason
from common.sev.abi import CURVE_P384, SEV_CERT_BODY_SIZE, SEV_CERT_SIZE, SEV_SIGNATURE_SIZE, Algo, Usage
from common.sev.certs import pss
from common.sev.errors import BadSignature, ParseError

P384_PRIME = 2**384 - 2**128 - 2**96 + 2**32 - 1  # FIPS 186, curve P-384
P384_ORDER = int(
    "ffffffffffffffffffffffffffffffffffffffffffffffffc7634d81f4372ddf581a0db248b0a77aecec196accc52973", 16
)  # FIPS 186, curve P-384

_HEAD = struct.Struct("<IBBHIII72s72s")  # up to the end of y
_SLOT = struct.Struct(f"<II{SEV_SIGNATURE_SIZE}s")
_COORDINATE_SIZE = 48
_SCALAR_SIZE = 72  # a P-384 number, little-endian, the upper 24 bytes zero
_SLOTS = (SEV_CERT_BODY_SIZE, SEV_CERT_BODY_SIZE + _SLOT.size)

# The algorithm that each kind of key has in every chain ever seen; nothing else is accepted.
KEY_ALGO: dict[Usage, Algo] = {
    Usage.OCA: Algo.ECDSA_SHA256,
    Usage.PEK: Algo.ECDSA_SHA256,
    Usage.PDH: Algo.ECDH_SHA256,
    Usage.CEK: Algo.ECDSA_SHA256,
}
# (usage, algo) of the keys that may sign a certificate of this kind.
_SIGNERS = frozenset(
    {
        (Usage.OCA, Algo.ECDSA_SHA256),
        (Usage.PEK, Algo.ECDSA_SHA256),
        (Usage.CEK, Algo.ECDSA_SHA256),
        (Usage.ASK, Algo.RSA_SHA256),
        (Usage.ASK, Algo.RSA_SHA384),
    }
)
_EMPTY = (Usage.NONE, Algo.NONE)
_NO_SIGNATURES = 2 * _SLOT.pack(*_EMPTY, bytes(SEV_SIGNATURE_SIZE))
# AMD's key service wrote this into the second slot of some CEKs in 2019 (AMDESE/AMDSEV issue 18).
_MISWRITTEN_EMPTY_USAGE = 0x0010
# `sevctl generate` (0.6.2) leaves what was in its memory there, and platforms in use have such an OCA. Its signature
# covers the padding, and only the OCA's own key could make another.
_PADDED_OCA = "the padding of the OCA key is not zero, as sevctl leaves it"


class Signer(Protocol):
    """A certificate whose key signs others."""

    @property
    def usage(self) -> Usage:
        """What the key is for; a signature slot names it."""
        ...

    @property
    def algo(self) -> Algo:
        """How the key signs; a signature slot names it."""
        ...

    def check(self, message: bytes, signature: bytes) -> None:
        """Check a slot's 512 signature bytes over `message`; raises BadSignature."""
        ...


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One of the two places for a signature.

    Attributes:
        usage: usage of the key that signed; 0x1000 in an empty slot.
        algo: algorithm of the key that signed; 0 in an empty slot.
        signature: 512 bytes; zero in an empty slot.
    """

    usage: int
    algo: int
    signature: bytes = field(repr=False)

    @property
    def is_empty(self) -> bool:
        """Whether no signature is here."""
        return self.algo == Algo.NONE


_EMPTY_SLOT = Slot(usage=Usage.NONE, algo=Algo.NONE, signature=bytes(SEV_SIGNATURE_SIZE))


@dataclass(frozen=True, kw_only=True)
class SevCertificate:
    """A certificate that `parse` accepted. Two are equal when all their bytes are.

    Attributes:
        raw: all 2084 bytes.
        version: layout version, always 1.
        api_major: firmware API that wrote it; means nothing for trust.
        api_minor: the same.
        usage: OCA, PEK, PDH (also the owner's GODH) or CEK.
        algo: ECDSA for keys that sign, ECDH for PDH.
        public_key: a point on P-384.
        slots: both signature slots, in order; the order means nothing.
        warnings: deviations that were tolerated, as sentences.
    """

    raw: bytes = field(repr=False)
    version: int = field(compare=False, repr=False)
    api_major: int = field(compare=False)
    api_minor: int = field(compare=False)
    usage: Usage = field(compare=False)
    algo: Algo = field(compare=False)
    public_key: ec.EllipticCurvePublicKey = field(compare=False, repr=False)
    slots: tuple[Slot, Slot] = field(compare=False)
    warnings: tuple[str, ...] = field(compare=False, repr=False)

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Decode 2084 bytes.

        Raises:
            ParseError: these are not the bytes of a SEV certificate as AMD's firmware writes it.
        """
        if len(data) != SEV_CERT_SIZE:
            raise ParseError(f"a SEV certificate has {SEV_CERT_SIZE} bytes, not {len(data)}")
        data = bytes(data)
        version, api_major, api_minor, reserved, usage, algo, curve, x, y = _HEAD.unpack_from(data)
        if version != 1:
            raise ParseError(f"SEV certificate version {version} is unknown")
        if reserved:
            raise ParseError("the reserved bytes of the SEV certificate are not zero")
        kind = _kind(usage, algo)
        if curve != CURVE_P384:
            raise ParseError(f"{kind.name} is on curve {curve}, not on P-384")
        warnings: tuple[str, ...] = ()
        if any(data[_HEAD.size : SEV_CERT_BODY_SIZE]):
            if kind is not Usage.OCA:
                raise ParseError(f"the padding of the {kind.name} key is not zero")
            warnings = (_PADDED_OCA,)
        public_key = _point(kind, int.from_bytes(x, "little"), int.from_bytes(y, "little"))
        first, second = (_parse_slot(kind, data, number) for number in (1, 2))
        return cls(
            raw=data,
            version=version,
            api_major=api_major,
            api_minor=api_minor,
            usage=kind,
            algo=KEY_ALGO[kind],
            public_key=public_key,
            slots=(first[0], second[0]),
            warnings=warnings + first[1] + second[1],
        )

    @property
    def body(self) -> bytes:
        """The 1044 bytes that signatures cover."""
        return self.raw[:SEV_CERT_BODY_SIZE]

    @cached_property
    def fingerprint(self) -> bytes:
        """SHA-256 of the body (32 bytes): the same with and without signatures."""
        return sha256(self.body).digest()

    @property
    def is_signed(self) -> bool:
        """Whether either slot holds a signature, good or bad."""
        return any(not slot.is_empty for slot in self.slots)

    def check(self, message: bytes, signature: bytes) -> None:
        """Check an ECDSA signature (512-byte slot form) by this certificate's key over `message`.

        Raises:
            BadSignature: it does not verify, or this key does not sign.
        """
        if self.algo is not Algo.ECDSA_SHA256:
            raise BadSignature(f"a {self.usage.name} key does not sign")
        der = encode_dss_signature(*_scalars(signature))
        try:
            self.public_key.verify(der, message, ec.ECDSA(hashes.SHA256()))
        except InvalidSignature as error:
            raise BadSignature(f"the signature by {self.usage.name} does not verify") from error


def encode(
    *, usage: Usage, algo: Algo, public_key: ec.EllipticCurvePublicKey, api_major: int = 0, api_minor: int = 0
) -> SevCertificate:
    """Build a certificate with both signature slots empty.

    Raises:
        InvalidInput: no such certificate exists (usage, algorithm or curve), or an API number is above 255.
    """
    if KEY_ALGO.get(usage) is not algo or not isinstance(public_key.curve, ec.SECP384R1):
        raise InvalidInput(Reason.INVALID_ARGUMENT, f"there is no {usage.name} certificate for such a key")
    if not (0 <= api_major <= 0xFF and 0 <= api_minor <= 0xFF):
        raise InvalidInput(Reason.INVALID_ARGUMENT, "API numbers are 0 to 255")
    # 04 ‖ x ‖ y (SEC 1 section 2.3.3), both big-endian.
    point = public_key.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)[1:]
    x, y = point[:_COORDINATE_SIZE], point[_COORDINATE_SIZE:]
    head = _HEAD.pack(1, api_major, api_minor, 0, usage, algo, CURVE_P384, x[::-1], y[::-1])
    # As `parse` would have it, without proving once more that a key lies on its curve.
    return SevCertificate(
        raw=head.ljust(SEV_CERT_BODY_SIZE, b"\0") + _NO_SIGNATURES,
        version=1,
        api_major=api_major,
        api_minor=api_minor,
        usage=usage,
        algo=algo,
        public_key=public_key,
        slots=(_EMPTY_SLOT, _EMPTY_SLOT),
        warnings=(),
    )


def add_ecdsa_signature(cert: SevCertificate, *, usage: Usage, key: ec.EllipticCurvePrivateKey) -> SevCertificate:
    """Sign with a platform key (ECDSA P-384, SHA-256) into the next free slot.

    Args:
        cert: what to sign.
        usage: what the signing key is for: OCA, PEK or CEK.
        key: the signing key.

    Raises:
        InvalidInput: both slots are taken, or a key of this usage does not sign.
    """
    r, s = decode_dss_signature(key.sign(cert.body, ec.ECDSA(hashes.SHA256())))
    signature = r.to_bytes(_SCALAR_SIZE, "little") + s.to_bytes(_SCALAR_SIZE, "little")
    return _fill_slot(cert, usage, Algo.ECDSA_SHA256, signature)


def add_rsa_signature(cert: SevCertificate, *, key: rsa.RSAPrivateKey) -> SevCertificate:
    """Sign with an ASK (RSASSA-PSS; the hash follows from the key's size) into the next free slot.

    Raises:
        InvalidInput: both slots are taken, or AMD has no keys of this size.
    """
    return _fill_slot(cert, Usage.ASK, pss.algo_of(key.key_size), pss.sign(key, cert.body))


def verify_signature(cert: SevCertificate, signer: Signer) -> None:
    """Check that `signer` signed `cert`. Slots are matched by usage and algorithm, never by their order.

    The order differs between AMD's text and AMD's firmware. A signer counts once: two slots in its name are refused.

    Raises:
        BadSignature: no slot names the signer, two do, or the signature does not verify.
    """
    named = [slot for slot in cert.slots if (slot.usage, slot.algo) == (signer.usage, signer.algo)]
    if not named:
        raise BadSignature(f"{cert.usage.name} carries no signature by {signer.usage.name}")
    if len(named) > 1:
        raise BadSignature(f"{cert.usage.name} carries two signatures by {signer.usage.name}")
    try:
        signer.check(cert.body, named[0].signature)
    except BadSignature as error:
        raise BadSignature(f"{signer.usage.name} did not sign this {cert.usage.name}") from error


def _kind(usage: int, algo: int) -> Usage:
    try:
        kind = Usage(usage)
        expected = KEY_ALGO[kind]
    except (ValueError, KeyError):
        raise ParseError(f"a SEV certificate has no usage 0x{usage:x}") from None
    if algo != expected:
        raise ParseError(f"{kind.name} has algorithm 0x{algo:x} instead of 0x{expected:x}")
    return kind


def _point(kind: Usage, x: int, y: int) -> ec.EllipticCurvePublicKey:
    # The library takes coordinates modulo p: without this check one key would have several fingerprints.
    if x >= P384_PRIME or y >= P384_PRIME:
        raise ParseError(f"a coordinate of the {kind.name} key is not below the field's prime")
    try:
        return ec.EllipticCurvePublicNumbers(x, y, ec.SECP384R1()).public_key()
    except ValueError:
        raise ParseError(f"the {kind.name} key is not a point on P-384") from None


def _parse_slot(kind: Usage, data: bytes, number: int) -> tuple[Slot, tuple[str, ...]]:
    usage, algo, signature = _SLOT.unpack_from(data, _SLOTS[number - 1])
    where = f"signature slot {number} of {kind.name}"
    slot = Slot(usage=usage, algo=algo, signature=signature)
    if (usage, algo) in {_EMPTY, (_MISWRITTEN_EMPTY_USAGE, Algo.NONE)}:
        if any(signature):
            raise ParseError(f"{where} is named empty but is not zero")
        if usage == _MISWRITTEN_EMPTY_USAGE:
            return slot, (f"{where} has usage 0x{usage:04x} and no signature; read as empty",)
        return slot, ()
    if (usage, algo) not in _SIGNERS:
        raise ParseError(f"{where} names a signer that cannot be: usage 0x{usage:x}, algorithm 0x{algo:x}")
    if algo == Algo.ECDSA_SHA256:
        _check_ecdsa_form(where, signature)
    elif algo == Algo.RSA_SHA256 and any(signature[2048 // 8 :]):
        raise ParseError(f"{where} has bytes after its signature")
    return slot, ()


def _check_ecdsa_form(where: str, signature: bytes) -> None:
    if any(signature[2 * _SCALAR_SIZE :]):
        raise ParseError(f"{where} has bytes after its signature")
    if not all(0 < scalar < P384_ORDER for scalar in _scalars(signature)):
        raise ParseError(f"{where} has a number outside of 1 to n-1")


def _scalars(signature: bytes) -> tuple[int, int]:
    r, s = signature[:_SCALAR_SIZE], signature[_SCALAR_SIZE : 2 * _SCALAR_SIZE]
    return int.from_bytes(r, "little"), int.from_bytes(s, "little")


def _fill_slot(cert: SevCertificate, usage: Usage, algo: Algo, signature: bytes) -> SevCertificate:
    if (usage, algo) not in _SIGNERS:
        raise InvalidInput(Reason.INVALID_ARGUMENT, f"a {usage.name} key does not sign certificates")
    free = next((at for at, slot in zip(_SLOTS, cert.slots, strict=True) if slot.is_empty), None)
    if free is None:
        raise InvalidInput(Reason.INVALID_ARGUMENT, f"both signature slots of {cert.usage.name} are taken")
    filled = _SLOT.pack(usage, algo, signature.ljust(SEV_SIGNATURE_SIZE, b"\0"))
    return SevCertificate.parse(cert.raw[:free] + filled + cert.raw[free + _SLOT.size :])
