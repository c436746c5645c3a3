"""Judgement: every rule of a table is asked, every finding is kept; none means acceptable."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from verifier.appraisal.evidence import Finding, LaunchEvidence, PlatformEvidence, ReportEvidence, StandingEvidence
from verifier.appraisal.rules import LAUNCH_RULES, PLATFORM_RULES, REPORT_RULES, STANDING_RULES

_Evidence = TypeVar("_Evidence")


def appraise_platform(evidence: PlatformEvidence) -> tuple[Finding, ...]:
    """What speaks against opening a launch on this platform; nothing, if it is acceptable."""
    return _ask(PLATFORM_RULES, evidence)


def appraise_launch(evidence: LaunchEvidence) -> tuple[Finding, ...]:
    """What speaks against releasing secrets to this measurement; nothing, if it is acceptable."""
    return _ask(LAUNCH_RULES, evidence)


def appraise_standing(evidence: StandingEvidence) -> tuple[Finding, ...]:
    """What speaks against giving a released packet again; nothing, if the owner has taken nothing back."""
    return _ask(STANDING_RULES, evidence)


def appraise_report(evidence: ReportEvidence) -> tuple[Finding, ...]:
    """What speaks against this report; nothing, if it is acceptable."""
    return _ask(REPORT_RULES, evidence)


def _ask(rules: Mapping[str, Callable[[_Evidence], Finding | None]], evidence: _Evidence) -> tuple[Finding, ...]:
    return tuple(finding for rule in rules.values() if (finding := rule(evidence)) is not None)
