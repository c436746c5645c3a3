"""On every driver: machines that are not as they must be, die, or say nothing end, and their launches with them."""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import replace
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest

from common.errors import PlatformFailed, Reason, SevattestError, Unavailable, WrongState
from host_agent.launches.launch import Launch
from host_agent.launches.state import LaunchState as S
from tests.support.agent import ALICE, HEADER, LIMITS, PAYLOAD, QUICK, FakeDevice, machines_live_on
from tests.support.plays import NOW, RUNNING, Play, agent, play
from tests.support.rpc import SettableClock
from tests.support.stages import STAGES


@pytest.fixture(params=list(STAGES))
def driver(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def test_a_launch_goes_through_its_states(driver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with play(driver, monkeypatch) as act:
        launch = await act.up_to(S.RESUMED)
        assert launch.driver == driver.removesuffix("-command")
        assert [len(act.script.commands(name)) for name in ("sev-inject-launch-secret", "cont")] == [1, 1]
        assert len(act.stage.machines()) == 1


@pytest.mark.parametrize(
    ("script", "kind", "reason"),
    [
        ({"sev": {"policy": 1}}, PlatformFailed, Reason.HYPERVISOR_FAILED),
        ({"sev": {"enabled": False}}, PlatformFailed, Reason.HYPERVISOR_FAILED),
        ({"sev": {"state": "nonsense"}}, PlatformFailed, Reason.HYPERVISOR_FAILED),
        ({"sev": {"sev-type": "sev-snp"}}, PlatformFailed, Reason.HYPERVISOR_FAILED),
        ({"sev": {"state": "launch-update"}}, WrongState, Reason.GUEST_NOT_PAUSED),
        ({"run": {"status": "internal-error"}}, WrongState, Reason.GUEST_NOT_PAUSED),
        (RUNNING, WrongState, Reason.GUEST_NOT_PAUSED),
    ],
    ids=["policy", "no-sev", "nonsense", "snp", "unmeasured", "internal-error", "running"],
)
async def test_a_machine_that_is_not_what_was_asked_for_is_ended(
    driver: str,
    script: dict[str, Any],
    kind: type[SevattestError],
    reason: Reason,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with play(driver, monkeypatch) as act:
        act.script.set(**script)
        with pytest.raises(kind) as failure:
            await act.start()
        assert failure.value.reason is reason
        assert act.launch.state is S.FAILED
        assert act.stage.machines() == []


async def test_a_machine_that_dies_before_its_monitor_is_a_failure(
    driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with play(driver, monkeypatch, settings=NOW if driver == "attach" else QUICK) as act:
        act.script.set(die={"stderr": "sev_kvm_init: failed to initialize ret=-25 fw_error=0", "code": 1})
        with pytest.raises(PlatformFailed) as failure:
            await act.start()
        if driver != "attach":
            assert "failed to initialize ret=-25" in failure.value.message
        assert act.launch.state is S.FAILED
        assert act.stage.machines() == []


@pytest.mark.parametrize("mute", ["silence", "close", "garbage"])
async def test_a_machine_whose_monitor_does_not_greet_is_ended(
    driver: str, mute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with play(driver, monkeypatch, settings=NOW) as act:
        act.script.set(mute=mute)
        with pytest.raises((PlatformFailed, Unavailable)):
            await act.start()
        # libvirt's answer may still be out; its end is tried again.
        async with asyncio.timeout(20):
            while not act.launch.is_final:
                await act.tick()
        assert act.launch.state is S.FAILED
        assert act.stage.machines() == []


async def test_a_machine_that_ignores_sigterm_is_killed(driver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with play(driver, monkeypatch, settings=replace(QUICK, stop_timeout=1)) as act:
        act.script.set(stubborn=True)
        launch = await act.start()
        assert len(act.stage.machines()) == 1
        assert (await act.rig.runner.abort(ALICE, launch.launch_id, uuid4())).state is S.ABORTED
        assert act.stage.machines() == []


async def next_step(act: Play, launch: Launch) -> Launch:
    """The step that is due."""
    runner, launch_id = act.rig.runner, launch.launch_id
    match launch.state:
        case S.PAUSED:
            return await runner.measure(ALICE, launch_id)
        case S.MEASURED:
            return await runner.inject(ALICE, launch_id, uuid4(), HEADER, PAYLOAD)
        case _:
            return await runner.resume(ALICE, launch_id, uuid4())


@pytest.mark.parametrize(
    ("command", "state"),
    [
        ("query-sev-launch-measure", S.PAUSED),
        ("sev-inject-launch-secret", S.MEASURED),
        ("cont", S.INJECTED),
        ("query-status", S.PAUSED),
    ],
)
async def test_a_machine_that_dies_in_a_step_ends_its_launch(
    driver: str, command: str, state: S, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with play(driver, monkeypatch) as act:
        launch = await act.up_to(state)
        act.script.set(on={command: [{"do": "die"}]})
        with pytest.raises(SevattestError):
            await next_step(act, launch)
        await act.rig.until(launch, S.FAILED)
        assert act.stage.machines() == []


@pytest.mark.parametrize("state", [S.PAUSED, S.MEASURED, S.INJECTED])
async def test_a_paused_machines_death_is_noticed(driver: str, state: S, monkeypatch: pytest.MonkeyPatch) -> None:
    async with play(driver, monkeypatch) as act:
        launch = await act.up_to(state)
        [pid] = act.stage.machines()
        os.kill(pid, signal.SIGKILL)
        ended = await act.rig.until(launch, S.FAILED)
        assert ended.failure is not None
        assert ended.failure.reason is Reason.GUEST_GONE


async def test_the_end_of_a_guest_that_ran_is_noticed(driver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with play(driver, monkeypatch) as act:
        launch = await act.up_to(S.RESUMED)
        [pid] = act.stage.machines()
        os.kill(pid, signal.SIGKILL)
        await act.rig.until(launch, S.STOPPED)


async def test_a_guest_that_somebody_resumes_before_it_has_its_secret_is_ended(
    driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with play(driver, monkeypatch) as act:
        launch = await act.up_to(S.MEASURED)
        act.script.set(**RUNNING)
        with pytest.raises(WrongState) as refusal:
            await act.rig.runner.inject(ALICE, launch.launch_id, uuid4(), HEADER, PAYLOAD)
        assert refusal.value.reason is Reason.GUEST_NOT_PAUSED
        assert act.stage.machines() == []


@pytest.mark.parametrize("state", [S.PAUSED, S.MEASURED, S.INJECTED])
async def test_a_guest_that_is_not_resumed_in_its_lifetime_is_ended(
    driver: str, state: S, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SettableClock()
    async with play(driver, monkeypatch, clock=clock) as act:
        launch = await act.up_to(state)
        clock.advance(LIMITS.lifetime + timedelta(seconds=1))
        await act.tick()
        ended = act.rig.now(launch)
        assert ended.state is S.ABORTED
        assert ended.failure is not None
        assert ended.failure.reason is Reason.LAUNCH_EXPIRED
        assert act.stage.machines() == []


async def test_a_machine_that_stays_silent_is_ended(driver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    machines_live_on(monkeypatch)
    device, clock = FakeDevice(), SettableClock()
    async with play(driver, monkeypatch, device=device, clock=clock) as act:
        launch = await act.up_to(S.PAUSED)
        act.script.set(on={"query-status": [{"do": "silence"}] * 100})
        # An agent with less patience, now that nothing honest is said any more. It looks once while it starts.
        await act.rig.leave()
        async with agent(act.stage, device=device, clock=clock, settings=NOW) as rig:
            for _ in range(LIMITS.silent_checks - 1):
                assert rig.now(launch).ending is None
                clock.advance(LIMITS.check_interval)
                await rig.supervisor.tick()
            assert rig.now(launch).is_final or rig.now(launch).ending is not None
            # libvirt's answer may still be out; its end is tried again.
            async with asyncio.timeout(20):
                while not rig.now(launch).is_final:
                    await rig.supervisor.tick()
            assert rig.now(launch).state is S.FAILED
            assert act.stage.machines() == []
        act.rig.ledger._launches.clear()


@pytest.mark.parametrize("driver", ["qemu", "attach", "attach-command", "proxmox"])
async def test_the_owners_files_are_private_and_gone_when_the_machine_is_up(
    driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, int] = {}
    async with play(driver, monkeypatch) as act:

        def look() -> None:
            for path in [*act.stage.root.rglob("*.b64"), *act.stage.root.rglob("launch.cfg")]:
                seen[path.name] = path.stat().st_mode & 0o777
                seen[f"{path.name}/.."] = path.parent.stat().st_mode & 0o777

        old = os.umask(0)
        try:
            async with act.stage.somebody():
                starting = asyncio.create_task(act.rig.runner.start(ALICE, act.rig.order()))
                while not starting.done():
                    look()
                    await asyncio.sleep(0.002)
            await starting
        finally:
            os.umask(old)
        names = {"godh.b64", "session.b64"} | (set() if driver == "qemu" else {"launch.cfg"})
        assert seen == {**dict.fromkeys(names, 0o600), **{f"{name}/..": 0o700 for name in names}}
        for name in names:
            assert not list(act.stage.root.rglob(name))


async def test_a_launch_that_fails_leaves_no_file_of_the_owners(driver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with play(driver, monkeypatch, settings=NOW if driver == "attach" else QUICK) as act:
        act.script.set(die={"stderr": "no", "code": 1})
        with pytest.raises(PlatformFailed):
            await act.start()
        assert not [*act.stage.root.rglob("*.b64"), *act.stage.root.rglob("launch.cfg")]
