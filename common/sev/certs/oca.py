"""The owner's certificate authority of a platform: an OCA, its key, and the PEK that an owner signs.

An OCA is a P-384 key with a certificate that it signed itself (ECDSA, SHA-256). The key in a file is DER without a
passphrase, in RFC 5915's form, which sevctl and sev-tool read; PKCS#8 is read too. Taking ownership of a platform
(55766, PEK_CERT_IMPORT): the platform hands out its PEK without signatures, the OCA signs it, both go back.
"""

from __future__ import annotations

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_der_private_key

from common.sev.abi import Algo, Usage
from common.sev.certs.sev import SevCertificate, add_ecdsa_signature, encode, verify_signature
from common.sev.errors import ParseError

# A P-384 key has 167 bytes in RFC 5915's form and 185 in PKCS#8.
MAX_KEY_SIZE = 4096


def make_oca() -> tuple[SevCertificate, ec.EllipticCurvePrivateKey]:
    """A new OCA: its certificate (2084 bytes, self-signed) and its key."""
    key = ec.generate_private_key(ec.SECP384R1())
    bare = encode(usage=Usage.OCA, algo=Algo.ECDSA_SHA256, public_key=key.public_key())
    return add_ecdsa_signature(bare, usage=Usage.OCA, key=key), key


def encode_key(key: ec.EllipticCurvePrivateKey) -> bytes:
    """The key as it stands in a file: DER, 167 bytes, not encrypted."""
    return key.private_bytes(Encoding.DER, PrivateFormat.TraditionalOpenSSL, NoEncryption())


def read_oca(data: bytes) -> SevCertificate:
    """An OCA certificate, 2084 bytes.

    Raises:
        ParseError: these are not the bytes of one.
        BadSignature: it did not sign itself.
    """
    oca = SevCertificate.parse(data)
    if oca.usage is not Usage.OCA:
        raise ParseError(f"the certificate is a {oca.usage.name}, not an OCA")
    verify_signature(oca, oca)
    return oca


def read_key(data: bytes, oca: SevCertificate) -> ec.EllipticCurvePrivateKey:
    """The private key of `oca`.

    Raises:
        ParseError: these are not the bytes of a P-384 key in DER form without a passphrase, or it is another OCA's.
    """
    try:
        key = load_der_private_key(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        # What went wrong in it could tell of the key.
        raise ParseError("these bytes are not a private key in DER form without a passphrase") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP384R1):
        raise ParseError("the private key is not on P-384")
    if key.public_key() != oca.public_key:
        raise ParseError("the private key is not the OCA's")
    return key


def sign_pek(csr: bytes, key: ec.EllipticCurvePrivateKey) -> SevCertificate:
    """The PEK that a platform handed out for signing (2084 bytes), signed by the OCA's `key`.

    Raises:
        ParseError: it is no PEK, or carries a signature already.
    """
    pek = SevCertificate.parse(csr)
    if pek.usage is not Usage.PEK or pek.is_signed:
        raise ParseError(f"the platform's request is a {pek.usage.name}, and should be a PEK without signatures")
    return add_ecdsa_signature(pek, usage=Usage.OCA, key=key)
