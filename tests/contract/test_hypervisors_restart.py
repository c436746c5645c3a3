"""On every driver: answers that are lost, agents that restart, and machines that are nobody's business."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from common.errors import OutcomeUnknown, PlatformFailed, Reason, WrongState
from host_agent.launches.runner import StartRequest
from host_agent.launches.state import LaunchState as S
from tests.support.agent import ALICE, HEADER, PAYLOAD, QUICK, FakeDevice, Rig, alive, change, machines_live_on
from tests.support.eventually import until
from tests.support.plays import NOW, WITH_A_PLACE, Play, agent, play
from tests.support.stages import STAGES, LibvirtStage


@pytest.fixture(params=list(STAGES))
def driver(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("outcome", ["done", "not-done"])
async def test_a_packet_whose_answer_is_lost_is_unknown_and_the_same_bytes_heal_it(
    driver: str, outcome: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machines_live_on(monkeypatch)
    async with play(driver, monkeypatch) as act:
        launch = await act.up_to(S.MEASURED)
        _lose(act, "sev-inject-launch-secret", effect=outcome == "done")
        with pytest.raises(OutcomeUnknown):
            await act.rig.runner.inject(ALICE, launch.launch_id, uuid4(), HEADER, PAYLOAD)
        assert act.rig.now(launch).state is S.INJECTING
        with pytest.raises(WrongState):
            await act.rig.runner.inject(ALICE, launch.launch_id, uuid4(), HEADER, PAYLOAD[::-1])
        again = await act.rig.runner.inject(ALICE, launch.launch_id, uuid4(), HEADER, PAYLOAD)
        assert again.state is S.INJECTED


@pytest.mark.parametrize("outcome", ["done", "not-done"])
async def test_a_resume_whose_answer_is_lost_is_what_the_machine_says(
    driver: str, outcome: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with play(driver, monkeypatch) as act:
        launch = await act.up_to(S.INJECTED)
        _lose(act, "cont", effect=outcome == "done")
        if outcome == "done":
            assert (await act.rig.runner.resume(ALICE, launch.launch_id, uuid4())).state is S.RESUMED
        else:
            with pytest.raises(PlatformFailed, match="not resumed"):
                await act.rig.runner.resume(ALICE, launch.launch_id, uuid4())
            assert act.rig.now(launch).state is S.INJECTED
            assert (await act.rig.runner.resume(ALICE, launch.launch_id, uuid4())).state is S.RESUMED


def _lose(act: Play, command: str, *, effect: bool) -> None:
    """Lose the next answer to `command`, as this driver would: the monitor's, or the daemon's."""
    if isinstance(act.stage, LibvirtStage):
        act.stage.daemon.next_fault = "unheard" if effect else "lost"
    else:
        act.script.set(on={command: [{"do": "close", "effect": effect}]})


@pytest.mark.parametrize("state", [S.PAUSED, S.MEASURED, S.INJECTED, S.RESUMED])
async def test_an_agent_that_restarts_finds_its_machine_and_goes_on(
    driver: str, state: S, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = FakeDevice()
    async with play(driver, monkeypatch, device=device) as act:
        launch = await act.up_to(state)
        before = act.stage.machines()
        await act.rig.leave()
        async with agent(act.stage, device=device) as second:
            found = second.now(launch)
            assert found == act.rig.now(launch)
            if found.state is S.PAUSED:
                found = await second.runner.measure(ALICE, launch.launch_id)
            if found.state is S.MEASURED:
                await second.runner.inject(ALICE, launch.launch_id, uuid4(), HEADER, PAYLOAD)
            assert (await second.runner.resume(ALICE, launch.launch_id, uuid4())).state is S.RESUMED
            assert act.stage.machines() == before
            assert (await second.runner.abort(ALICE, launch.launch_id, uuid4())).state is S.STOPPED
            assert act.stage.machines() == []
        act.rig.ledger._launches.clear()


@pytest.mark.parametrize("state", [S.PAUSED, S.INJECTED, S.RESUMED])
async def test_an_agent_that_restarts_sees_that_its_machine_is_gone(
    driver: str, state: S, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with play(driver, monkeypatch) as act:
        launch = await act.up_to(state)
        [pid] = act.stage.machines()
        await act.rig.leave()
        os.kill(pid, signal.SIGKILL)
        await until(lambda: not alive(pid))
        async with agent(act.stage) as second:
            await second.until(launch, S.STOPPED if state is S.RESUMED else S.FAILED)
        act.rig.ledger._launches.clear()


@pytest.mark.parametrize("point", ["start: machine released", "start: machine checked"])
async def test_an_agent_that_died_while_its_machine_came_up_goes_on_with_it(
    driver: str, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = FakeDevice()
    async with play(driver, monkeypatch, device=device) as act:
        async with act.stage.somebody():
            order = await _dies_at(act, point)
            async with agent(act.stage, device=device) as second:
                [launch] = second.runner.launches(ALICE)
                if driver == "libvirt" and point == "start: machine released":
                    # libvirt was not asked yet.
                    assert launch.state is S.FAILED
                else:
                    # The same request again is answered when the machine is there, and starts no second one.
                    assert (await second.runner.start(ALICE, order)).state is S.PAUSED
                    assert len(act.stage.machines()) == 1
                    await second.runner.abort(ALICE, launch.launch_id, uuid4())
                assert act.stage.machines() == []
        act.rig.ledger._launches.clear()


@pytest.mark.parametrize("point", ["start: machine held", "start: machine written down"])
async def test_a_machine_that_was_held_when_the_agent_died_does_not_begin_and_is_not_waited_for(
    driver: str, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with play(driver, monkeypatch) as act:
        async with act.stage.somebody():
            await _dies_at(act, point)
            async with asyncio.timeout(QUICK.start_timeout / 2), agent(act.stage) as second:
                [launch] = second.runner.launches(ALICE)
                await second.until(launch, S.FAILED)  # its gate may be closing just now
        assert not act.script.started
        act.rig.ledger._launches.clear()


async def _dies_at(act: Play, point: str) -> StartRequest:
    """A start during which the agent ends at this point; what was asked."""
    order = act.rig.order()

    def stop_there(passed: str, _launch_id: object, /) -> None:
        if passed == point:
            raise asyncio.CancelledError

    act.rig.custody.observe = stop_there
    with pytest.raises(asyncio.CancelledError):
        await act.rig.runner.start(ALICE, order)
    await act.rig.leave()
    return order


async def test_a_guest_that_left_the_configuration_is_still_looked_after(
    driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with play(driver, monkeypatch) as act:
        launch = await act.up_to(S.PAUSED)
        await act.rig.leave()
        hypervisor: Any = act.stage.hypervisor(QUICK)
        hypervisor.define({})
        rig = Rig(act.stage.state_dir, hypervisor=hypervisor)
        rig.folders.open()
        try:
            await rig.supervisor.recover()
            assert (await rig.runner.measure(ALICE, launch.launch_id)).state is S.MEASURED
            assert (await rig.runner.abort(ALICE, launch.launch_id, uuid4())).state is S.ABORTED
            assert act.stage.machines() == []
        finally:
            await rig.leave()
        act.rig.ledger._launches.clear()


@pytest.mark.parametrize("driver", WITH_A_PLACE)
async def test_a_machine_that_is_in_the_guests_place_already_is_left_alone(
    driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with play(driver, monkeypatch) as act:
        other = act.stage.occupy()
        await until(lambda: any("listening" in entry for entry in act.script.journal))
        with pytest.raises((WrongState, PlatformFailed)):
            await act.start()
        assert act.launch.state is S.FAILED
        assert alive(other)
        assert not [entry for entry in act.script.journal if entry.get("execute") in {"cont", "quit", "stop"}]
        os.kill(other, signal.SIGKILL)


@pytest.mark.parametrize("driver", WITH_A_PLACE)
async def test_a_machine_that_took_a_dead_ones_place_is_not_taken_for_it(
    driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with play(driver, monkeypatch) as act:
        launch = await act.up_to(S.MEASURED)
        [pid] = act.stage.machines()
        await act.rig.leave()
        os.kill(pid, signal.SIGKILL)
        await until(lambda: not alive(pid))
        for stale in (act.stage.root / "q", act.stage.root / "pve" / "100.qmp"):
            stale.unlink(missing_ok=True)
        other = act.stage.occupy()
        async with agent(act.stage) as second:
            ended = await second.until(launch, S.FAILED)
            assert ended.failure is not None
            assert ended.failure.reason is Reason.GUEST_GONE
            assert alive(other)
        os.kill(other, signal.SIGKILL)
        act.rig.ledger._launches.clear()


async def test_an_ended_launch_ends_nothing_any_more(driver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with play(driver, monkeypatch) as act:
        first = await act.up_to(S.RESUMED)
        await act.rig.runner.abort(ALICE, first.launch_id, uuid4())
        second = await act.up_to(S.RESUMED)
        [pid] = act.stage.machines()
        assert (await act.rig.runner.abort(ALICE, first.launch_id, uuid4())).state is S.STOPPED
        await act.tick()
        assert alive(pid)
        assert act.rig.now(second).state is S.RESUMED


@pytest.mark.parametrize("driver", ["attach", "proxmox"])
@pytest.mark.skipif(
    os.geteuid() != 0 or not Path("/usr/bin/python3").exists(),
    reason="a monitor of another user needs root, and a python3 that other users may run",
)
async def test_a_monitor_of_another_user_is_not_believed_and_its_process_not_touched(
    driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(NOW, start_timeout=QUICK.start_timeout)

    def hurry(point: str, _launch_id: object, /) -> None:
        if point == "start: machine written down":  # what is honest has been done
            change(settings, start_timeout=3)

    async with play(driver, monkeypatch, settings=settings) as act:
        act.rig.custody.observe = hurry
        place = act.stage.root / "q" if driver == "attach" else act.stage.root / "pve" / "100.qmp"
        act.stage.root.chmod(0o777)
        code = (
            "import socket, sys; s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen(); print(flush=True);"
            "c = [s.accept()[0] for _ in range(1000)]"
        )
        runs = act.rig.runner.start(ALICE, act.rig.order())
        if driver == "proxmox":
            act.script.set(no_socket=True)
        starting = asyncio.create_task(runs)
        file = act.stage.root / ("in" if driver == "attach" else "run/100") / "launch.cfg"
        await until(file.exists)
        place.parent.chmod(0o777)
        other = await asyncio.to_thread(
            subprocess.Popen,
            ["/usr/bin/python3", "-ISE", "-c", code, str(place)],
            stdout=subprocess.PIPE,
            user=65534,
            group=65534,
        )
        try:
            with pytest.raises(PlatformFailed):
                await starting
            assert act.launch.state is S.FAILED
            assert other.poll() is None
        finally:
            other.kill()
            other.communicate()
