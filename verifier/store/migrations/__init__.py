"""The schema's steps, forward only: `NNNN_what.sql`, applied in order, each in one transaction.

A step that has been released is never edited. A step that old processes could not live with (a dropped column, a new
rule) waits until one release after the code that stops needing what it takes away.
"""

from __future__ import annotations

from importlib.resources import files


def migrations() -> tuple[tuple[int, str, str], ...]:
    """Number, name and SQL of every step, in order."""
    steps = []
    for entry in files(__name__).iterdir():
        if entry.name.endswith(".sql"):
            name = entry.name.removesuffix(".sql")
            steps.append((int(name.split("_", 1)[0]), name, entry.read_text(encoding="utf-8")))
    return tuple(sorted(steps))
