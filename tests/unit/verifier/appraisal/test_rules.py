"""The rules: each one's yes and no, and that all findings are kept."""

from __future__ import annotations

from dataclasses import replace

import pytest

from common.errors import Reason, Refused
from common.sev.measurement import FirmwareVersion
from common.sev.policy import GuestPolicy
from verifier.appraisal import rules
from verifier.appraisal.appraise import appraise_launch, appraise_platform, appraise_report
from verifier.appraisal.evidence import LaunchEvidence, PlatformEvidence, ReportEvidence
from verifier.launches.dependencies import refusal_for

PLATFORM = PlatformEvidence(
    generation="milan",
    fingerprint="ab" * 32,
    denied=None,
    generations=frozenset({"milan", "rome"}),
    chips=frozenset({"ab" * 32}),
    floor_known=True,
)
LAUNCH = LaunchEvidence(
    matched=3,
    firmware=FirmwareVersion(1, 55, 21),
    floor=FirmwareVersion(1, 55, 21),
    generation="milan",
    denied=None,
    withdrawn=False,
)
REPORT = ReportEvidence(
    nonce=b"n" * 16,
    asked_nonce=b"n" * 16,
    digest=b"d" * 32,
    launch_digest=b"d" * 32,
    policy=GuestPolicy(value=5),
    launch_policy=GuestPolicy(value=5),
)


def test_good_evidence_has_no_findings() -> None:
    assert appraise_platform(PLATFORM) == ()
    assert appraise_platform(replace(PLATFORM, chips=None)) == ()
    assert appraise_launch(LAUNCH) == ()
    assert appraise_report(REPORT) == ()


@pytest.mark.parametrize(
    ("change", "rule", "reason"),
    [
        ({"denied": "broken"}, "platform.chip_revoked", Reason.CHIP_REVOKED),
        ({"generation": "genoa"}, "platform.generation", Reason.GENERATION_NOT_ALLOWED),
        ({"generation": "emulated"}, "platform.generation", Reason.GENERATION_NOT_ALLOWED),
        ({"fingerprint": "cd" * 32}, "platform.chip", Reason.CHIP_NOT_ALLOWED),
        ({"chips": frozenset()}, "platform.chip", Reason.CHIP_NOT_ALLOWED),
        ({"floor_known": False}, "platform.floor_known", Reason.FIRMWARE_TOO_OLD),
    ],
)
def test_a_platform_is_refused_by_the_rule_that_it_breaks(change: dict[str, object], rule: str, reason: Reason) -> None:
    (finding,) = appraise_platform(replace(PLATFORM, **change))  # type: ignore[arg-type]  # one field at a time
    assert (finding.rule, finding.reason) == (rule, reason)


@pytest.mark.parametrize(
    ("change", "rule", "reason"),
    [
        ({"denied": "broken"}, "launch.chip_revoked", Reason.CHIP_REVOKED),
        ({"withdrawn": True}, "launch.workload_withdrawn", Reason.CALLER_NOT_ALLOWED),
        ({"matched": None}, "launch.measurement", Reason.MEASUREMENT_REFUSED),
        ({"firmware": FirmwareVersion(1, 55, 20)}, "firmware.floor", Reason.FIRMWARE_TOO_OLD),
        ({"firmware": FirmwareVersion(1, 54, 99)}, "firmware.floor", Reason.FIRMWARE_TOO_OLD),
        ({"firmware": FirmwareVersion(0, 255, 255)}, "firmware.floor", Reason.FIRMWARE_TOO_OLD),
    ],
)
def test_a_launch_is_refused_by_the_rule_that_it_breaks(change: dict[str, object], rule: str, reason: Reason) -> None:
    (finding,) = appraise_launch(replace(LAUNCH, **change))  # type: ignore[arg-type]  # one field at a time
    assert (finding.rule, finding.reason) == (rule, reason)


def test_newer_firmware_is_accepted_in_every_number() -> None:
    for newer in ((1, 55, 22), (1, 56, 0), (2, 0, 0)):
        assert appraise_launch(replace(LAUNCH, firmware=FirmwareVersion(*newer))) == ()


def test_firmware_below_api_0_17_is_told_as_too_old_even_without_a_match() -> None:
    findings = appraise_launch(replace(LAUNCH, matched=None, firmware=FirmwareVersion(0, 16, 255)))
    assert [finding.rule for finding in findings] == ["firmware.api", "launch.measurement"]


def test_a_version_that_no_measurement_proves_is_not_judged() -> None:
    findings = appraise_launch(replace(LAUNCH, matched=None, firmware=FirmwareVersion(1, 0, 0)))
    assert [finding.rule for finding in findings] == ["launch.measurement"]


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"nonce": b"m" * 16}, "report.nonce"),
        ({"digest": b"e" * 32}, "report.digest"),
        ({"policy": GuestPolicy(value=4)}, "report.policy"),
    ],
)
def test_a_report_is_refused_by_the_rule_that_it_breaks(change: dict[str, object], rule: str) -> None:
    (finding,) = appraise_report(replace(REPORT, **change))  # type: ignore[arg-type]  # one field at a time
    assert (finding.rule, finding.reason) == (rule, Reason.REPORT_REFUSED)


def test_all_findings_are_kept_and_the_first_is_told() -> None:
    from uuid import uuid4

    bad = replace(PLATFORM, denied="broken", generation="genoa", fingerprint="cd" * 32)
    findings = appraise_platform(bad)
    assert [finding.rule for finding in findings] == ["platform.chip_revoked", "platform.generation", "platform.chip"]
    error = refusal_for(findings, uuid4())
    assert isinstance(error, Refused)
    assert error.reason is Reason.CHIP_REVOKED
    assert "broken" not in error.message


def test_each_rule_stands_in_its_table_under_its_own_id() -> None:
    tables = {**rules.PLATFORM_RULES, **rules.LAUNCH_RULES, **rules.REPORT_RULES}
    for rule, function in tables.items():
        assert function.__doc__ is not None
        assert function.__doc__.startswith(f"`{rule}`:")
