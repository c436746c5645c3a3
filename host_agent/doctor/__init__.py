"""Looks at a host and says whether guests can be launched on it, and what to do where they cannot.

`machine.py` is what may be asked of a host, `this_machine.py` and `captured.py` answer; one module a subject has the
probes, pure functions over the answers; `examination.py` asks them all. `ok.py` has sevctl's own checks.
"""

from __future__ import annotations

from pathlib import Path

from host_agent.doctor.captured import CapturedMachine
from host_agent.doctor.findings import Outcome
from host_agent.doctor.machine import Machine
from host_agent.doctor.ok import Generation, Line, examine
from host_agent.doctor.this_machine import ThisMachine

__all__ = ["Generation", "Line", "Machine", "Outcome", "examine", "open_machine"]


def open_machine(root: Path | None) -> Machine:
    """The running machine, or the one that was captured in a folder.

    Raises:
        InvalidInput: `INVALID_ARGUMENT`; the folder holds none.
    """
    return ThisMachine() if root is None else CapturedMachine(root)
