"""The firmware's commands for the platform: its state, its keys and chain, and who owns it."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from common.sev.abi import Algo, Status, Usage
from common.sev.certs.sev import SevCertificate, add_ecdsa_signature, encode, verify_signature
from common.sev.errors import BadSignature
from emulator.errors import FirmwareFailed
from emulator.psp import Psp
from tests.support.software_psp import export, flipped, make_psp, started, status_fields, status_of


def test_an_uninitialised_platform_hides_owner_features_and_guests(psp: Psp) -> None:
    assert status_fields(psp) == (1, 55, 0, 0, 24, 0)
    psp.init()
    assert status_fields(psp) == (1, 55, 1, 0x100, 24, 0)


def test_a_guest_makes_the_platform_work_and_its_end_lets_it_rest(psp: Psp) -> None:
    handle, _ = started(psp)
    assert status_fields(psp) == (1, 55, 2, 0x100, 24, 1)
    psp.deactivate(handle)
    psp.decommission(handle)
    assert status_fields(psp) == (1, 55, 1, 0x100, 24, 0)


def test_the_exported_chain_is_signed_as_real_ones_are(psp: Psp) -> None:
    psp.init()
    pdh, pek, oca, cek = export(psp)
    assert [cert.usage for cert in (pdh, pek, oca, cek)] == [Usage.PDH, Usage.PEK, Usage.OCA, Usage.CEK]
    verify_signature(pdh, pek)
    verify_signature(pek, oca)
    verify_signature(pek, cek)
    verify_signature(oca, oca)
    assert [slot.usage for slot in pek.slots] == [Usage.OCA, Usage.CEK]
    assert not cek.is_signed
    with pytest.raises(BadSignature):
        verify_signature(pdh, oca)


def test_the_csr_is_the_pek_with_empty_slots(psp: Psp) -> None:
    psp.init()
    csr = SevCertificate.parse(psp.pek_csr(2084))
    assert csr.body == export(psp)[1].body
    assert not csr.is_signed
    assert [(slot.usage, slot.algo) for slot in csr.slots] == [(0x1000, 0), (0x1000, 0)]


def test_short_buffers_are_told_the_length_that_would_do(psp: Psp) -> None:
    psp.init()
    for action, lengths in (
        (lambda: psp.pek_csr(2083), (2084,)),
        (lambda: psp.pdh_cert_export(2083, 6252), (2084, 6252)),
        (lambda: psp.pdh_cert_export(2084, 0), (2084, 6252)),
        (lambda: psp.get_id(63), (64,)),
    ):
        with pytest.raises(FirmwareFailed) as failure:
            action()
        assert failure.value.status is Status.INVALID_LEN
        assert failure.value.lengths == lengths


def test_pek_gen_renews_owner_pek_and_pdh_but_not_the_chip(psp: Psp) -> None:
    psp.init()
    before = export(psp)
    psp.pek_gen()
    after = export(psp)
    assert [old.body == new.body for old, new in zip(before, after, strict=True)] == [False, False, False, True]


def test_pdh_gen_renews_the_pdh_alone(psp: Psp) -> None:
    psp.init()
    before = export(psp)
    psp.pdh_gen()
    after = export(psp)
    assert [old == new for old, new in zip(before, after, strict=True)] == [False, True, True, True]
    verify_signature(after[0], after[1])


def test_the_keys_outlive_a_shutdown_and_a_new_process(psp: Psp, tmp_path: Path) -> None:
    psp.init()
    before = export(psp)
    psp.shutdown()
    psp.init()
    assert export(psp) == before
    again = make_psp(tmp_path, "milan")
    again.init()
    assert export(again) == before


def test_a_reset_leaves_no_key_but_the_chips(psp: Psp) -> None:
    psp.init()
    before = export(psp)
    psp.shutdown()
    psp.platform_reset()
    psp.init()
    after = export(psp)
    assert [old.body == new.body for old, new in zip(before, after, strict=True)] == [False, False, False, True]


def _owner_signed(psp: Psp) -> tuple[bytes, bytes, ec.EllipticCurvePrivateKey]:
    key = ec.generate_private_key(ec.SECP384R1())
    oca = encode(usage=Usage.OCA, algo=Algo.ECDSA_SHA256, public_key=key.public_key())
    oca = add_ecdsa_signature(oca, usage=Usage.OCA, key=key)
    pek = add_ecdsa_signature(SevCertificate.parse(psp.pek_csr(2084)), usage=Usage.OCA, key=key)
    return pek.raw, oca.raw, key


def test_an_import_gives_the_platform_an_owner_and_a_new_pdh(psp: Psp) -> None:
    psp.init()
    before = export(psp)
    pek, oca, _ = _owner_signed(psp)
    psp.pek_cert_import(pek, oca)
    after = export(psp)
    assert status_fields(psp)[3] == 0x101
    assert after[2].raw == oca
    assert after[1].body == before[1].body
    assert after[0].body != before[0].body
    verify_signature(after[1], after[2])
    verify_signature(after[1], after[3])
    assert status_of(lambda: psp.pek_cert_import(pek, oca)) is Status.ALREADY_OWNED


def test_pek_gen_and_reset_take_the_owner_away(psp: Psp) -> None:
    psp.init()
    psp.pek_cert_import(*_owner_signed(psp)[:2])
    psp.pek_gen()
    assert status_fields(psp)[3] == 0x100
    psp.pek_cert_import(*_owner_signed(psp)[:2])
    psp.shutdown()
    psp.platform_reset()
    psp.init()
    assert status_fields(psp)[3] == 0x100


def test_an_import_that_is_not_right_changes_nothing(psp: Psp) -> None:
    psp.init()
    pek, oca, key = _owner_signed(psp)
    stranger = ec.generate_private_key(ec.SECP384R1())
    csr = SevCertificate.parse(psp.pek_csr(2084))
    other_pek = encode(usage=Usage.PEK, algo=Algo.ECDSA_SHA256, public_key=stranger.public_key())
    twice = add_ecdsa_signature(add_ecdsa_signature(csr, usage=Usage.CEK, key=stranger), usage=Usage.OCA, key=key)
    cases = [
        (pek[:-1], oca, Status.INVALID_LEN),
        (pek, oca + b"\0", Status.INVALID_LEN),
        (oca, pek, Status.INVALID_CERTIFICATE),
        (flipped(pek, 8), oca, Status.INVALID_CERTIFICATE),
        (csr.raw, oca, Status.BAD_SIGNATURE),
        (add_ecdsa_signature(csr, usage=Usage.OCA, key=stranger).raw, oca, Status.BAD_SIGNATURE),
        (pek, flipped(oca, 8 * 1060), Status.BAD_SIGNATURE),
        (add_ecdsa_signature(other_pek, usage=Usage.OCA, key=key).raw, oca, Status.INVALID_CERTIFICATE),
        (twice.raw, oca, Status.INVALID_CERTIFICATE),
    ]
    before = export(psp)
    for bad_pek, bad_oca, status in cases:
        assert status_of(lambda: psp.pek_cert_import(bad_pek, bad_oca)) is status  # noqa: B023 -- called at once
    assert export(psp) == before
    psp.pek_cert_import(pek, oca)


def test_the_chip_id_is_a_point_and_the_second_socket_is_empty(psp: Psp) -> None:
    one, both = psp.get_id(64), psp.get_id(128)
    assert both == one + bytes(64)
    x, y = int.from_bytes(one[:32], "big"), int.from_bytes(one[32:], "big")
    ec.EllipticCurvePublicNumbers(x, y, ec.SECP256R1()).public_key()
