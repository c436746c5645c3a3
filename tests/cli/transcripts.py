"""Runs a command as a person would, and holds what it said on both streams."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.demo.processes import script


@dataclass(frozen=True)
class Said:
    """What a command printed, and how it ended."""

    out: str
    err: str
    code: int


def run(*words: str | os.PathLike[str], timeout: float = 60.0, environ: Mapping[str, str] | None = None) -> Said:
    """Run `sevattest` with these words, in our environment but for its settings and for what `environ` changes."""
    command = [*script("sevattest"), *map(str, words)]
    ours = {name: value for name, value in os.environ.items() if not name.startswith("SEVATTEST_")}
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=timeout, env={**ours, **(environ or {})}
    )
    return Said(out=done.stdout, err=done.stderr, code=done.returncode)
