"""The monitor of the fake QEMU, and connections to it as the agent makes them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from host_agent.hypervisors.qmp import MonitorSession, monitor
from tests.support import fake_qemu
from tests.support.agent import Script
from tests.support.eventually import until

SOCKET = "qmp.sock"
GREETING = {"QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 7}, "package": ""}, "capabilities": []}}
LONG = 20.0
SHORT = 0.3
TOLERANCE = 10.0  # of a loaded machine
ARGUMENTS = ["-object", "sev-guest,id=sev0,policy=0x1", "-qmp", f"unix:{SOCKET},server=on,wait=off"]


@pytest.fixture
def script(tmp_path: Path) -> Script:
    # Far deeper than a socket's address can be.
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    return Script(folder / "script.json")


@pytest.fixture
def qemu(script: Script) -> Iterator[Script]:
    with subprocess.Popen(
        [sys.executable, "-ISE", fake_qemu.__file__, str(script.path), *ARGUMENTS], cwd=script.path.parent
    ) as process:
        try:
            yield script
        finally:
            process.kill()


@asynccontextmanager
async def session(script: Script, limit: float = LONG) -> AsyncIterator[MonitorSession]:
    """A connection, once the program listens."""
    await until(lambda: any("listening" in entry for entry in script.journal))
    async with monitor(script.path.parent, SOCKET, limit=limit) as connected:
        yield connected
