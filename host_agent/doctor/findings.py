"""What a probe found: its verdict, what it saw, and what a person can do about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class Outcome(StrEnum):
    """A probe's verdict."""

    PASS = "PASS"  # noqa: S105 -- a verdict
    WARN = "WARN"  # launches work; something should be put right
    FAIL = "FAIL"  # launches cannot work
    SKIP = "SKIP"  # could not be looked at, or does not matter here


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One probe's answer.

    Attributes:
        probe: its dotted id, for ever: docs/doctor.md has them all.
        outcome: the verdict.
        seen: what was there, a sentence without a stop.
        advice: what to do about it; empty with PASS.
    """

    probe: str
    outcome: Outcome
    seen: str
    advice: str = ""

    @property
    def lines(self) -> list[str]:
        """For people: `PASS id: what was seen`, and the advice below it."""
        advice = [f"     advice: {self.advice}"] if self.advice else []
        return [f"{self.outcome} {self.probe}: {self.seen}", *advice]

    def as_json(self) -> dict[str, str]:
        """For programs."""
        return {"probe": self.probe, "outcome": self.outcome, "seen": self.seen, "advice": self.advice}


def passed(probe: str, seen: str) -> Finding:
    """All is well."""
    return Finding(probe=probe, outcome=Outcome.PASS, seen=seen)


def warned(probe: str, seen: str, advice: str) -> Finding:
    """Launches work; something should be put right."""
    return Finding(probe=probe, outcome=Outcome.WARN, seen=seen, advice=advice)


def failed(probe: str, seen: str, advice: str) -> Finding:
    """Launches cannot work."""
    return Finding(probe=probe, outcome=Outcome.FAIL, seen=seen, advice=advice)


def skipped(probe: str, seen: str, advice: str = "") -> Finding:
    """It could not be looked at, or does not matter here."""
    return Finding(probe=probe, outcome=Outcome.SKIP, seen=seen, advice=advice)


def stops_launches(findings: Sequence[Finding]) -> bool:
    """Whether one of them failed."""
    return any(finding.outcome is Outcome.FAIL for finding in findings)


def summary(findings: Sequence[Finding]) -> str:
    """How many of each, in one line."""
    counts = {outcome: sum(finding.outcome is outcome for finding in findings) for outcome in Outcome}
    return ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
