"""How many tests run at once."""

from __future__ import annotations

import os

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_xdist_auto_num_workers() -> int:
    """For `-n auto`: more workers than processors, since a test waits for other programs half of its time."""
    return (len(os.sched_getaffinity(0)) * 3 + 1) // 2
