"""The SEV certificate's codec: known answers from a real platform, and every way in which bytes are not one."""

from __future__ import annotations

import struct

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from common.errors import InvalidInput
from common.sev.abi import SEV_CERT_SIZE, Algo, Usage
from common.sev.certs.roots import pinned_roots
from common.sev.certs.sev import (
    KEY_ALGO,
    P384_ORDER,
    P384_PRIME,
    SevCertificate,
    add_ecdsa_signature,
    add_rsa_signature,
    encode,
    verify_signature,
)
from common.sev.errors import BadSignature, ParseError
from tests.support.chains import bare, make_platform, p384, shared_ca, sign, with_bytes
from tests.support.vectors import vectors

X, Y, PADDING = 20, 92, 164
SLOT_1, SLOT_2 = 1044, 1564

# formats.md section 3 and section 1, "what the real chains contain".
ROME = {
    "pdh": ("a19ef679477f2256d802ce9054ee6d1145dbeed52998c66ea97499a01d977c54", (0, 22), [(0x1002, 2), (0x1000, 0)]),
    "pek": ("a37b51038cbaec1062f7b5f93e8caa55cc7798b1a813c26fae1cabc96320fa0a", (0, 22), [(0x1001, 2), (0x1004, 2)]),
    "oca": ("deae2d45b8d1456c94b514fba0e6f6fb9f13afc9df9ba9670e9c9e9e54b4af6e", (0, 22), [(0x1001, 2), (0x1000, 0)]),
    "cek": ("ce2cba2df8808d188f445192418e008ecf9bd1464db35ea64afa3b3b6966396c", (0, 14), [(0x13, 0x101), (0x1000, 0)]),
}


@pytest.mark.parametrize("name", ROME)
def test_a_real_rome_certificate_reads_as_known(name: str) -> None:
    fingerprint, api, slots = ROME[name]
    cert = SevCertificate.parse((vectors() / "rome" / f"{name}.cert").read_bytes())
    assert cert.usage.name.lower() == name
    assert cert.fingerprint.hex() == fingerprint
    assert (cert.version, cert.api_major, cert.api_minor) == (1, *api)
    assert [(slot.usage, slot.algo) for slot in cert.slots] == slots
    assert cert.is_signed
    assert cert.warnings == ()


@pytest.mark.parametrize("usage", KEY_ALGO)
def test_what_is_encoded_is_decoded_again(usage: Usage) -> None:
    key = p384()
    cert = encode(usage=usage, algo=KEY_ALGO[usage], public_key=key.public_key(), api_major=1, api_minor=55)
    again = SevCertificate.parse(cert.raw)
    assert again == cert
    assert (again.usage, again.algo, again.api_major, again.api_minor) == (usage, KEY_ALGO[usage], 1, 55)
    assert again.public_key == key.public_key()
    assert len(again.raw) == SEV_CERT_SIZE
    assert len(again.body) == 1044
    assert not again.is_signed


def test_the_fingerprint_is_the_same_with_and_without_signatures() -> None:
    key = p384()
    cert = bare(Usage.OCA, key)
    signed = sign(cert, Usage.OCA, key)
    assert signed.fingerprint == cert.fingerprint
    assert signed.raw != cert.raw
    assert signed != cert


@pytest.mark.parametrize(
    ("usage", "algo"),
    [
        (Usage.PEK, Algo.ECDH_SHA256),
        (Usage.PDH, Algo.ECDSA_SHA256),
        (Usage.ASK, Algo.RSA_SHA384),
        (Usage.NONE, Algo.NONE),
    ],
)
def test_a_certificate_that_no_firmware_makes_is_not_encoded(usage: Usage, algo: Algo) -> None:
    with pytest.raises(InvalidInput, match="there is no"):
        encode(usage=usage, algo=algo, public_key=p384().public_key())


def test_a_p256_key_is_not_encoded() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    with pytest.raises(InvalidInput, match="there is no PEK certificate"):
        encode(usage=Usage.PEK, algo=Algo.ECDSA_SHA256, public_key=key.public_key())


def test_api_numbers_beyond_a_byte_are_not_encoded() -> None:
    with pytest.raises(InvalidInput, match="0 to 255"):
        encode(usage=Usage.PEK, algo=Algo.ECDSA_SHA256, public_key=p384().public_key(), api_minor=256)


@pytest.mark.parametrize("size", [0, 1, 1044, 2083, 2085, 8336])
def test_another_size_is_refused(size: int) -> None:
    with pytest.raises(ParseError, match=f"2084 bytes, not {size}"):
        SevCertificate.parse(bytes(size))


def _u32(value: int) -> bytes:
    return struct.pack("<I", value)


@pytest.mark.parametrize(
    ("at", "new", "sentence"),
    [
        (0, _u32(0), "version 0 is unknown"),
        (0, _u32(2), "version 2 is unknown"),
        (6, b"\x01", "reserved bytes"),
        (7, b"\x01", "reserved bytes"),
        (8, _u32(Usage.ARK), "no usage 0x0"),
        (8, _u32(Usage.ASK), "no usage 0x13"),
        (8, _u32(Usage.NONE), "no usage 0x1000"),
        (8, _u32(0x1005), "no usage 0x1005"),
        (8, _u32(Usage.PDH), "PDH has algorithm 0x2 instead of 0x3"),
        (12, _u32(Algo.ECDH_SHA256), "PEK has algorithm 0x3 instead of 0x2"),
        (12, _u32(Algo.ECDSA_SHA384), "PEK has algorithm 0x102"),
        (12, _u32(Algo.RSA_SHA256), "PEK has algorithm 0x1"),
        (16, _u32(0), "curve 0, not on P-384"),
        (16, _u32(1), "curve 1, not on P-384"),
        (16, _u32(3), "curve 3, not on P-384"),
        (PADDING, b"\x01", "padding of the PEK key"),
        (1043, b"\x80", "padding of the PEK key"),
        (X + 48, b"\x01", "not below the field's prime"),
        (Y + 71, b"\x01", "not below the field's prime"),
        (X, bytes(144), "not a point"),
        (Y, bytes(72), "not a point"),
    ],
)
def test_a_field_out_of_order_is_refused(at: int, new: bytes, sentence: str) -> None:
    cert = bare(Usage.PEK, p384())
    with pytest.raises(ParseError, match=sentence):
        SevCertificate.parse(with_bytes(cert, at, new))


def test_the_padding_of_an_oca_is_its_signatures_business() -> None:
    # As `sevctl generate` 0.6.2 writes it: bytes of its memory in the padding, and then the signature.
    key = p384()
    clean = bare(Usage.OCA, key)
    padded = sign(SevCertificate.parse(with_bytes(clean, PADDING + 4, b"\x40\x09\x82")), Usage.OCA, key)
    assert padded.warnings == ("the padding of the OCA key is not zero, as sevctl leaves it",)
    verify_signature(padded, padded)
    changed = SevCertificate.parse(with_bytes(padded, PADDING + 4, b"\x41"))
    with pytest.raises(BadSignature):
        verify_signature(changed, changed)
    assert sign(clean, Usage.OCA, key).warnings == ()


def test_one_key_has_one_encoding() -> None:
    # x+p fits the 72-byte field, and the library would reduce it: the same key under another fingerprint.
    numbers = p384().public_key().public_numbers()
    reduced = ec.EllipticCurvePublicNumbers(numbers.x + P384_PRIME, numbers.y, ec.SECP384R1()).public_key()
    assert reduced.public_numbers() == numbers, "the library's behaviour that makes the check necessary"
    cert = encode(usage=Usage.PDH, algo=Algo.ECDH_SHA256, public_key=numbers.public_key())
    for at, value in ((X, numbers.x), (Y, numbers.y)):
        with pytest.raises(ParseError, match="not below the field's prime"):
            SevCertificate.parse(with_bytes(cert, at, (value + P384_PRIME).to_bytes(72, "little")))


def test_a_point_beside_the_curve_is_refused() -> None:
    cert = bare(Usage.PDH, p384())
    y = cert.public_key.public_numbers().y
    with pytest.raises(ParseError, match="PDH key is not a point on P-384"):
        SevCertificate.parse(with_bytes(cert, Y, (y ^ 1).to_bytes(72, "little")))


def test_the_mirrored_point_is_another_key_with_another_fingerprint() -> None:
    cert = bare(Usage.PDH, p384())
    y = cert.public_key.public_numbers().y
    mirrored = SevCertificate.parse(with_bytes(cert, Y, (P384_PRIME - y).to_bytes(72, "little")))
    assert mirrored.fingerprint != cert.fingerprint
    assert mirrored.public_key != cert.public_key


def test_the_constants_of_the_curve_are_right() -> None:
    # G has order n: (n-1)·G is the mirror of G, whose coordinates lie below p.
    base = ec.derive_private_key(1, ec.SECP384R1()).public_key().public_numbers()
    mirror = ec.derive_private_key(P384_ORDER - 1, ec.SECP384R1()).public_key().public_numbers()
    assert mirror.x == base.x
    assert mirror.y + base.y == P384_PRIME


# --- signature slots ---------------------------------------------------------------------------------------------


def _slot(usage: int, algo: int, signature: bytes = b"") -> bytes:
    return struct.pack("<II512s", usage, algo, signature)


def _ecdsa(r: int, s: int, tail: bytes = b"") -> bytes:
    return r.to_bytes(72, "little") + s.to_bytes(72, "little") + tail


@pytest.mark.parametrize("at", [SLOT_1, SLOT_2])
@pytest.mark.parametrize(
    ("slot", "sentence"),
    [
        (_slot(0x1000, 0, b"\x01"), "named empty but is not zero"),
        (_slot(0x1000, 0, bytes(511) + b"\x01"), "named empty but is not zero"),
        (_slot(0x0010, 0, b"\x01"), "named empty but is not zero"),
        (_slot(0x1000, 2), "signer that cannot be: usage 0x1000, algorithm 0x2"),
        (_slot(0x1001, 0), "signer that cannot be"),
        (_slot(0x1004, 0), "signer that cannot be"),
        (_slot(0x0000, 0), "signer that cannot be"),
        (_slot(0x0011, 0), "signer that cannot be: usage 0x11, algorithm 0x0"),
        (_slot(0x0010, 2, _ecdsa(1, 1)), "signer that cannot be"),
        (_slot(0x1003, 2, _ecdsa(1, 1)), "signer that cannot be: usage 0x1003"),
        (_slot(0x1003, 3, _ecdsa(1, 1)), "signer that cannot be"),
        (_slot(0x1001, 0x102, _ecdsa(1, 1)), "signer that cannot be"),
        (_slot(0x0013, 2, _ecdsa(1, 1)), "signer that cannot be"),
        (_slot(0x0000, 0x101, b"\x01"), "signer that cannot be"),
        (_slot(0x1001, 2, _ecdsa(0, 1)), "outside of 1 to n-1"),
        (_slot(0x1001, 2, _ecdsa(1, 0)), "outside of 1 to n-1"),
        (_slot(0x1001, 2, _ecdsa(P384_ORDER, 1)), "outside of 1 to n-1"),
        (_slot(0x1001, 2, _ecdsa(1, P384_ORDER)), "outside of 1 to n-1"),
        (_slot(0x1001, 2, _ecdsa(1, 1, b"\x01")), "bytes after its signature"),
        (_slot(0x1001, 2, _ecdsa(1, 1, bytes(367) + b"\x01")), "bytes after its signature"),
        (_slot(0x0013, 1, bytes(256) + b"\x01"), "bytes after its signature"),
    ],
)
def test_a_slot_out_of_order_is_refused(at: int, slot: bytes, sentence: str) -> None:
    cert = bare(Usage.PEK, p384())
    with pytest.raises(ParseError, match=sentence):
        SevCertificate.parse(with_bytes(cert, at, slot))


@pytest.mark.parametrize(
    "slot",
    [_slot(0x1001, 2, _ecdsa(1, P384_ORDER - 1)), _slot(0x0013, 1, b"\x01"), _slot(0x0013, 0x101, b"\xff" * 512)],
)
def test_a_slot_in_form_is_read_whatever_it_proves(slot: bytes) -> None:
    cert = SevCertificate.parse(with_bytes(bare(Usage.PEK, p384()), SLOT_2, slot))
    assert cert.is_signed


def test_the_slot_that_the_key_service_once_miswrote_reads_as_empty_with_a_warning() -> None:
    platform = make_platform()
    cek = SevCertificate.parse(with_bytes(platform.chain.cek, SLOT_2, _slot(0x0010, 0)))
    assert [slot.is_empty for slot in cek.slots] == [False, True]
    assert cek.warnings == ("signature slot 2 of CEK has usage 0x0010 and no signature; read as empty",)
    verify_signature(cek, platform.ca.ask)


def test_signatures_go_into_the_first_slot_and_then_into_the_second() -> None:
    oca, cek = p384(), p384()
    first = sign(bare(Usage.PEK, p384()), Usage.CEK, cek)
    both = sign(first, Usage.OCA, oca)
    assert [slot.usage for slot in first.slots] == [Usage.CEK, Usage.NONE]
    assert [slot.usage for slot in both.slots] == [Usage.CEK, Usage.OCA]
    with pytest.raises(InvalidInput, match="both signature slots of PEK are taken"):
        sign(both, Usage.OCA, oca)


@pytest.mark.parametrize("usage", [Usage.PDH, Usage.ASK, Usage.ARK, Usage.NONE])
def test_a_key_that_signs_no_certificates_is_refused_as_a_signer(usage: Usage) -> None:
    with pytest.raises(InvalidInput, match="does not sign certificates"):
        add_ecdsa_signature(bare(Usage.PEK, p384()), usage=usage, key=p384())


# --- one signature -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(Usage.OCA, Usage.CEK), (Usage.CEK, Usage.OCA)])
def test_a_signer_is_found_in_either_slot(order: tuple[Usage, Usage]) -> None:
    keys = {usage: p384() for usage in order}
    pek = bare(Usage.PEK, p384())
    for usage in order:
        pek = sign(pek, usage, keys[usage])
    for usage in order:
        verify_signature(pek, bare(usage, keys[usage]))


def test_a_signature_by_another_key_of_the_same_kind_is_refused() -> None:
    pek = sign(bare(Usage.PEK, p384()), Usage.OCA, p384())
    with pytest.raises(BadSignature, match="OCA did not sign this PEK"):
        verify_signature(pek, bare(Usage.OCA, p384()))


def test_a_signature_under_another_kind_of_name_does_not_count() -> None:
    key = p384()
    pek = sign(bare(Usage.PEK, p384()), Usage.OCA, key)
    with pytest.raises(BadSignature, match="PEK carries no signature by CEK"):
        verify_signature(pek, bare(Usage.CEK, key))


def test_two_signatures_in_one_name_are_refused() -> None:
    key = p384()
    pek = sign(sign(bare(Usage.PEK, p384()), Usage.OCA, key), Usage.OCA, key)
    with pytest.raises(BadSignature, match="two signatures by OCA"):
        verify_signature(pek, bare(Usage.OCA, key))


def test_a_signature_over_another_body_is_refused() -> None:
    key = p384()
    signed = sign(bare(Usage.PEK, p384()), Usage.OCA, key)
    other = bare(Usage.PEK, p384())
    forged = SevCertificate.parse(other.body + signed.raw[1044:])
    with pytest.raises(BadSignature, match="OCA did not sign this PEK"):
        verify_signature(forged, bare(Usage.OCA, key))


def test_a_pdh_signs_nothing() -> None:
    key = p384()
    with pytest.raises(BadSignature, match="a PDH key does not sign"):
        bare(Usage.PDH, key).check(b"message", bytes(512))


@pytest.mark.parametrize("bits", [2048, 4096])
def test_an_ask_signs_a_cek_with_the_scheme_of_its_size(bits: int) -> None:
    ca = shared_ca(bits)
    cek = add_rsa_signature(bare(Usage.CEK, p384()), key=ca.ask_key)
    assert cek.slots[0].usage == Usage.ASK
    assert cek.slots[0].algo == {2048: Algo.RSA_SHA256, 4096: Algo.RSA_SHA384}[bits]
    verify_signature(cek, ca.ask)


def test_the_ask_of_another_root_is_refused() -> None:
    cek = add_rsa_signature(bare(Usage.CEK, p384()), key=shared_ca(2048).ark_key)
    with pytest.raises(BadSignature, match="ASK did not sign this CEK"):
        verify_signature(cek, shared_ca(2048).ask)


def test_the_ask_of_rome_does_not_verify_a_cek_in_naples_form() -> None:
    ca = shared_ca(2048)
    cek = add_rsa_signature(bare(Usage.CEK, p384()), key=ca.ask_key)
    with pytest.raises(BadSignature, match="CEK carries no signature by ASK"):
        verify_signature(cek, pinned_roots()[1].ask)


def test_a_certificate_shows_no_bytes_of_itself_where_it_is_printed() -> None:
    cert = bare(Usage.PEK, p384())
    assert repr(cert).startswith("SevCertificate(api_major=1, api_minor=55, usage=<Usage.PEK")
    assert "raw" not in repr(cert)
