"""Functions that run in a process of their own under `sevattest platform run`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.support.platform import SEVATTEST, Platform

_ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 60.0  # seconds; a run takes a fraction of one


def run_words(platform: Platform, *program: str, own: Sequence[str] = ()) -> list[str]:
    """The command that runs a program on this platform."""
    return [*SEVATTEST, "platform", "run", "--state", str(platform.state), *own, "--", *program]


def why_not_under(platform: Platform) -> str:
    """Why nothing can be run on this platform here; empty where it can."""
    tried = subprocess.run(run_words(platform, "true"), check=False, capture_output=True, text=True, timeout=TIMEOUT)
    return tried.stderr.strip() if tried.returncode else ""


def program_of(function: Callable[..., object], *arguments: object) -> list[str]:
    """A program that calls a module's function and prints what it returns, as JSON."""
    code = (
        "import json, sys; from importlib import import_module; "
        "module, name, arguments = json.loads(sys.argv[1]); "
        "print(json.dumps(getattr(import_module(module), name)(*arguments)))"
    )
    return [sys.executable, "-c", code, json.dumps([function.__module__, function.__name__, arguments])]


def under(platform: Platform, function: Callable[..., object], *arguments: object, own: Sequence[str] = ()) -> Any:
    """What a function returns that runs under `platform run`, by way of JSON; the run must end well."""
    words = run_words(platform, *program_of(function, *arguments), own=own)
    ended = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT, check=False, cwd=_ROOT)
    assert (ended.returncode, ended.stderr) == (0, ""), ended.stderr
    return json.loads(ended.stdout)
