"""An owner's certificate authority: made, read back, and what is none."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from common.sev.abi import SEV_CERT_SIZE, Usage
from common.sev.certs.oca import encode_key, make_oca, read_key, read_oca, sign_pek
from common.sev.certs.sev import verify_signature
from common.sev.errors import BadSignature, ParseError
from tests.support.chains import bare, make_platform, p384, sign, with_bytes


def _der(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey, form: PrivateFormat = PrivateFormat.PKCS8) -> bytes:
    return key.private_bytes(Encoding.DER, form, NoEncryption())


def test_a_new_oca_signed_itself_and_reads_back_with_its_key() -> None:
    oca, key = make_oca()
    assert read_oca(oca.raw) == oca
    assert len(oca.raw) == SEV_CERT_SIZE
    assert [(slot.usage, slot.algo) for slot in oca.slots] == [(0x1001, 2), (0x1000, 0)]
    assert (oca.api_major, oca.api_minor, oca.warnings) == (0, 0, ())
    assert len(encode_key(key)) == 167
    for data in (encode_key(key), _der(key)):
        assert read_key(data, oca).private_numbers() == key.private_numbers()
    assert make_oca()[0].fingerprint != oca.fingerprint


@pytest.mark.parametrize("size", [0, 1, 2083, 2085])
def test_a_certificate_that_is_cut_off_or_too_long_is_none(size: int) -> None:
    oca, _ = make_oca()
    with pytest.raises(ParseError):
        read_oca(oca.raw.ljust(size, b"\0")[:size])


def test_other_certificates_are_no_oca() -> None:
    chain = make_platform().chain
    for cert in (chain.pdh, chain.pek, chain.cek):
        with pytest.raises(ParseError, match="not an OCA"):
            read_oca(cert.raw)
    assert read_oca(chain.oca.raw) == chain.oca


def test_an_oca_that_did_not_sign_itself_is_refused() -> None:
    oca, key = make_oca()
    for bad in (bare(Usage.OCA, key), sign(bare(Usage.OCA, key), Usage.OCA, p384())):
        with pytest.raises(BadSignature):
            read_oca(bad.raw)
    with pytest.raises(BadSignature):
        read_oca(with_bytes(oca, 4, b"\x09"))


def test_only_the_ocas_own_key_is_its_key() -> None:
    oca, key = make_oca()
    encrypted = key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, BestAvailableEncryption(b"phrase"))
    small, large = ec.generate_private_key(ec.SECP256R1()), rsa.generate_private_key(65537, 2048)
    for data, words in [
        (encode_key(p384()), "not the OCA's"),
        (_der(small), "not on P-384"),
        (_der(large), "not on P-384"),
        (encrypted, "without a passphrase"),
        (encode_key(key)[:-1], "in DER form"),
        (b"", "in DER form"),
        (oca.raw, "in DER form"),
        (key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), "in DER form"),
    ]:
        with pytest.raises(ParseError, match=words) as refusal:
            read_key(data, oca)
        assert refusal.value.__cause__ is None


def test_a_pek_without_signatures_is_signed_once() -> None:
    oca, key = make_oca()
    pek = bare(Usage.PEK, p384())
    signed = sign_pek(pek.raw, key)
    verify_signature(signed, oca)
    assert signed.body == pek.body
    for request in (signed.raw, bare(Usage.PDH, p384()).raw, oca.raw, pek.raw[:-1], b""):
        with pytest.raises(ParseError):
            sign_pek(request, key)
