"""An agent of this process over a stage, with the fake in QEMU's place: what the tests of all drivers play with."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from emulator.firmware_image import write_image
from host_agent.launches.launch import Launch
from host_agent.launches.state import LaunchState as S
from tests.support.agent import ALICE, QUICK, Rig, Script
from tests.support.eventually import until
from tests.support.machine_kinds import Kind, fake
from tests.support.real_qemu import small_kernel
from tests.support.stages import STAGES, LibvirtStage, Stage, short_folder

SOON = replace(QUICK, start_timeout=2, command_timeout=1, stop_timeout=1)
# For machines from which nothing is expected.
NOW = replace(QUICK, start_timeout=1, command_timeout=0.2, stop_timeout=0.5)
RUNNING: dict[str, Any] = {"run": {"status": "running", "running": True}, "sev": {"state": "running"}}
WITH_A_PLACE = [name for name, stage in STAGES.items() if stage.has_a_place]


@asynccontextmanager
async def staged(driver: str, kind: Kind, root: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Stage]:
    """A stage with the guest's files; nothing of it is left."""
    stage = STAGES[driver](root=root, kind=kind)
    write_image(stage.firmware, "one")
    (root / "vmlinuz").write_bytes(small_kernel())
    (root / "initrd").write_bytes(b"initrd")
    if isinstance(stage, LibvirtStage):
        for name, module in stage.daemon.modules().items():
            monkeypatch.setitem(sys.modules, name, module)
    try:
        yield stage
        await until(lambda: not [pid for pid in stage.machines() if pid not in _strangers(stage)])
    finally:
        stage.end()


def _strangers(stage: Stage) -> set[int]:
    return {process.pid for process in stage.processes}


@dataclass
class Play:
    """One agent over a stage whose machine is the fake."""

    stage: Stage
    script: Script
    rig: Rig

    async def start(self, **changes: Any) -> Launch:
        async with self.stage.somebody():
            return await self.rig.runner.start(ALICE, self.rig.order(**changes))

    async def up_to(self, state: S) -> Launch:
        async with self.stage.somebody():
            return await self.rig.up_to(state)

    @property
    def launch(self) -> Launch:
        """The only launch there is."""
        [launch] = self.rig.runner.launches(ALICE)
        return launch

    async def tick(self) -> None:
        """Let the supervisor look after the launches, as it does again and again."""
        await self.rig.supervisor.tick()


@asynccontextmanager
async def agent(stage: Stage, **options: Any) -> AsyncIterator[Rig]:
    """One run of an agent over the stage; leaves machines alone, as a kill would."""
    settings = options.setdefault("settings", QUICK)
    rig = Rig(stage.state_dir, hypervisor=stage.hypervisor(settings), **options)
    rig.folders.open()
    try:
        await rig.supervisor.recover()
        yield rig
    finally:
        await rig.leave()


@asynccontextmanager
async def play(driver: str, monkeypatch: pytest.MonkeyPatch, **options: Any) -> AsyncIterator[Play]:
    """The fake on a stage, and one agent; at the end every launch is given up and no machine of it is left."""
    with short_folder() as root:
        script = Script(root / "script.json")
        (root / "agent").mkdir()
        async with staged(driver, fake(script.path), root, monkeypatch) as stage, agent(stage, **options) as rig:
            yield Play(stage, script, rig)
            for launch in rig.ledger.unfinished():
                await rig.runner.abort(ALICE, launch.launch_id, uuid4())
