"""The schema's steps, forward only: `<dialect>/NNNN_what.sql`, applied in order, each in one transaction.

A step that has been released is never edited. Its first line says `-- compatible_from: N`: the last step that a process
must know at least to serve a store that has this one. A step that only adds has the N of the step before it, and old
and new processes serve side by side. A step that old processes could not live with (a dropped column, a new rule) has
an N of its own, and waits until one release after the code that stops needing what it takes away.
"""

from __future__ import annotations

import re
from importlib.resources import files
from typing import NamedTuple

_COMPATIBLE = re.compile(r"-- compatible_from: (\d+)\n")


class Step(NamedTuple):
    """One step.

    Attributes:
        number: from 1, without gaps.
        name: its file's name without the ending.
        sql: statements of one dialect.
        compatible_from: number of the last step that a process must know at least to serve what this one makes.
    """

    number: int
    name: str
    sql: str
    compatible_from: int


def step(name: str, sql: str) -> Step:
    """A step from its name and its text.

    Raises:
        ValueError: it does not say from which version on it can be served.
    """
    said = _COMPATIBLE.match(sql)
    if said is None:
        raise ValueError(f"{name} does not begin with its compatible_from")
    return Step(int(name.split("_", 1)[0]), name, sql, int(said[1]))


def migrations(dialect: str = "sqlite") -> tuple[Step, ...]:
    """Every step of a dialect (`sqlite`, `postgres`), in order."""
    entries = (entry for entry in (files(__name__) / dialect).iterdir() if entry.name.endswith(".sql"))
    return tuple(sorted(step(entry.name.removesuffix(".sql"), entry.read_text(encoding="utf-8")) for entry in entries))
