"""A command that starts a guest's machine and stays beside it: it ends with the machine, whichever agent ends that."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from uuid import uuid4

import pytest

from host_agent.launches.state import LaunchState as S
from tests.support.agent import ALICE, QUICK, FakeDevice, alive
from tests.support.eventually import until
from tests.support.plays import Play, agent, play
from tests.support.stages import STAGES, AttachStage, CommandStage

# The command starts the machine, then a daemon that leaves its session as the machine does, and stays.
_STAYS = """
import signal, subprocess, sys
subprocess.Popen(line, start_new_session=True)
daemon = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"], start_new_session=True)
with open(NOTE, "w") as note:
    note.write(f"{os.getpid()} {daemon.pid}\\n")
signal.pause()
"""


class StayingStage(CommandStage):
    """The command does not become the machine."""

    def script(self) -> str:
        stays = _STAYS.replace("NOTE", repr(str(self.root / "note")))
        return super().script().replace("os.execv(line[0], line)\n", stays)

    @property
    def pids(self) -> tuple[int, int]:
        """Of the command and of the daemon."""
        command, daemon = (self.root / "note").read_text().split()
        return int(command), int(daemon)


@asynccontextmanager
async def resumed(monkeypatch: pytest.MonkeyPatch, device: FakeDevice) -> AsyncIterator[tuple[Play, StayingStage]]:
    """A guest that runs, and beside it the command and the daemon."""
    monkeypatch.setitem(STAGES, "attach-staying", StayingStage)
    async with play("attach-staying", monkeypatch, device=device, settings=QUICK) as act:
        stage = act.stage
        assert isinstance(stage, StayingStage)
        await act.up_to(S.RESUMED)
        await until((stage.root / "note").exists)
        command, daemon = stage.pids
        try:
            yield act, stage
            # Who has left the command's session may serve others by now.
            assert alive(daemon)
        finally:
            for pid in (command, daemon):
                if alive(pid):
                    os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("restarts", [False, True])
async def test_a_command_that_stays_ends_with_its_machine(*, restarts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeDevice()
    async with resumed(monkeypatch, device) as (act, stage):
        command, _ = stage.pids
        assert alive(command)
        if restarts:
            launch_id = act.launch.launch_id
            await act.rig.leave()
            async with agent(stage, device=device, settings=QUICK) as second:
                assert alive(command)
                assert (await second.runner.abort(ALICE, launch_id, uuid4())).state is S.STOPPED
            act.rig.ledger._launches.clear()
        else:
            await act.rig.runner.abort(ALICE, act.launch.launch_id, uuid4())
        assert stage.machines() == []
        assert not alive(command)


async def test_a_command_whose_machine_ended_while_the_agent_was_dead_ends_when_it_is_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = FakeDevice()
    async with resumed(monkeypatch, device) as (act, stage):
        command, _ = stage.pids
        [machine] = stage.machines()
        await act.rig.leave()
        os.kill(machine, signal.SIGKILL)
        await until(lambda: not alive(machine))
        async with agent(stage, device=device, settings=QUICK) as second:
            [launch] = second.runner.launches(ALICE)
            assert launch.state is S.STOPPED
            assert not alive(command)
        act.rig.ledger._launches.clear()


async def test_a_command_of_an_agent_that_died_while_its_machine_came_up_is_remembered_over_two_restarts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop_there(passed: str, _launch_id: object, /) -> None:
        if passed == "start: machine released":
            raise asyncio.CancelledError

    device = FakeDevice()
    monkeypatch.setitem(STAGES, "attach-staying", StayingStage)
    async with play("attach-staying", monkeypatch, device=device, settings=QUICK) as act:
        stage = act.stage
        assert isinstance(stage, StayingStage)
        act.rig.custody.observe = stop_there
        with suppress(asyncio.CancelledError):
            await act.start()
        await act.rig.leave()
        async with agent(stage, device=device, settings=QUICK) as second:
            [launch] = second.runner.launches(ALICE)
            await second.until(launch, S.PAUSED)
            await until((stage.root / "note").exists)
        command, daemon = stage.pids
        try:
            async with agent(stage, device=device, settings=QUICK) as third:
                assert alive(command)
                await third.runner.abort(ALICE, launch.launch_id, uuid4())
                assert not alive(command)
        finally:
            os.kill(daemon, signal.SIGKILL)
        act.rig.ledger._launches.clear()


async def test_a_machine_that_nobody_of_ours_started_has_no_session_that_is_swept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with play("attach", monkeypatch, settings=QUICK) as act:
        assert isinstance(act.stage, AttachStage)
        launch = await act.up_to(S.PAUSED)
        assert launch.machine is not None
        assert launch.machine.session is None
