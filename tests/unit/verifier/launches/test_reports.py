"""Attestation reports: genuine by the platform's PEK, acceptable by the launch they should show."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from common.errors import Reason, SevattestError
from tests.support.desk import Desk, desk, refused
from tests.support.documents import CALLER, STRANGER, revocation
from verifier.launches.launch import Begun

NONCE = b"0123456789abcdef"


def signed(key: ec.EllipticCurvePrivateKey, *, nonce: bytes, digest: bytes, policy: int) -> bytes:
    """A report as a PSP makes it, written from the layout."""
    body = nonce + digest + struct.pack("<I", policy)
    r, s = decode_dss_signature(key.sign(body, ec.ECDSA(hashes.SHA256())))
    return body + struct.pack("<III", 0x1002, 2, 0) + r.to_bytes(72, "little") + s.to_bytes(72, "little")


async def launched(d: Desk) -> tuple[Begun, bytes]:
    begun = await d.begin()
    digest = (await d.digests())[0]
    await d.release(begun.launch.launch_id, d.start(begun).measure(digest))
    return begun, digest


async def verify(d: Desk, launch_id: UUID, report: bytes, *, caller: str = CALLER) -> Any:
    return await d.reports.verify(caller=caller, launch_id=launch_id, nonce=NONCE, report=report)


async def test_a_report_of_the_launched_guest_is_verified(tmp_path: Path) -> None:
    async with desk(tmp_path) as d:
        begun, digest = await launched(d)
        report = signed(d.platform.keys.pek, nonce=NONCE, digest=digest, policy=begun.policy)
        verified = await verify(d, begun.launch.launch_id, report)
        assert (verified.digest, verified.policy.value) == (digest, begun.policy)
        assert d.audit(begun.launch.launch_id)[-1].event == "report.verified"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"nonce": bytes(16)}, Reason.REPORT_REFUSED),
        ({"digest": bytes(32)}, Reason.REPORT_REFUSED),
        ({"policy": 5}, Reason.REPORT_REFUSED),
    ],
)
async def test_a_genuine_report_of_something_else_is_refused(
    tmp_path: Path, change: dict[str, Any], reason: Reason
) -> None:
    async with desk(tmp_path) as d:
        begun, digest = await launched(d)
        said: dict[str, Any] = {"nonce": NONCE, "digest": digest, "policy": begun.policy}
        with pytest.raises(SevattestError) as caught:
            await verify(d, begun.launch.launch_id, signed(d.platform.keys.pek, **said | change))
        assert caught.value.reason is reason
        assert d.audit(begun.launch.launch_id)[-1].event == "report.refused"


async def test_a_report_by_another_key_or_changed_is_refused(tmp_path: Path) -> None:
    async with desk(tmp_path) as d:
        begun, digest = await launched(d)
        said: dict[str, Any] = {"nonce": NONCE, "digest": digest, "policy": begun.policy}
        forged = signed(d.platform.keys.oca, **said)
        good = bytearray(signed(d.platform.keys.pek, **said))
        good[0x40] ^= 1
        for report in (forged, bytes(good)):
            with pytest.raises(SevattestError) as caught:
                await verify(d, begun.launch.launch_id, report)
            assert caught.value.reason is Reason.BAD_SIGNATURE


async def test_bytes_that_are_no_report_are_malformed(tmp_path: Path) -> None:
    async with desk(tmp_path) as d:
        begun, _ = await launched(d)
        for report in (bytes(208), bytes(207)):
            with pytest.raises(SevattestError) as caught:
                await verify(d, begun.launch.launch_id, report)
            assert caught.value.reason is Reason.MALFORMED


async def test_a_launch_without_its_secrets_has_no_reports(tmp_path: Path) -> None:
    async with desk(tmp_path) as d:
        begun = await d.begin()
        report = signed(d.platform.keys.pek, nonce=NONCE, digest=bytes(32), policy=begun.policy)
        with pytest.raises(SevattestError) as caught:
            await verify(d, begun.launch.launch_id, report)
        assert caught.value.reason is Reason.WRONG_STATE
        await d.abandon(begun.launch.launch_id)
        with pytest.raises(SevattestError) as caught:
            await verify(d, begun.launch.launch_id, report)
        assert caught.value.reason is Reason.LAUNCH_ABANDONED


async def test_a_strangers_report_finds_no_launch(tmp_path: Path) -> None:
    async with desk(tmp_path) as d:
        begun, digest = await launched(d)
        report = signed(d.platform.keys.pek, nonce=NONCE, digest=digest, policy=begun.policy)
        with pytest.raises(SevattestError) as caught:
            await verify(d, begun.launch.launch_id, report, caller=STRANGER)
        assert caught.value.reason is Reason.NOT_FOUND


async def test_a_report_of_what_was_revoked_since_is_refused_though_it_is_genuine(tmp_path: Path) -> None:
    async with desk(tmp_path) as d:
        begun, digest = await launched(d)
        report = signed(d.platform.keys.pek, nonce=NONCE, digest=digest, policy=begun.policy)
        younger = {"generation": "emulated", "below": "1.55.25"}
        cases: list[tuple[dict[str, Any], Reason, str]] = [
            ({"ceks": [begun.launch.fingerprint]}, Reason.CHIP_REVOKED, "report.chip_revoked"),
            ({"ceks": [], "generations": ["emulated"]}, Reason.REVOKED, "report.revoked"),
            ({"ceks": [], "firmware": [younger]}, Reason.REVOKED, "report.revoked"),
        ]
        for version, (changes, reason, rule) in enumerate(cases):
            await d.apply(revocation("incident", str(version), **changes))
            assert (await refused(verify(d, begun.launch.launch_id, report))).reason is reason
            last = d.audit(begun.launch.launch_id)[-1]
            assert last.event == "report.refused"
            assert [each["rule"] for each in json.loads(last.body)["findings"]] == [rule]
        await d.apply(revocation("incident", "9", ceks=["0" * 64]))
        await verify(d, begun.launch.launch_id, report)


async def test_a_chip_on_the_deny_list_makes_no_report_that_counts(tmp_path: Path) -> None:
    async with desk(tmp_path) as d:
        begun, digest = await launched(d)
        report = signed(d.platform.keys.pek, nonce=NONCE, digest=digest, policy=begun.policy)
        d.denied.set_owners([begun.launch.fingerprint])
        assert (await refused(verify(d, begun.launch.launch_id, report))).reason is Reason.CHIP_REVOKED
        d.denied.set_owners([])
        await verify(d, begun.launch.launch_id, report)


async def test_a_workload_that_was_withdrawn_does_not_make_a_guests_report_untrue(tmp_path: Path) -> None:
    async with desk(tmp_path) as d:
        begun, digest = await launched(d)
        d.remove("Workload", "web")
        await d.library.load()
        await verify(
            d, begun.launch.launch_id, signed(d.platform.keys.pek, nonce=NONCE, digest=digest, policy=begun.policy)
        )
