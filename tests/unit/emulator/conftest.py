"""A Milan platform after power-on."""

from __future__ import annotations

from pathlib import Path

import pytest

from emulator.psp import Psp
from tests.support.software_psp import make_psp


@pytest.fixture
def psp(tmp_path: Path) -> Psp:
    return make_psp(tmp_path, "milan")
