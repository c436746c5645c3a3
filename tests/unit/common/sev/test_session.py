"""Opening a session: published known answers, and that only the owner of the PDH can open it."""

from __future__ import annotations

import hmac
import os
from base64 import b64decode

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from common.errors import InvalidInput
from common.sev.abi import Algo, Usage
from common.sev.certs.sev import SevCertificate, encode
from common.sev.kdf import derive
from common.sev.policy import GuestPolicy
from common.sev.session import LaunchKeys, Session, _session_blob, open_session
from tests.support.kbs_wire import kbs_wire

# RFC 5903 section 8.2: both private keys and the shared x coordinate.
_RFC_I = 0x099F3C7034D4A2C699884D73A375A67F7624EF7C6B3C0F160647B67414DCE655E35B538041E649EE3FAEF896783AB194
_RFC_R = 0x41CB0779B4BDB85D47846725FBEC3C9430FAB46CC8DC5060855CC9BDA0AA2942E0308312916B8ED2960E4BD55A7448FC
_RFC_SHARED = bytes.fromhex(
    "11187331c279962d93d604243fd592cb9d0a926f422e47187521287e7156c5c4d603135569b9e9d09cf5d4a270f59746"
)

_KEYS = LaunchKeys(tek=bytes(range(16)), tik=bytes(range(16, 32)))
_NONCE = bytes(range(32, 48))
_IV = bytes(range(48, 64))
_POLICY = GuestPolicy.parse(0x3701000F)


def _open(
    *,
    policy: GuestPolicy = _POLICY,
    godh_key: ec.EllipticCurvePrivateKey | None = None,
    pdh: SevCertificate | None = None,
    nonce: bytes = _NONCE,
    iv: bytes = _IV,
) -> Session:
    return open_session(
        pdh=pdh or _pdh(ec.derive_private_key(_RFC_R, ec.SECP384R1())),
        policy=policy,
        keys=_KEYS,
        godh_key=godh_key or ec.derive_private_key(_RFC_I, ec.SECP384R1()),
        nonce=nonce,
        iv=iv,
    )


def _pdh(key: ec.EllipticCurvePrivateKey) -> SevCertificate:
    return encode(usage=Usage.PDH, algo=Algo.ECDH_SHA256, public_key=key.public_key(), api_major=1, api_minor=55)


def _unwrap(blob: bytes, shared: bytes) -> tuple[bytes, bytes] | None:
    """TEK and TIK as the firmware gets them out; None where the MAC over them is wrong."""
    master = derive(shared, "sev-master-secret", blob[:16])
    if hmac.digest(derive(master, "sev-kik"), blob[16:48], "sha256") != blob[64:96]:
        return None
    decryptor = Cipher(algorithms.AES(derive(master, "sev-kek")), modes.CTR(blob[48:64])).decryptor()
    plain = decryptor.update(blob[16:48]) + decryptor.finalize()
    return plain[:16], plain[16:]


def test_all_zero_inputs_give_the_published_blob() -> None:
    zero = bytes(16)
    blob = _session_blob(shared=zero, policy=GuestPolicy.parse(0), tek=zero, tik=zero, nonce=zero, iv=zero)
    assert blob[16:48].hex() == "2137bc7f9bb8bd7c3e55a576a15d3454b3856b8ba27afadf46dcfee9f02c02c4"
    assert blob[64:96].hex() == "3176c0752738bd9d5e86689534020f528c088f16238826b000b327dee6aeed7d"
    assert blob[96:].hex() == "aa7855e13839dd767cd5da7c1ff5036540c9264b7a803029315e55375287b4af"
    assert blob == b64decode(kbs_wire()["launch_blob_zero"]["b64"])


def test_the_shared_secret_enters_big_endian_as_rfc_5903_writes_it() -> None:
    blob = _open().blob
    assert _unwrap(blob, _RFC_SHARED) == (_KEYS.tek, _KEYS.tik)
    assert _unwrap(blob, _RFC_SHARED[::-1]) is None


def test_the_platform_opens_what_the_owner_wrapped_and_another_platform_does_not() -> None:
    platform = ec.generate_private_key(ec.SECP384R1())
    session = _open(pdh=_pdh(platform), godh_key=ec.generate_private_key(ec.SECP384R1()))
    assert _unwrap(session.blob, platform.exchange(ec.ECDH(), session.godh.public_key)) == (_KEYS.tek, _KEYS.tik)
    other = ec.generate_private_key(ec.SECP384R1())
    assert _unwrap(session.blob, other.exchange(ec.ECDH(), session.godh.public_key)) is None


def test_the_blob_has_its_fields_in_their_places() -> None:
    blob = _open().blob
    assert len(blob) == 128
    assert blob[:16] == _NONCE
    assert blob[48:64] == _IV


def test_the_policy_mac_covers_all_32_bits() -> None:
    assert _open().blob[96:] == hmac.digest(_KEYS.tik, bytes.fromhex("0f000137"), "sha256")
    assert _open(policy=GuestPolicy.parse(0x0F)).blob[96:] != _open().blob[96:]


def test_the_godh_certificate_is_an_unsigned_pdh_of_api_0_0() -> None:
    godh = SevCertificate.parse(_open().godh.raw)
    assert (godh.usage, godh.algo, godh.api_major, godh.api_minor) == (Usage.PDH, Algo.ECDH_SHA256, 0, 0)
    assert not godh.is_signed
    assert godh.raw[1044:] == (bytes.fromhex("0010000000000000") + bytes(512)) * 2
    assert godh.public_key == ec.derive_private_key(_RFC_I, ec.SECP384R1()).public_key()


def test_a_certificate_that_is_no_pdh_is_refused() -> None:
    key = ec.generate_private_key(ec.SECP384R1()).public_key()
    with pytest.raises(InvalidInput, match="no PDH"):
        _open(pdh=encode(usage=Usage.PEK, algo=Algo.ECDSA_SHA256, public_key=key))


def test_a_godh_key_on_another_curve_is_refused() -> None:
    with pytest.raises(InvalidInput, match="P-384"):
        _open(godh_key=ec.generate_private_key(ec.SECP256R1()))


@pytest.mark.parametrize("size", [0, 15, 17])
def test_a_nonce_or_iv_of_another_size_is_refused(size: int) -> None:
    with pytest.raises(InvalidInput, match="nonce has 16 bytes"):
        _open(nonce=bytes(size))
    with pytest.raises(InvalidInput, match="IV has 16 bytes"):
        _open(iv=bytes(size))


def test_generated_keys_are_fresh_and_differ() -> None:
    one, other = LaunchKeys.generate(os.urandom), LaunchKeys.generate(os.urandom)
    assert len({one.tek, one.tik, other.tek, other.tik}) == 4


@pytest.mark.parametrize(
    ("tek", "tik", "message"),
    [
        (bytes(16), b"k" * 16, "TEK is all zero"),
        (b"k" * 16, bytes(16), "TIK is all zero"),
        (b"k" * 16, b"k" * 16, "same key"),
        (b"k" * 15, b"t" * 16, "TEK has 16 bytes, not 15"),
        (b"k" * 16, b"t" * 17, "TIK has 16 bytes, not 17"),
    ],
)
def test_keys_that_protect_nothing_are_refused(tek: bytes, tik: bytes, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        LaunchKeys(tek=tek, tik=tik)


@pytest.mark.parametrize("broken", [bytes, lambda size: b"\x07" * size, lambda _: b"short"])
def test_a_broken_source_of_random_bytes_is_noticed(broken: object) -> None:
    with pytest.raises(InvalidInput):
        LaunchKeys.generate(broken)  # type: ignore[arg-type]  # a list of lambdas has no better type


def test_keys_never_show() -> None:
    shown = f"{_KEYS!r} {_KEYS} {[_KEYS]}"
    assert _KEYS.tek.hex() not in shown
    assert repr(_KEYS.tik) not in shown
    assert "redacted" in shown
