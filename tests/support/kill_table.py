"""The tables of kills: for each point of a step at which the agent was killed, what became of the guest.

A table has a column for each run, or for each driver. Tests leave their outcome as a property of their report, which
also reaches the one process that prints.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

KILLED = "killed at"
# Every point that a step of a launch passes, in order.
POINTS = [
    "start: begun",
    "start: written down",
    "start: machine held",
    "start: machine written down",
    "start: machine released",
    "start: machine checked",
    "start: paused",
    "start: done",
    "measure: read",
    "measure: done",
    "inject: written down",
    "inject: answered",
    "inject: done",
    "resume: written down",
    "resume: answered",
    "resume: done",
]
_WIDTH = 21


def rows(properties: Iterable[tuple[str, object]]) -> Iterator[str]:
    """The tables' lines, without a head where there is nothing to tell."""
    runs: dict[tuple[int, str], dict[str, str]] = {}
    drivers: dict[tuple[int, str], dict[str, str]] = {}
    for name, value in properties:
        if name == KILLED and isinstance(value, (list, tuple)):
            place, point, column, outcome = value
            by_run = isinstance(column, int)
            heads = (runs if by_run else drivers).setdefault((place, point), {})
            heads[f"run {column}" if by_run else column] = outcome
    for found in (runs, drivers):
        yield from _table(found)


def _table(found: dict[tuple[int, str], dict[str, str]]) -> Iterator[str]:
    if not found:
        return
    columns = sorted({column for outcomes in found.values() for column in outcomes})
    yield " | ".join(["the agent is killed at       ", *(f"{column:<{_WIDTH}}" for column in columns)])
    for (_, point), outcomes in sorted(found.items()):
        yield " | ".join([f"{point:<29}", *(f"{outcomes.get(column, '-'):<{_WIDTH}}" for column in columns)])
