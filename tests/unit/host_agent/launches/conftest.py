"""An agent over a fake device and a fake QEMU that misbehaves on request."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.agent import Rig, machines_live_on, rig, strays


@pytest.fixture
async def agent(tmp_path: Path) -> AsyncIterator[Rig]:
    async with rig(tmp_path) as made:
        yield made
    assert not list(strays(tmp_path))


@pytest.fixture
def hasty(agent: Rig, monkeypatch: pytest.MonkeyPatch) -> Rig:
    """An agent that can be hurried, over machines that do not die."""
    machines_live_on(monkeypatch)
    return agent
