"""Where somebody else starts the machine: whoever else is found in its place is neither believed nor ended."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from common.errors import PlatformFailed
from host_agent.hypervisors import process
from host_agent.launches.state import LaunchState as S
from tests.support.agent import ALICE, QUICK, FakeDevice, alive
from tests.support.eventually import until
from tests.support.plays import RUNNING, SOON, WITH_A_PLACE, Play, agent, play
from tests.support.stages import AttachStage

# Makes the monitor's socket and hands it on to a machine that is told to read the launch's file.
_MANAGER = """
import socket, subprocess, sys
place, file = sys.argv[1:]
made = socket.socket(socket.AF_UNIX)
made.bind(place)
made.listen()
serve = '''
import socket, sys
made = socket.socket(fileno=int(sys.argv[1]))
while True:
    client, _ = made.accept()
    client.close()
'''
words = [sys.executable, "-c", serve, str(made.fileno()), "-readconfig", file]
machine = subprocess.Popen(words, pass_fds=[made.fileno()])
print(machine.pid, flush=True)
machine.wait()
"""


def launch_files(act: Play) -> list[Path]:
    return [*act.stage.root.rglob("*.b64"), *act.stage.root.rglob("launch.cfg")]


@asynccontextmanager
async def dead_at(act: Play, point: str) -> AsyncIterator[None]:
    """An agent that dies at this point of a start."""

    def stop_there(passed: str, _launch_id: object, /) -> None:
        if passed == point:
            raise asyncio.CancelledError

    act.rig.custody.observe = stop_there
    with suppress(asyncio.CancelledError):
        await act.start()
    await act.rig.leave()
    yield
    act.rig.ledger._launches.clear()


def come_up(act: Play) -> int:
    """Somebody's machine without SEV, which runs, in the guest's place."""
    act.script.set(run=RUNNING["run"], sev={"enabled": False})
    return act.stage.occupy()


async def listening(act: Play) -> None:
    await until(lambda: any("listening" in entry for entry in act.script.journal))


async def test_a_manager_that_made_the_monitors_socket_is_not_taken_for_the_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with play("attach", monkeypatch) as act:
        stage = act.stage
        assert isinstance(stage, AttachStage)
        file = stage.inputs / "launch.cfg"
        starting = asyncio.create_task(act.rig.runner.start(ALICE, act.rig.order()))
        await until(file.exists)
        words = [sys.executable, "-c", _MANAGER, str(stage.monitor), str(file)]
        manager = await asyncio.to_thread(subprocess.Popen, words, stdout=subprocess.PIPE, start_new_session=True)
        try:
            assert manager.stdout is not None
            machine = int(await asyncio.to_thread(manager.stdout.readline))
            with pytest.raises(PlatformFailed, match=rf"process {manager.pid} .* -readconfig {file}; it is left alone"):
                await starting
            assert act.launch.state is S.FAILED
            assert alive(manager.pid)
            assert alive(machine)
        finally:
            os.killpg(manager.pid, signal.SIGKILL)
            manager.communicate()


@pytest.mark.parametrize("driver", [name for name in WITH_A_PLACE if name != "libvirt"])  # knows it by the launch
async def test_a_stranger_that_came_while_the_agent_was_dead_is_left_alone(
    driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with play(driver, monkeypatch) as act, dead_at(act, "start: machine written down"):
        await is_left_alone(act)


@pytest.mark.parametrize("file", ["there", "gone", "of-another-launch"])
async def test_a_stranger_that_came_in_stead_of_a_machine_that_was_called_for_is_left_alone(
    file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with play("attach", monkeypatch, settings=SOON) as act, dead_at_without_machine(act):
        [launch_file] = act.stage.root.rglob("launch.cfg")
        if file == "gone":
            launch_file.unlink()
        elif file == "of-another-launch":
            launch_file.write_text(launch_file.read_text().replace("# sevattest launch ", "# sevattest launch f", 1))
        await is_left_alone(act)


async def is_left_alone(act: Play) -> None:
    """Whoever comes up in the guest's place before the agent is back."""
    other = come_up(act)
    await listening(act)
    async with agent(act.stage, settings=SOON) as second:
        [launch] = second.runner.launches(ALICE)
        await second.until(launch, S.FAILED)
        assert alive(other)
        await until(lambda: launch_files(act) == [])
    os.kill(other, signal.SIGKILL)


@pytest.mark.parametrize("booted", ["the same", "anew"])
async def test_a_machine_of_another_boot_is_not_the_one_that_was_waited_for(
    booted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = FakeDevice()
    async with play("attach", monkeypatch, device=device, settings=SOON) as act:
        stage = act.stage
        assert isinstance(stage, AttachStage)
        async with dead_at_without_machine(act):
            machine = stage._machine(stage.monitor, ["-readconfig", str(stage.inputs / "launch.cfg")])
            await listening(act)
            if booted == "anew":
                other_boot = stage.root / "boot_id"
                other_boot.write_text("00000000-1111-4222-8333-444444444444\n")
                monkeypatch.setattr(process, "_BOOT_ID", other_boot)
            # The machine that is waited for has the time that it takes.
            async with agent(stage, device=device, settings=SOON if booted == "anew" else QUICK) as second:
                [launch] = second.runner.launches(ALICE)
                await second.until(launch, S.FAILED if booted == "anew" else S.PAUSED)
                assert alive(machine)
            os.kill(machine, signal.SIGKILL)


@asynccontextmanager
async def dead_at_without_machine(act: Play) -> AsyncIterator[None]:
    """An agent that died when it had asked for a machine, and nobody started one."""

    @asynccontextmanager
    async def nobody() -> AsyncIterator[None]:
        yield

    act.stage.somebody = nobody  # type: ignore[method-assign]
    async with dead_at(act, "start: machine released"):
        yield


@pytest.mark.parametrize("driver", ["qemu", "attach", "attach-command", "proxmox"])
async def test_files_that_a_dead_agent_left_are_gone_when_it_is_back(
    driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = FakeDevice()
    async with play(driver, monkeypatch, device=device) as act, dead_at(act, "start: paused"):
        assert launch_files(act)
        async with agent(act.stage, device=device) as second:
            [launch] = second.runner.launches(ALICE)
            assert launch.state is S.PAUSED
            assert launch_files(act) == []
            [machine] = act.stage.machines()
            await second.runner.abort(ALICE, launch.launch_id, act.rig.order().request_id)
            assert not alive(machine)


@pytest.mark.parametrize("driver", ["qemu", "attach", "attach-command", "proxmox"])
async def test_files_of_a_launch_that_had_just_ended_when_the_agent_died_are_gone_when_it_is_back(
    driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object, **__: object) -> None:
        raise asyncio.CancelledError

    async with play(driver, monkeypatch) as act:
        act.script.set(sev={"policy": 0})
        monkeypatch.setattr(act.rig.folders, "clear", die)
        with suppress(asyncio.CancelledError):
            await act.start()
        assert act.launch.state is S.FAILED
        folder = act.rig.folders.folder(act.launch.launch_id)
        await act.rig.leave()
        async with agent(act.stage, settings=SOON) as second:
            assert second.now(act.launch).state is S.FAILED
            assert launch_files(act) == []
            log = set() if driver == "attach" else {"machine.log"}
            assert {path.name for path in folder.iterdir()} == {"record.json", *log}
