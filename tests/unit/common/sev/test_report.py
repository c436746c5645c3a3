"""Attestation reports, made with keys of our own."""

from __future__ import annotations

from functools import cache

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from common.errors import InvalidInput
from common.sev.abi import Algo, Usage
from common.sev.certs.sev import SevCertificate, encode
from common.sev.errors import BadSignature, ParseError
from common.sev.policy import GuestPolicy
from common.sev.report import AttestationReport

_NONCE = bytes(range(16))
_DIGEST = bytes(range(100, 132))
_KEY = ec.derive_private_key(0x5E5A77E57, ec.SECP384R1())


@cache
def _pek() -> SevCertificate:
    return encode(usage=Usage.PEK, algo=Algo.ECDSA_SHA256, public_key=_KEY.public_key())


def _report(*, key: ec.EllipticCurvePrivateKey = _KEY, policy: int = 0x0F) -> bytes:
    signed = _NONCE + _DIGEST + policy.to_bytes(4, "little")
    r, s = decode_dss_signature(key.sign(signed, ec.ECDSA(hashes.SHA256())))
    head = (0x1002).to_bytes(4, "little") + (2).to_bytes(4, "little") + bytes(4)
    return signed + head + r.to_bytes(72, "little") + s.to_bytes(72, "little")


_GOOD = _report()


def test_a_genuine_report_is_read_and_verified() -> None:
    report = AttestationReport.parse(_GOOD)
    report.verify(_pek())
    assert (report.nonce, report.digest, report.policy) == (_NONCE, _DIGEST, GuestPolicy.parse(0x0F))


@pytest.mark.parametrize("position", range(208))
def test_a_change_of_any_byte_is_noticed(position: int) -> None:
    changed = bytearray(_GOOD)
    changed[position] ^= 0x01
    with pytest.raises((ParseError, BadSignature)):
        AttestationReport.parse(bytes(changed)).verify(_pek())


def test_a_report_of_another_platform_is_refused() -> None:
    other = ec.generate_private_key(ec.SECP384R1())
    with pytest.raises(BadSignature, match="did not sign"):
        AttestationReport.parse(_report(key=other)).verify(_pek())


@pytest.mark.parametrize("usage", [Usage.OCA, Usage.CEK, Usage.PDH])
def test_only_a_pek_verifies_a_report(usage: Usage) -> None:
    algo = Algo.ECDH_SHA256 if usage is Usage.PDH else Algo.ECDSA_SHA256
    certificate = encode(usage=usage, algo=algo, public_key=_KEY.public_key())
    with pytest.raises(InvalidInput, match="no PEK"):
        AttestationReport.parse(_GOOD).verify(certificate)


@pytest.mark.parametrize("size", [0, 52, 207, 209])
def test_a_report_of_another_size_is_refused(size: int) -> None:
    with pytest.raises(ParseError, match="208 bytes"):
        AttestationReport.parse(bytes(size))


@pytest.mark.parametrize(
    ("at", "message"),
    [
        (0x34, "signed by a PEK"),
        (0x38, "signed by a PEK"),
        (0x3C, "zero is due"),
        (0x70, "zero is due"),
        (0xCF, "zero"),
    ],
)
def test_what_firmware_never_writes_is_refused_before_any_key_is_used(at: int, message: str) -> None:
    changed = bytearray(_GOOD)
    changed[at] ^= 0x80
    with pytest.raises(ParseError, match=message):
        AttestationReport.parse(bytes(changed))


def test_a_signature_of_zeros_is_refused() -> None:
    with pytest.raises(BadSignature):
        AttestationReport.parse(_GOOD[:0x40] + bytes(144)).verify(_pek())


def test_a_policy_with_a_reserved_bit_is_refused_even_when_signed() -> None:
    with pytest.raises(ParseError, match="reserved"):
        AttestationReport.parse(_report(policy=0x4F))
