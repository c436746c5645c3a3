"""An owner with one workload in the folder, `web`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.owner_site import OwnerSite, owner_site


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[OwnerSite]:
    async with owner_site(tmp_path) as opened:
        yield opened
