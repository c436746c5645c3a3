"""What a run has shown: one row a scenario, carried from the workers to the one table at the end.

A row travels as a report's user property, which is the one thing that pytest-xdist brings home from a worker.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pytest

PROPERTY = "scenario"
_HEAD = ("scenario", "expected", "in the guest", "reason", "seconds")


@dataclass
class Row:
    """One scenario.

    Attributes:
        name: what is tried.
        verdict: `accepted` or `refused`, as it must end.
        saw: what was seen of the guest.
        reason: the reason code of the refusal.
        seconds: how long it took.
        outcome: `passed`, `failed` or `skipped`.
    """

    name: str
    verdict: str
    saw: str = ""
    reason: str = ""
    seconds: float = 0.0
    outcome: str = "passed"

    def properties(self) -> dict[str, Any]:
        """The row as it travels."""
        return asdict(self)


class Table:
    """Collects the rows of a run, and how each test ended.

    Attributes:
        rows: of every scenario that was to be shown.
        skipped: why some were not, each reason once.
    """

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.skipped: list[str] = []
        self._bad: dict[str, str] = {}
        self._seconds: dict[str, float] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take a phase's report; the last phase brings the row. What the first scenario set up is not its time."""
        if report.when == "call":
            self._seconds[report.nodeid] = report.duration
        if report.failed or (report.skipped and report.nodeid not in self._bad):
            self._bad[report.nodeid] = report.outcome
        if report.skipped and isinstance(report.longrepr, tuple):
            reason = str(report.longrepr[2]).removeprefix("Skipped: ")
            self.skipped += [] if reason in self.skipped else [reason]
        if report.when != "teardown":
            return
        told = dict(report.user_properties).get(PROPERTY)
        if isinstance(told, dict):
            row = Row(**told)
            row.outcome = self._bad.get(report.nodeid, "passed")
            row.seconds = self._seconds.get(report.nodeid, 0.0)
            self.rows.append(row)

    def lines(self) -> list[str]:
        """The table: accepted scenarios first, each group by name, then the totals."""
        rows = sorted(self.rows, key=lambda row: (row.verdict, row.name))
        cells = [_HEAD, *((row.name, _verdict(row), row.saw, row.reason, f"{row.seconds:.1f}") for row in rows)]
        widths = [max(len(cell[column]) for cell in cells) for column in range(len(_HEAD))]
        lines = [_line(cell, widths) for cell in cells]
        return [lines[0], "-" * len(lines[0]), *lines[1:], "-" * len(lines[0]), self._totals()]

    def _totals(self) -> str:
        parts = [f"{len(self.rows)} scenarios"]
        for verdict in ("accepted", "refused"):
            count = sum(row.verdict == verdict and row.outcome == "passed" for row in self.rows)
            parts.append(f"{count} {verdict} as expected")
        parts += [f"{count} {what}" for what in ("failed", "skipped") if (count := self._count(what))]
        return ", ".join(parts)

    def _count(self, outcome: str) -> int:
        return sum(row.outcome == outcome for row in self.rows)


def _verdict(row: Row) -> str:
    return row.verdict if row.outcome == "passed" else f"{row.verdict}: {row.outcome.upper()}"


def _line(cells: Sequence[str], widths: Iterable[int]) -> str:
    *most, seconds = (f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True))
    return "  ".join([*most, f"{seconds.strip():>{len(seconds)}}"]).rstrip()
