"""ASK and ARK: codec and signatures, with AMD's own certificates and their evil twins."""

from __future__ import annotations

import struct

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from common.errors import InvalidInput
from common.sev.abi import Algo, Usage
from common.sev.certs import amd, pss
from common.sev.certs.amd import AmdCertificate, CaChain, verify_amd_signature
from common.sev.certs.roots import pinned_roots
from common.sev.errors import BadSignature, ParseError
from tests.support.chains import fresh_ca, make_ca, shared_ca, with_bytes

GENERATIONS = [root.generation for root in pinned_roots()]


@pytest.mark.parametrize("bits", [2048, 4096])
def test_what_is_encoded_is_decoded_again(bits: int) -> None:
    ca = shared_ca(bits)
    for cert, key, usage in ((ca.ask, ca.ask_key, Usage.ASK), (ca.ark, ca.ark_key, Usage.ARK)):
        again = AmdCertificate.parse(cert.raw)
        assert again == cert
        assert again.usage is usage
        assert again.public_key == key.public_key()
        assert again.certifying_id == ca.ark.key_id
        assert len(again.raw) == {2048: 832, 4096: 1600}[bits]
        assert len(again.body) == {2048: 576, 4096: 1088}[bits]
        assert len(again.fingerprint) == {2048: 32, 4096: 48}[bits]
        assert again.body + again.signature == again.raw
        assert again.algo is {2048: Algo.RSA_SHA256, 4096: Algo.RSA_SHA384}[bits]


@pytest.mark.parametrize("generation", GENERATIONS)
def test_amds_ark_signs_itself_and_its_ask(generation: str) -> None:
    root = next(root for root in pinned_roots() if root.generation == generation)
    verify_amd_signature(root.ark, root.ark)
    verify_amd_signature(root.ask, root.ark)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_ark_of_another_generation_signs_nothing_of_this_one(generation: str) -> None:
    roots = {root.generation: root for root in pinned_roots()}
    for other in set(roots) - {generation}:
        with pytest.raises(BadSignature, match="names another key"):
            verify_amd_signature(roots[generation].ask, roots[other].ark)


def test_an_ark_with_the_right_key_id_but_another_key_is_refused() -> None:
    with pytest.raises(BadSignature, match="ARK did not sign this ASK"):
        verify_amd_signature(shared_ca().ask, fresh_ca().ark)


def test_an_ask_signs_no_ask() -> None:
    ca = shared_ca()
    with pytest.raises(BadSignature, match="ASK does not sign AMD's certificates"):
        verify_amd_signature(ca.ask, ca.ask)


def test_an_ark_that_names_another_signer_than_itself_is_not_self_signed() -> None:
    key = shared_ca().ark_key
    ark = amd.encode(
        usage=Usage.ARK, key_id=bytes(16), certifying_id=b"\x01" * 16, public_key=key.public_key(), signer=key
    )
    with pytest.raises(BadSignature, match="names another key"):
        verify_amd_signature(ark, ark)


def test_an_ark_of_another_size_did_not_sign() -> None:
    small, large = shared_ca(2048), shared_ca(4096)
    with pytest.raises(BadSignature, match="ARK did not sign this ASK"):
        verify_amd_signature(small.ask, large.ark)


@pytest.mark.parametrize("salt", [0, 20, 31, 33, 48])
def test_a_salt_of_another_length_than_the_digest_is_refused(salt: int) -> None:
    ca = shared_ca(2048)
    scheme = padding.PSS(mgf=padding.MGF1(hashes.SHA256()), salt_length=salt)
    signature = ca.ark_key.sign(ca.ask.body, scheme, hashes.SHA256())[::-1]
    with pytest.raises(BadSignature, match="ARK did not sign this ASK"):
        verify_amd_signature(AmdCertificate.parse(ca.ask.body + signature), ca.ark)


def test_a_mask_function_with_another_hash_is_refused() -> None:
    ca = shared_ca(2048)
    scheme = padding.PSS(mgf=padding.MGF1(hashes.SHA1()), salt_length=32)  # noqa: S303 -- the evil twin
    signature = ca.ark_key.sign(ca.ask.body, scheme, hashes.SHA256())[::-1]
    with pytest.raises(BadSignature):
        verify_amd_signature(AmdCertificate.parse(ca.ask.body + signature), ca.ark)


def test_the_hash_follows_from_the_key_size() -> None:
    ca = shared_ca(4096)
    scheme = padding.PSS(mgf=padding.MGF1(hashes.SHA256()), salt_length=32)
    signature = ca.ark_key.sign(ca.ask.body, scheme, hashes.SHA256())[::-1]
    with pytest.raises(BadSignature):
        verify_amd_signature(AmdCertificate.parse(ca.ask.body + signature), ca.ark)


def test_a_signature_plus_the_modulus_is_refused() -> None:
    ca = shared_ca(2048)
    modulus = ca.ark_key.public_key().public_numbers().n
    larger = int.from_bytes(ca.ask.signature, "little") + modulus
    if larger < 1 << 2048:
        forged = AmdCertificate.parse(ca.ask.body + larger.to_bytes(256, "little"))
        with pytest.raises(BadSignature):
            verify_amd_signature(forged, ca.ark)
    with pytest.raises(BadSignature):
        pss.verify(ca.ark.public_key, modulus.to_bytes(256, "little"), ca.ask.body)


@pytest.mark.parametrize("size", [0, 1, 576, 831, 833, 1088, 1599, 1601, 1664, 2084])
def test_another_size_is_refused(size: int) -> None:
    with pytest.raises(ParseError, match=f"832 or 1600 bytes, not {size}"):
        AmdCertificate.parse(bytes(size))


def _u32(value: int) -> bytes:
    return struct.pack("<I", value)


@pytest.mark.parametrize("bits", [2048, 4096])
@pytest.mark.parametrize(
    ("at", "new", "sentence"),
    [
        (0, _u32(0), "version 0 is unknown"),
        (0, _u32(2), "version 2 is unknown"),
        (36, _u32(Usage.CEK), "no usage 0x1004"),
        (36, _u32(0x1000), "no usage 0x1000"),
        (40, b"\x01", "reserved bytes"),
        (55, b"\x80", "reserved bytes"),
        (56, _u32(32), "not what its fields say"),
        (60, _u32(1024), "not what its fields say"),
        (60, _u32(0xFFFFFFFF), "not what its fields say"),
        (64, b"\x03\x00\x00", "exponent"),
        (68, b"\x01", "exponent"),
    ],
)
def test_a_field_out_of_order_is_refused(bits: int, at: int, new: bytes, sentence: str) -> None:
    with pytest.raises(ParseError, match=sentence):
        AmdCertificate.parse(with_bytes(shared_ca(bits).ark, at, new))


@pytest.mark.parametrize("bits", [2048, 4096])
def test_a_modulus_shorter_than_its_field_is_refused(bits: int) -> None:
    last = 64 + 2 * (bits // 8) - 1
    with pytest.raises(ParseError, match=f"does not have {bits} bits"):
        AmdCertificate.parse(with_bytes(shared_ca(bits).ark, last, b"\x7f"))


@pytest.mark.parametrize("size", [831, 1408, 1663, 1665, 3199, 3201, 0])
def test_a_pair_of_another_size_is_refused(size: int) -> None:
    with pytest.raises(ParseError, match="1664 or 3200 bytes together"):
        CaChain.parse(bytes(size))


def test_a_pair_is_ask_and_ark_in_this_order() -> None:
    ca = shared_ca()
    assert CaChain.parse(ca.ask.raw + ca.ark.raw) == ca.chain
    assert ca.chain.to_bytes() == ca.to_bytes()
    for pair in ((ca.ark, ca.ask), (ca.ask, ca.ask), (ca.ark, ca.ark)):
        with pytest.raises(ParseError, match="not an ASK followed by an ARK"):
            CaChain.parse(pair[0].raw + pair[1].raw)


def test_a_certificate_that_amd_does_not_make_is_not_encoded() -> None:
    ca = shared_ca()
    odd = rsa.generate_private_key(public_exponent=65537, key_size=3072)
    for usage, key, signer, key_id in (
        (Usage.CEK, ca.ask_key, ca.ark_key, bytes(16)),
        (Usage.ASK, odd, odd, bytes(16)),
        (Usage.ASK, ca.ask_key, shared_ca(4096).ark_key, bytes(16)),
        (Usage.ASK, ca.ask_key, ca.ark_key, bytes(15)),
    ):
        with pytest.raises(InvalidInput):
            amd.encode(usage=usage, key_id=key_id, certifying_id=bytes(16), public_key=key.public_key(), signer=signer)


def test_amd_has_keys_of_two_sizes() -> None:
    with pytest.raises(InvalidInput, match="no 3072-bit keys"):
        pss.algo_of(3072)


def test_bytes_after_a_short_signature_in_its_slot_are_refused() -> None:
    ca = make_ca(ask_key_id=bytes(16))
    signature = pss.sign(ca.ask_key, b"message")
    ca.ask.check(b"message", signature.ljust(512, b"\0"))
    with pytest.raises(BadSignature, match="bytes follow"):
        ca.ask.check(b"message", signature.ljust(511, b"\0") + b"\x01")
