"""Where the outside vectors lie: files of other projects that never enter the repository."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def vectors() -> Path:
    """The folder with the outside vectors; skips the test that asks where there is none.

    `SEVATTEST_VECTORS` names it, else `shared/vectors` beside the checkout is looked at.
    """
    named = os.environ.get("SEVATTEST_VECTORS")
    folder = Path(named) if named else Path(__file__).resolve().parents[3] / "shared" / "vectors"
    if not (folder / "amd-roots").is_dir():
        pytest.skip("outside vectors not found, set SEVATTEST_VECTORS")
    return folder


def rome_chain() -> bytes:
    """PDH‖PEK‖OCA‖CEK of a real EPYC Rome, CEK signed by AMD: 8336 bytes."""
    return b"".join((vectors() / "rome" / f"{name}.cert").read_bytes() for name in ("pdh", "pek", "oca", "cek"))
