"""The rules: one function for each dotted id, each over verified evidence alone. Ids are for ever.

A rule returns its finding or None. The order of the tables is the order in which a caller is told: the first finding's
reason travels, all of them go into the owner's audit record and log, so that none names a chip: its pseudonym is there.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Mapping
from types import MappingProxyType

from common.errors import Reason
from common.sev.abi import MINIMUM_API
from verifier.appraisal.evidence import Finding, LaunchEvidence, PlatformEvidence, ReportEvidence, StandingEvidence


def _chip_revoked(rule: str, denied: str | None) -> Finding | None:
    if denied is None:
        return None
    return Finding(rule=rule, reason=Reason.CHIP_REVOKED, message=f"the chip is on the deny-list: {denied}")


def platform_chip_revoked(evidence: PlatformEvidence) -> Finding | None:
    """`platform.chip_revoked`: the chip's key is not known to be broken, nor revoked by the owner."""
    return _chip_revoked("platform.chip_revoked", evidence.denied)


def platform_generation(evidence: PlatformEvidence) -> Finding | None:
    """`platform.generation`: the workload lists the platform's generation."""
    if evidence.generation in evidence.generations:
        return None
    return Finding(
        rule="platform.generation",
        reason=Reason.GENERATION_NOT_ALLOWED,
        message=f"{evidence.generation} is not among {', '.join(sorted(evidence.generations))}",
    )


def platform_chip(evidence: PlatformEvidence) -> Finding | None:
    """`platform.chip`: the workload lists the chip, or allows any."""
    if evidence.chips is None or evidence.fingerprint in evidence.chips:
        return None
    return Finding(
        rule="platform.chip",
        reason=Reason.CHIP_NOT_ALLOWED,
        message=f"the chip is not among the {len(evidence.chips)} that are allowed",
    )


def platform_floor_known(evidence: PlatformEvidence) -> Finding | None:
    """`platform.floor_known`: a firmware floor is in force for the generation; without one nothing is new enough."""
    if evidence.floor_known or evidence.generation not in evidence.generations:
        return None
    return Finding(
        rule="platform.floor_known",
        reason=Reason.FIRMWARE_TOO_OLD,
        message=f"no firmware floor is known for {evidence.generation}",
    )


def _revoked(rule: str, revoked: str | None) -> Finding | None:
    return None if revoked is None else Finding(rule=rule, reason=Reason.REVOKED, message=revoked)


def platform_revoked(evidence: PlatformEvidence) -> Finding | None:
    """`platform.revoked`: neither generation, platform owner nor workload version are revoked."""
    return _revoked("platform.revoked", evidence.revoked)


def platform_ownership(evidence: PlatformEvidence) -> Finding | None:
    """`platform.ownership`: the platform's owner is one that the workload and the Platform document allow."""
    allowed, known = evidence.ownership, evidence.known
    if known is not None and known.oca not in {None, evidence.oca}:
        message = f"platform {known.name} is owned by {evidence.oca} instead of {known.oca}"
    elif isinstance(allowed, frozenset):
        if evidence.oca in allowed:
            return None
        message = f"the platform is owned by {evidence.oca}, who is not among the {len(allowed)} that are allowed"
    elif allowed == "any" or evidence.self_made:
        return None
    else:
        message = f"the platform is not self-owned: its owner {evidence.oca} has a certificate that no firmware made"
    return Finding(rule="platform.ownership", reason=Reason.PLATFORM_OWNER_NOT_ALLOWED, message=message)


def platform_pool(evidence: PlatformEvidence) -> Finding | None:
    """`platform.pool`: the grant names the platform or one of its pools, or any platform."""
    grant, known = evidence.grant, evidence.known
    if grant is None or (grant.platforms is None and grant.pools is None):
        return None
    if known is not None and (known.name in (grant.platforms or ()) or known.pools & (grant.pools or frozenset())):
        return None
    what = f"platform {known.name}" if known is not None else "the chip, which no document names,"
    return Finding(
        rule="platform.pool",
        reason=Reason.HOST_NOT_IN_POOL,
        message=f"{what} is not among the platforms and pools of grant {grant.name}",
    )


def platform_caller(evidence: PlatformEvidence) -> Finding | None:
    """`platform.caller`: the Platform document names the caller, or any."""
    known = evidence.known
    if known is None or known.callers is None or evidence.caller in known.callers:
        return None
    return Finding(
        rule="platform.caller",
        reason=Reason.HOST_NOT_FOR_CALLER,
        message=f"platform {known.name} is not for this caller",
    )


def launch_chip_revoked(evidence: StandingEvidence) -> Finding | None:
    """`launch.chip_revoked`: the chip was not revoked since the launch began."""
    return _chip_revoked("launch.chip_revoked", evidence.denied)


def launch_workload_withdrawn(evidence: StandingEvidence) -> Finding | None:
    """`launch.workload_withdrawn`: some version of the workload is still on file; else it names no caller at all."""
    if not evidence.withdrawn:
        return None
    return Finding(
        rule="launch.workload_withdrawn",
        reason=Reason.CALLER_NOT_ALLOWED,
        message="the workload was withdrawn: no document of its name is on file any more",
    )


def launch_revoked(evidence: StandingEvidence) -> Finding | None:
    """`launch.revoked`: nothing else of the launch was revoked since it began, its proven firmware included."""
    return _revoked("launch.revoked", evidence.revoked)


def launch_grant(evidence: StandingEvidence) -> Finding | None:
    """`launch.grant`: the grant that the launch spends is still on file and not suspended."""
    if evidence.stopped is None:
        return None
    return Finding(rule="launch.grant", reason=Reason.GRANT_SUSPENDED, message=evidence.stopped)


def firmware_api(evidence: LaunchEvidence) -> Finding | None:
    """`firmware.api`: the firmware is of an API whose measurement covers its own version (0.17 or later)."""
    if evidence.firmware[:2] >= MINIMUM_API:
        return None
    return Finding(
        rule="firmware.api",
        reason=Reason.FIRMWARE_TOO_OLD,
        message=f"firmware {evidence.firmware} is below API 0.17: its measurement would prove no version",
    )


def launch_measurement(evidence: LaunchEvidence) -> Finding | None:
    """`launch.measurement`: the measurement is that of a launch digest which was frozen for this launch."""
    if evidence.matched is not None:
        return None
    return Finding(
        rule="launch.measurement",
        reason=Reason.MEASUREMENT_REFUSED,
        message="the measurement is none of those that were frozen for the launch",
    )


def firmware_floor(evidence: LaunchEvidence) -> Finding | None:
    """`firmware.floor`: the firmware, as the measurement proves it, is not older than accepted on its generation."""
    if evidence.matched is None or evidence.firmware >= evidence.floor:
        return None
    return Finding(
        rule="firmware.floor",
        reason=Reason.FIRMWARE_TOO_OLD,
        message=f"firmware {evidence.firmware} is older than {evidence.floor}, the floor for {evidence.generation}",
    )


def firmware_pdh(evidence: LaunchEvidence) -> Finding | None:
    """`firmware.pdh`: the PDH was never used under older firmware, which may have given its key away."""
    oldest = evidence.pdh_oldest
    if evidence.matched is None or oldest is None or oldest >= evidence.firmware:
        return None
    return Finding(
        rule="firmware.pdh",
        reason=Reason.PDH_PREDATES_FIRMWARE,
        message=f"the PDH was used under firmware {oldest} before the update to {evidence.firmware}",
    )


def report_chip_revoked(evidence: ReportEvidence) -> Finding | None:
    """`report.chip_revoked`: the chip was not revoked since: whoever has its key signs what he likes."""
    return _chip_revoked("report.chip_revoked", evidence.denied)


def report_revoked(evidence: ReportEvidence) -> Finding | None:
    """`report.revoked`: nothing else of the launch was revoked since, its proven firmware included."""
    return _revoked("report.revoked", evidence.revoked)


def report_nonce(evidence: ReportEvidence) -> Finding | None:
    """`report.nonce`: the report answers this request and not an earlier one."""
    if hmac.compare_digest(evidence.nonce, evidence.asked_nonce):
        return None
    return Finding(rule="report.nonce", reason=Reason.REPORT_REFUSED, message="the report has another nonce")


def report_digest(evidence: ReportEvidence) -> Finding | None:
    """`report.digest`: the report shows the guest that the launch released its secrets to."""
    if hmac.compare_digest(evidence.digest, evidence.launch_digest):
        return None
    return Finding(
        rule="report.digest",
        reason=Reason.REPORT_REFUSED,
        message=f"the report shows launch digest {evidence.digest.hex()} instead of {evidence.launch_digest.hex()}",
    )


def report_policy(evidence: ReportEvidence) -> Finding | None:
    """`report.policy`: the guest runs under the launch's policy."""
    if evidence.policy == evidence.launch_policy:
        return None
    return Finding(
        rule="report.policy",
        reason=Reason.REPORT_REFUSED,
        message=f"the report shows policy {evidence.policy} instead of {evidence.launch_policy}",
    )


PLATFORM_RULES: Mapping[str, Callable[[PlatformEvidence], Finding | None]] = MappingProxyType(
    {
        "platform.chip_revoked": platform_chip_revoked,
        "platform.revoked": platform_revoked,
        "platform.generation": platform_generation,
        "platform.chip": platform_chip,
        "platform.ownership": platform_ownership,
        "platform.floor_known": platform_floor_known,
        "platform.pool": platform_pool,
        "platform.caller": platform_caller,
    }
)
STANDING_RULES: Mapping[str, Callable[[StandingEvidence], Finding | None]] = MappingProxyType(
    {
        "launch.chip_revoked": launch_chip_revoked,
        "launch.revoked": launch_revoked,
        "launch.workload_withdrawn": launch_workload_withdrawn,
        "launch.grant": launch_grant,
    }
)
LAUNCH_RULES: Mapping[str, Callable[[LaunchEvidence], Finding | None]] = MappingProxyType(
    {
        **STANDING_RULES,
        "firmware.api": firmware_api,
        "launch.measurement": launch_measurement,
        "firmware.floor": firmware_floor,
        "firmware.pdh": firmware_pdh,
    }
)
REPORT_RULES: Mapping[str, Callable[[ReportEvidence], Finding | None]] = MappingProxyType(
    {
        "report.chip_revoked": report_chip_revoked,
        "report.revoked": report_revoked,
        "report.nonce": report_nonce,
        "report.digest": report_digest,
        "report.policy": report_policy,
    }
)
