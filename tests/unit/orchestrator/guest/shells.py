"""The shells that can run the guest's scripts: busybox's as in the guest where there is one, and bash."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support.repository import ROOT


def busybox() -> Path:
    """A busybox of this machine or of `make guest`; skips where there is neither."""
    candidates = (shutil.which("busybox"), ROOT / ".guest" / "busybox")
    found = next((Path(path) for path in candidates if path is not None and Path(path).is_file()), None)
    if found is None:
        pytest.skip("busybox not found, install it or run `make guest`")
    return found


def shell(name: str) -> list[str]:
    """The words that start a shell by its name; skips where it is not there."""
    if name == "busybox":
        return [str(busybox()), "sh"]
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} not found")
    return [found]
