"""An owner for one test launch: knows its own, shares nothing, shows nothing."""

from __future__ import annotations

import secrets
from uuid import UUID

import pytest

from common.errors import Reason, WrongState
from common.sev.measurement import FirmwareVersion, MeasurementBlob, measure
from common.sev.policy import GuestPolicy
from common.sev.throwaway import ThrowawayOwner
from tests.support.chains import make_platform

POLICY = GuestPolicy.parse(0xF)
VERSION = FirmwareVersion(1, 55, 24)
NAME = UUID("5e1f7e57-0000-4000-8000-000000000001")


@pytest.fixture
def owner() -> ThrowawayOwner:
    return ThrowawayOwner(make_platform().chain.pdh, POLICY, secrets.token_bytes)


def blob_of(owner: ThrowawayOwner, digest: bytes) -> MeasurementBlob:
    nonce = bytes(16)
    mac = measure(tik=owner._keys.tik, firmware=VERSION, policy=POLICY, digest=digest, nonce=nonce)
    return MeasurementBlob(measurement=mac, nonce=nonce)


def test_it_knows_its_own_launch_and_no_other(owner: ThrowawayOwner) -> None:
    blob = blob_of(owner, b"a" * 32)
    assert owner.match(blob, VERSION, [b"b" * 32, b"a" * 32]) == 1
    assert owner.match(blob, VERSION, [b"b" * 32]) is None
    assert owner.match(blob, FirmwareVersion(1, 55, 25), [b"a" * 32]) is None
    other = ThrowawayOwner(make_platform().chain.pdh, POLICY, secrets.token_bytes)
    assert other.match(blob, VERSION, [b"a" * 32]) is None


def test_two_owners_share_nothing() -> None:
    pdh = make_platform().chain.pdh
    first, second = (ThrowawayOwner(pdh, POLICY, secrets.token_bytes) for _ in range(2))
    assert first.session.godh.raw != second.session.godh.raw
    assert first.session.blob[:32] != second.session.blob[:32]


def test_its_packets_never_repeat_an_iv_and_stay_in_the_area(owner: ThrowawayOwner) -> None:
    blob = blob_of(owner, b"a" * 32)
    first, second = (owner.packet(NAME, b"nothing", blob=blob, area_size=3072) for _ in range(2))
    assert first.header[4:20] != second.header[4:20]
    for size, reason in ((0, Reason.NO_SECRET_AREA), (32, Reason.SECRET_TOO_LARGE)):
        with pytest.raises(WrongState) as refused:
            owner.packet(NAME, b"nothing", blob=blob, area_size=size)
        assert refused.value.reason is reason


def test_its_keys_never_show(owner: ThrowawayOwner) -> None:
    shown = repr(owner) + repr(owner.__dict__) + str(owner)
    for key in (owner._keys.tek, owner._keys.tik):
        assert key.hex() not in shown
        assert repr(key)[2:-1] not in shown
