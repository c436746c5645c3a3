"""The rules: each one's yes and no, and that all findings are kept."""

from __future__ import annotations

from dataclasses import replace

import pytest

from common.errors import Reason, Refused
from common.sev.certs.chain import PlatformChain
from common.sev.certs.oca import make_oca
from common.sev.measurement import FirmwareVersion
from common.sev.policy import GuestPolicy
from tests.support.chains import make_platform
from tests.support.vectors import rome_chain
from verifier.appraisal import rules
from verifier.appraisal.appraise import appraise_launch, appraise_platform, appraise_report, appraise_standing
from verifier.appraisal.evidence import (
    LaunchEvidence,
    PlatformEvidence,
    ReportEvidence,
    StandingEvidence,
    looks_self_made,
)
from verifier.documents.grant import Grant
from verifier.documents.platform import KnownPlatform
from verifier.launches.dependencies import refusal_for

CALLER = "spiffe://datacenter.example/orchestrator/cluster"
OTHER = "spiffe://datacenter.example/orchestrator/other"
OCA = "0c" * 32
KNOWN = KnownPlatform(
    name="host-1",
    version="1",
    sha256="00" * 32,
    source="host-1.yaml",
    fingerprint="ab" * 32,
    pools=frozenset({"rack-1", "fast"}),
    callers=frozenset({CALLER}),
    oca=OCA,
)
GRANT = Grant(
    name="fleet",
    version="1",
    sha256="00" * 32,
    source="fleet.yaml",
    workload="web",
    workload_versions=None,
    callers=frozenset({CALLER}),
    platforms=frozenset({"host-9"}),
    pools=frozenset({"rack-1"}),
    launches=1,
    at_once=1,
    refusals=1,
    rate=None,
    not_before=None,
    not_after=None,
    suspended=False,
)
PLATFORM = PlatformEvidence(
    generation="milan",
    fingerprint="ab" * 32,
    oca=OCA,
    self_made=True,
    denied=None,
    revoked=None,
    generations=frozenset({"milan", "rome"}),
    chips=frozenset({"ab" * 32}),
    ownership=frozenset({OCA}),
    floor_known=True,
    known=KNOWN,
    grant=GRANT,
    caller=CALLER,
)
LAUNCH = LaunchEvidence(
    matched=3,
    firmware=FirmwareVersion(1, 55, 21),
    floor=FirmwareVersion(1, 55, 21),
    generation="milan",
    denied=None,
    revoked=None,
    withdrawn=False,
    stopped=None,
    pdh_oldest=FirmwareVersion(1, 55, 21),
)
REPORT = ReportEvidence(
    denied=None,
    revoked=None,
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
    assert appraise_standing(LAUNCH) == ()
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
        ({"revoked": "sold"}, "platform.revoked", Reason.REVOKED),
        ({"ownership": frozenset({"1c" * 32})}, "platform.ownership", Reason.PLATFORM_OWNER_NOT_ALLOWED),
        ({"ownership": frozenset()}, "platform.ownership", Reason.PLATFORM_OWNER_NOT_ALLOWED),
        ({"ownership": "self", "self_made": False}, "platform.ownership", Reason.PLATFORM_OWNER_NOT_ALLOWED),
        ({"known": replace(KNOWN, oca="1c" * 32)}, "platform.ownership", Reason.PLATFORM_OWNER_NOT_ALLOWED),
        ({"known": replace(KNOWN, pools=frozenset({"fast"}))}, "platform.pool", Reason.HOST_NOT_IN_POOL),
        ({"known": None}, "platform.pool", Reason.HOST_NOT_IN_POOL),
        ({"grant": replace(GRANT, pools=frozenset())}, "platform.pool", Reason.HOST_NOT_IN_POOL),
        ({"grant": replace(GRANT, pools=None)}, "platform.pool", Reason.HOST_NOT_IN_POOL),
        ({"caller": OTHER}, "platform.caller", Reason.HOST_NOT_FOR_CALLER),
        ({"known": replace(KNOWN, callers=frozenset())}, "platform.caller", Reason.HOST_NOT_FOR_CALLER),
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
        ({"revoked": "sold"}, "launch.revoked", Reason.REVOKED),
        ({"stopped": "grant fleet 2 is suspended"}, "launch.grant", Reason.GRANT_SUSPENDED),
        ({"pdh_oldest": FirmwareVersion(1, 55, 20)}, "firmware.pdh", Reason.PDH_PREDATES_FIRMWARE),
        ({"matched": None}, "launch.measurement", Reason.MEASUREMENT_REFUSED),
        ({"firmware": FirmwareVersion(1, 55, 20)}, "firmware.floor", Reason.FIRMWARE_TOO_OLD),
        ({"firmware": FirmwareVersion(1, 54, 99)}, "firmware.floor", Reason.FIRMWARE_TOO_OLD),
        ({"firmware": FirmwareVersion(0, 255, 255)}, "firmware.floor", Reason.FIRMWARE_TOO_OLD),
    ],
)
def test_a_launch_is_refused_by_the_rule_that_it_breaks(change: dict[str, object], rule: str, reason: Reason) -> None:
    (finding,) = appraise_launch(replace(LAUNCH, **change))  # type: ignore[arg-type]  # one field at a time
    assert (finding.rule, finding.reason) == (rule, reason)


@pytest.mark.parametrize(
    "change",
    [
        {"ownership": "any", "oca": "1c" * 32, "known": replace(KNOWN, oca=None)},
        {"ownership": "any", "self_made": False},
        {"ownership": "self"},
        {"known": replace(KNOWN, oca=None)},
        {"known": replace(KNOWN, name="host-9", pools=frozenset())},
        {"known": replace(KNOWN, callers=None), "caller": OTHER},
        {"known": None, "grant": None},
        {"known": None, "grant": replace(GRANT, platforms=None, pools=None)},
        {"known": replace(KNOWN, pools=frozenset()), "grant": None},
    ],
)
def test_a_platform_that_each_document_allows_is_accepted(change: dict[str, object]) -> None:
    assert appraise_platform(replace(PLATFORM, **change)) == ()  # type: ignore[arg-type]  # some fields at a time


@pytest.mark.parametrize(
    "change",
    [
        {"pdh_oldest": None},
        {"pdh_oldest": FirmwareVersion(1, 55, 22)},
        {"firmware": FirmwareVersion(1, 56, 0), "pdh_oldest": FirmwareVersion(1, 56, 0)},
    ],
)
def test_a_pdh_that_was_never_used_under_older_firmware_is_accepted(change: dict[str, object]) -> None:
    assert appraise_launch(replace(LAUNCH, **change)) == ()  # type: ignore[arg-type]  # some fields at a time


def test_a_pdh_is_not_judged_by_firmware_that_no_measurement_proves() -> None:
    findings = appraise_launch(replace(LAUNCH, matched=None, pdh_oldest=FirmwareVersion(0, 17, 0)))
    assert [finding.rule for finding in findings] == ["launch.measurement"]


def test_what_was_taken_back_counts_for_a_repeat_too() -> None:
    standing = StandingEvidence(denied="broken", revoked="sold", withdrawn=True, stopped="withdrawn")
    assert [finding.rule for finding in appraise_standing(standing)] == [
        "launch.chip_revoked",
        "launch.revoked",
        "launch.workload_withdrawn",
        "launch.grant",
    ]


def test_an_owners_certificate_that_a_tool_made_is_not_the_firmwares() -> None:
    chain = make_platform().chain
    assert looks_self_made(chain)
    assert not looks_self_made(replace(chain, oca=make_oca()[0]))
    # A certificate without a version proves nothing for one that has none either.
    assert not looks_self_made(make_platform(api=(0, 0)).chain)


def test_a_real_platform_that_nobody_took_is_the_firmwares_own() -> None:
    assert looks_self_made(PlatformChain.parse(rome_chain()))


def test_newer_firmware_is_accepted_in_every_number() -> None:
    for newer in ((1, 55, 22), (1, 56, 0), (2, 0, 0)):
        version = FirmwareVersion(*newer)
        assert appraise_launch(replace(LAUNCH, firmware=version, pdh_oldest=version)) == ()


def test_firmware_below_api_0_17_is_told_as_too_old_even_without_a_match() -> None:
    findings = appraise_launch(replace(LAUNCH, matched=None, firmware=FirmwareVersion(0, 16, 255)))
    assert [finding.rule for finding in findings] == ["firmware.api", "launch.measurement"]


def test_a_version_that_no_measurement_proves_is_not_judged() -> None:
    findings = appraise_launch(replace(LAUNCH, matched=None, firmware=FirmwareVersion(1, 0, 0)))
    assert [finding.rule for finding in findings] == ["launch.measurement"]


@pytest.mark.parametrize(
    ("change", "rule", "reason"),
    [
        ({"denied": "broken"}, "report.chip_revoked", Reason.CHIP_REVOKED),
        ({"revoked": "sold"}, "report.revoked", Reason.REVOKED),
        ({"nonce": b"m" * 16}, "report.nonce", Reason.REPORT_REFUSED),
        ({"digest": b"e" * 32}, "report.digest", Reason.REPORT_REFUSED),
        ({"policy": GuestPolicy(value=4)}, "report.policy", Reason.REPORT_REFUSED),
    ],
)
def test_a_report_is_refused_by_the_rule_that_it_breaks(change: dict[str, object], rule: str, reason: Reason) -> None:
    (finding,) = appraise_report(replace(REPORT, **change))  # type: ignore[arg-type]  # one field at a time
    assert (finding.rule, finding.reason) == (rule, reason)


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
