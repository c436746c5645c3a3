"""The firmware's commands for a guest: its launch from session to secret, its report, and each refusal's status."""

from __future__ import annotations

import hmac
import os
import struct
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from uuid import UUID

import pytest

from common.sev.abi import GuestState, PlatformState, Status
from common.sev.errors import BadSignature
from common.sev.measurement import FirmwareVersion, MeasurementBlob, match
from common.sev.policy import GuestPolicy
from common.sev.report import AttestationReport
from common.sev.secret import SecretEntry, build_table
from emulator.errors import FirmwareFailed
from emulator.psp import Psp
from tests.support.software_psp import (
    export,
    flipped,
    make_owner,
    make_psp,
    raw_session,
    started,
    status_fields,
    status_of,
)


def test_a_launch_is_measured_as_the_owner_expects(psp: Psp) -> None:
    handle, owner = started(psp, 0x7)
    psp.launch_update_data(handle, 0xFFC00000, b"firmware" * 512)
    psp.launch_update_data(handle, 0x810C00, b"t" * 176)
    psp.launch_update_vmsa(handle, 0, b"v" * 4096)
    blob = MeasurementBlob.parse(psp.launch_measure(handle, 48))
    digest = sha256(b"firmware" * 512 + b"t" * 176 + b"v" * 4096).digest()
    other = sha256(b"firmware" * 512 + b"v" * 4096 + b"t" * 176).digest()

    def matches(version: FirmwareVersion, policy: int, *digests: bytes) -> int | None:
        word = GuestPolicy(value=policy)
        return match(tik=owner.keys.tik, blob=blob, firmware=version, policy=word, digests=digests)

    assert matches(FirmwareVersion(1, 55, 24), 0x7, other, digest) == 1
    assert matches(FirmwareVersion(1, 55, 24), 0x7, other) is None
    assert matches(FirmwareVersion(1, 55, 23), 0x7, digest) is None
    assert matches(FirmwareVersion(1, 55, 24), 0x5, digest) is None


def test_two_launches_have_two_nonces(psp: Psp) -> None:
    blobs = set()
    for _ in range(2):
        handle, _ = started(psp)
        blobs.add(psp.launch_measure(handle, 48)[32:])
    assert len(blobs) == 2


def test_a_question_for_the_length_leaves_the_launch_open(psp: Psp) -> None:
    handle, _ = started(psp)
    with pytest.raises(FirmwareFailed) as failure:
        psp.launch_measure(handle, 0)
    assert (failure.value.status, failure.value.lengths) == (Status.INVALID_LEN, (48,))
    psp.launch_update_data(handle, 0, bytes(16))
    assert len(psp.launch_measure(handle, 48)) == 48


def test_the_guest_gets_the_secret_and_nothing_of_it_after_finish(psp: Psp) -> None:
    handle, owner = started(psp)
    measurement = psp.launch_measure(handle, 48)[:32]
    table = build_table([SecretEntry(guid=UUID(int=7), data=b"the owner's secret")])
    packet = owner.packet(table, measurement)

    def inject() -> bytes:
        return psp.launch_secret(
            handle, address=0x810000, header=packet.header, payload=packet.payload, guest_length=len(table)
        )

    assert inject() == table
    assert inject() == table  # the firmware does not count packets
    psp.launch_finish(handle)
    assert status_of(inject) is Status.INVALID_GUEST_STATE
    assert psp.guests[0].channel.tek == bytes(16)


def test_a_packet_of_another_launch_is_refused(psp: Psp) -> None:
    first, owner = started(psp)
    second = psp.launch_start(policy=owner.policy, godh=owner.godh, session=owner.session)
    psp.activate(second, 2)
    packet = owner.packet(b"s" * 32, psp.launch_measure(first, 48)[:32])
    psp.launch_measure(second, 48)

    def inject(handle: int) -> bytes:
        return psp.launch_secret(handle, address=0, header=packet.header, payload=packet.payload, guest_length=32)

    assert status_of(lambda: inject(second)) is Status.BAD_MEASUREMENT
    assert inject(first)


def test_a_packet_with_any_bit_changed_is_refused(psp: Psp) -> None:
    handle, owner = started(psp)
    packet = owner.packet(b"s" * 32, psp.launch_measure(handle, 48)[:32])
    for bit in range(0, 8 * len(packet.header), 7):
        header = flipped(packet.header, bit)
        assert (
            status_of(
                lambda: psp.launch_secret(
                    handle,
                    address=0,
                    header=header,  # noqa: B023 -- called at once
                    payload=packet.payload,
                    guest_length=32,
                )
            )
            is Status.BAD_MEASUREMENT
        )


@pytest.mark.parametrize(
    ("address", "header", "payload", "status"),
    [
        (8, 52, 32, Status.INVALID_ADDRESS),
        (0, 51, 32, Status.INVALID_LEN),
        (0, 52, 24, Status.INVALID_LEN),
        (0, 52, 0, Status.INVALID_LEN),
    ],
)
def test_a_packet_of_another_shape_is_refused(
    psp: Psp, address: int, header: int, payload: int, status: Status
) -> None:
    handle, _ = started(psp)
    psp.launch_measure(handle, 48)
    assert (
        status_of(
            lambda: psp.launch_secret(
                handle, address=address, header=bytes(header), payload=bytes(payload), guest_length=payload
            )
        )
        is status
    )


@pytest.mark.parametrize("bit", range(0, 128 * 8, 41))
def test_a_session_with_any_bit_changed_starts_nothing(psp: Psp, bit: int) -> None:
    psp.init()
    owner = make_owner(psp, 0x7)
    session = flipped(owner.session, bit)
    assert status_of(lambda: psp.launch_start(policy=0x7, godh=owner.godh, session=session)) is Status.BAD_MEASUREMENT
    assert psp.state is PlatformState.INIT


@pytest.mark.parametrize("policy", [0x6, 0x3, 0xF, 0x7 | 1 << 16, 0])
def test_another_policy_than_the_owners_starts_nothing(psp: Psp, policy: int) -> None:
    psp.init()
    owner = make_owner(psp, 0x7)
    assert (
        status_of(lambda: psp.launch_start(policy=policy, godh=owner.godh, session=owner.session))
        is Status.BAD_MEASUREMENT
    )


def test_a_session_for_the_pdh_before_is_stale(psp: Psp) -> None:
    psp.init()
    owner = make_owner(psp, 0x7)
    psp.pdh_gen()
    assert (
        status_of(lambda: psp.launch_start(policy=0x7, godh=owner.godh, session=owner.session))
        is Status.BAD_MEASUREMENT
    )


@pytest.mark.parametrize(
    ("policy", "allowed"),
    [
        (0x1 | 1 << 16 | 55 << 24, True),
        (0x1 | 0 << 16 | 200 << 24, True),
        (0x1 | 1 << 16 | 56 << 24, False),
        (0x1 | 2 << 16, False),
        (0x1 | 1 << 6, False),
        (0x1 | 1 << 15, False),
    ],
)
def test_the_policys_own_conditions_hold_with_and_without_owner(psp: Psp, policy: int, *, allowed: bool) -> None:
    psp.init()
    godh, session = raw_session(psp, policy)
    starts: list[Callable[[], int]] = [
        lambda: psp.launch_start(policy=policy, godh=godh, session=session),
        lambda: psp.launch_start(policy=policy),
    ]
    for start in starts:
        if allowed:
            assert start()
        else:
            assert status_of(start) is Status.POLICY_FAILURE


def test_without_an_owner_the_keys_are_zero_and_the_measurement_proves_nothing(psp: Psp) -> None:
    psp.init()
    handle = psp.launch_start(policy=0x1)
    psp.activate(handle, 1)
    blob = psp.launch_measure(handle, 48)
    covered = bytes([4, 1, 55, 24]) + (1).to_bytes(4, "little") + sha256().digest() + blob[32:]
    assert hmac.digest(bytes(16), covered, "sha256") == blob[:32]


def _changed_godh(godh: bytes, at: int, value: bytes) -> bytes:
    return godh[:at] + value + godh[at + len(value) :]


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (0, struct.pack("<I", 2)),
        (8, struct.pack("<I", 0x1002)),
        (12, struct.pack("<I", 2)),
        (16, struct.pack("<I", 1)),
        (20, bytes(48)),
        (20, b"\xff" * 48),
        (20 + 60, b"\1"),
        (92, b"\1" * 48),
    ],
)
def test_a_godh_that_is_no_point_of_p384_is_an_invalid_certificate(psp: Psp, at: int, value: bytes) -> None:
    psp.init()
    owner = make_owner(psp, 0x7)
    godh = _changed_godh(owner.godh, at, value)
    assert (
        status_of(lambda: psp.launch_start(policy=0x7, godh=godh, session=owner.session)) is Status.INVALID_CERTIFICATE
    )


def test_signatures_of_a_godh_are_ignored_as_the_firmware_does(psp: Psp) -> None:
    psp.init()
    owner = make_owner(psp, 0x7)
    godh = _changed_godh(owner.godh, 1044, os.urandom(1040))
    assert psp.launch_start(policy=0x7, godh=godh, session=owner.session)


@pytest.mark.parametrize(("godh", "session"), [(2083, 128), (2085, 128), (2084, 127), (2084, 0), (128, 2084)])
def test_swapped_or_cut_session_files_are_an_invalid_length(psp: Psp, godh: int, session: int) -> None:
    psp.init()
    assert status_of(lambda: psp.launch_start(policy=1, godh=bytes(godh), session=bytes(session))) is Status.INVALID_LEN


def test_a_memory_key_is_shared_only_under_one_policy_that_allows_it(psp: Psp) -> None:
    psp.init()
    sharing, closed = psp.launch_start(policy=0x1), psp.launch_start(policy=0x3)
    assert psp.launch_start(policy=0x1, shared=sharing)
    assert status_of(lambda: psp.launch_start(policy=0x3, shared=closed)) is Status.POLICY_FAILURE
    assert status_of(lambda: psp.launch_start(policy=0x9, shared=sharing)) is Status.POLICY_FAILURE
    assert status_of(lambda: psp.launch_start(policy=0x1, shared=99)) is Status.INVALID_GUEST


def test_a_save_area_is_measured_for_es_guests_only(psp: Psp) -> None:
    handle, _ = started(psp, 0x3)
    assert status_of(lambda: psp.launch_update_vmsa(handle, 0, bytes(4096))) is Status.UNSUPPORTED
    es, _ = started(psp, 0x7)
    psp.launch_update_vmsa(es, 0, bytes(4096))
    assert status_of(lambda: psp.launch_update_vmsa(es, 0, bytes(4080))) is Status.INVALID_LEN


def test_an_es_guest_needs_a_platform_with_es(tmp_path: Path) -> None:
    psp = make_psp(tmp_path, "milan", es=False)
    psp.init()
    assert status_fields(psp)[3] == 0
    assert status_of(lambda: psp.launch_start(policy=0x4)) is Status.UNSUPPORTED
    assert psp.launch_start(policy=0x1)


@pytest.mark.parametrize(
    ("address", "size", "status"),
    [(0, 15, Status.INVALID_LEN), (0, 0, Status.INVALID_LEN), (1, 16, Status.INVALID_ADDRESS)],
)
def test_measured_memory_comes_in_blocks_of_sixteen(psp: Psp, address: int, size: int, status: Status) -> None:
    handle, _ = started(psp)
    assert status_of(lambda: psp.launch_update_data(handle, address, bytes(size))) is status


def test_a_guest_without_asid_cannot_be_written(psp: Psp) -> None:
    psp.init()
    handle = psp.launch_start(policy=1)
    assert status_of(lambda: psp.launch_update_data(handle, 0, bytes(16))) is Status.INACTIVE
    psp.activate(handle, 5)
    psp.launch_update_data(handle, 0, bytes(16))


def test_asids_belong_to_one_guest_at_a_time(psp: Psp) -> None:
    psp.init()
    first, second = psp.launch_start(policy=1), psp.launch_start(policy=1)
    psp.activate(first, 1)
    assert status_of(lambda: psp.activate(second, 1)) is Status.ASID_OWNED
    assert status_of(lambda: psp.activate(first, 2)) is Status.ACTIVE
    assert status_of(lambda: psp.activate(second, 0)) is Status.INVALID_ASID
    assert status_of(lambda: psp.activate(second, 510)) is Status.INVALID_ASID
    assert status_of(lambda: psp.decommission(first)) is Status.ACTIVE
    assert status_of(lambda: psp.deactivate(second)) is Status.INACTIVE
    psp.deactivate(first)
    psp.activate(second, 1)


def test_a_platform_has_room_for_so_many_guests(tmp_path: Path) -> None:
    psp = make_psp(tmp_path, "naples")
    psp.init()
    for _ in range(15):
        psp.launch_start(policy=1)
    assert status_of(lambda: psp.launch_start(policy=1)) is Status.RESOURCE_LIMIT
    psp.decommission(3)
    assert psp.launch_start(policy=1) == 16


def test_a_handle_that_nobody_has_is_an_invalid_guest(psp: Psp) -> None:
    handle, _ = started(psp)
    assert status_of(lambda: psp.launch_measure(handle + 1, 48)) is Status.INVALID_GUEST
    assert psp.guest_status(handle + 1) == (0, 0, GuestState.UNINIT)


def test_a_report_is_signed_by_the_pek_over_nonce_digest_and_policy(psp: Psp) -> None:
    handle, _ = started(psp, 0x7)
    psp.launch_update_data(handle, 0, b"x" * 16)
    psp.launch_measure(handle, 48)
    raw = psp.attestation(handle, b"n" * 16, 208)
    report = AttestationReport.parse(raw)
    report.verify(export(psp)[1])
    assert raw[:52] == b"n" * 16 + sha256(b"x" * 16).digest() + (7).to_bytes(4, "little")
    for bit in (0, 128, 8 * 50, 8 * 70):
        with pytest.raises(BadSignature):
            AttestationReport.parse(flipped(raw, bit)).verify(export(psp)[1])


def test_a_report_needs_room_and_a_firmware_that_makes_them(psp: Psp, tmp_path: Path) -> None:
    handle, _ = started(psp)
    psp.launch_measure(handle, 48)
    with pytest.raises(FirmwareFailed) as failure:
        psp.attestation(handle, bytes(16), 207)
    assert (failure.value.status, failure.value.lengths) == (Status.INVALID_LEN, (208,))
    old = make_psp(tmp_path / "old", "naples")
    handle, _ = started(old)
    old.launch_measure(handle, 48)
    assert status_of(lambda: old.attestation(handle, bytes(16), 208)) is Status.INVALID_COMMAND
