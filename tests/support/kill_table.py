"""The table of kills: for each point of a step at which the agent was killed, what became of the guest, run by run.

Tests leave their outcome as a property of their report, which also reaches the one process that prints.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

KILLED = "killed at"


def rows(properties: Iterable[tuple[str, object]]) -> Iterator[str]:
    """The table's lines, without a head where there is nothing to tell."""
    found: dict[tuple[int, str], dict[int, str]] = {}
    for name, value in properties:
        if name == KILLED and isinstance(value, (list, tuple)):
            place, point, run, outcome = value
            found.setdefault((place, point), {})[run] = outcome
    if not found:
        return
    runs = sorted({run for outcomes in found.values() for run in outcomes})
    yield " | ".join(["the agent is killed at       ", *(f"run {run}                " for run in runs)])
    for (_, point), outcomes in sorted(found.items()):
        yield " | ".join([f"{point:<29}", *(f"{outcomes.get(run, '-'):<21}" for run in runs)])
