"""A machine that somebody else starts: who is met at its place, who is ended, and what is swept up."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from common.errors import PlatformFailed, Unavailable
from host_agent.hypervisors import attach
from host_agent.hypervisors.attach import AttachDefinition, expect, find_again, sweep_up
from host_agent.hypervisors.base import Machine, MachineId, StartOrder, Trace
from host_agent.hypervisors.monitored import QemuSettings
from host_agent.hypervisors.process import boot_id
from tests.support.agent import QUICK, Script, alive, change
from tests.support.eventually import until
from tests.support.machine_kinds import fake
from tests.support.stages import AttachStage, short_folder


@dataclass
class Place:
    """A machine that is waited for, and who may come."""

    stage: AttachStage
    script: Script
    machine: Machine

    async def come(self) -> int:
        """The machine comes up; its pid."""
        pid = self.stage._machine(self.stage.monitor, ["-readconfig", str(self.stage.inputs / "launch.cfg")])
        await self._listening(1)
        return pid

    async def occupy(self) -> int:
        """Somebody else takes the machine's place; its pid."""
        pid = self.stage.occupy()
        await self._listening(2)
        return pid

    async def _listening(self, times: int) -> None:
        await until(lambda: sum("listening" in entry for entry in self.script.journal) == times)


@asynccontextmanager
async def place(settings: QemuSettings = QUICK) -> AsyncIterator[Place]:
    with short_folder() as root:
        script = Script(root / "script.json")
        stage = AttachStage(root=root, kind=fake(script.path))
        (root / "launch").mkdir()
        definition = AttachDefinition(firmware=stage.firmware, monitor=stage.monitor, inputs=stage.inputs)
        order = StartOrder(
            launch=uuid4(), guest="web", policy=1, godh=bytes(2084), session=bytes(128), folder=root / "launch"
        )
        machine = await expect(definition, order, settings)
        try:
            machine.release()
            yield Place(stage, script, machine)
        finally:
            machine.close()
            stage.end()


async def test_a_monitor_behind_which_another_process_listens_is_not_spoken_to() -> None:
    async with place() as here:
        pid = await here.come()
        await here.machine.wait_ready()
        assert (await here.machine.inspect()).enabled
        other = await here.occupy()
        with pytest.raises(Unavailable, match="another process than the machine"):
            await here.machine.inspect()
        await here.machine.end()
        assert not alive(pid)
        assert alive(other)


async def test_a_machine_that_came_and_was_not_met_is_ended() -> None:
    async with place() as here:
        pid = await here.come()
        await here.machine.end()
        assert not alive(pid)
        assert not here.machine.alive


async def test_a_stranger_is_not_ended_in_the_machines_stead() -> None:
    async with place() as here:
        other = here.stage.occupy()
        await until(lambda: any("listening" in entry for entry in here.script.journal))
        await here.machine.end()
        assert alive(other)
        assert not here.machine.alive


async def test_a_pid_that_was_used_again_meanwhile_is_not_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(QUICK)
    async with place(settings) as here:
        pid = await here.come()
        asked: list[Path] = []

        async def changing(folder: Path, _name: str, **_: float) -> int:
            asked.append(folder)
            return pid if len(asked) % 2 else pid + 1

        monkeypatch.setattr(attach, "listening_pid", changing)
        change(settings, start_timeout=1)
        with pytest.raises(PlatformFailed, match="did not come up"):
            await here.machine.wait_ready()
        assert here.machine.identity is None
        monkeypatch.undo()
        change(settings, start_timeout=QUICK.start_timeout)
        await here.machine.wait_ready()
        assert here.machine.identity is not None
        assert here.machine.identity.pid == pid


@pytest.mark.parametrize("state", ["there", "gone", "of-another-launch", "never-prepared"])
async def test_a_machine_is_waited_for_again_only_while_its_file_is_there(state: str) -> None:
    async with place() as here:
        file, folder = here.stage.inputs / "launch.cfg", here.stage.root / "launch"
        launch = UUID(file.read_text().split()[3])
        if state == "gone":
            file.unlink()
        elif state == "never-prepared":
            (folder / "inputs").unlink()
        asked_for = uuid4() if state == "of-another-launch" else launch
        found = find_again(Trace(launch=asked_for, guest="web", driver="attach", folder=folder, identity=None), QUICK)
        assert (found is not None) == (state == "there")
        if found is not None:
            pid = await here.come()
            await found.wait_ready()
            await found.end()
            assert not alive(pid)
            found.close()


@contextmanager
def marked(launch: UUID) -> Iterator[int]:
    """A process that has the launch's mark; its pid."""
    with subprocess.Popen(
        [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()"],
        env={**os.environ, "SEV_HOST_AGENT_LAUNCH": str(launch)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as left:
        assert left.stdout is not None
        left.stdout.readline()
        yield left.pid


@pytest.mark.parametrize("booted", ["the same", "anew"])
async def test_only_of_this_boot_is_swept_up_what_a_command_left(tmp_path: Path, booted: str) -> None:
    launch = uuid4()
    with marked(launch) as left:
        await sweep_up(trace(tmp_path, launch, boot_id() if booted == "the same" else str(uuid4())))
        assert alive(left) == (booted == "anew")


def trace(folder: Path, launch: UUID, boot: str) -> Trace:
    command = MachineId(pid=1 << 22, start_time=1, boot_id=boot, starter=True)
    return Trace(launch=launch, guest="web", driver="attach", folder=folder, identity=command)
