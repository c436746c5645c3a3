"""Machines that die, and monitors that vanish, at every step: the launch ends, and no guest runs without its owner."""

from __future__ import annotations

import asyncio
from uuid import UUID, uuid4

import pytest

from common.errors import Reason, WrongState
from orchestrator.flow import Outcome, Step
from tests.e2e.conftest import refused
from tests.e2e.scene import IMPATIENT, Scene
from tests.e2e.workloads import PLAIN
from tests.support.eventually import until
from tests.support.stack import Crash

# The step that finds out, for each step before which a machine may be lost: the owner releases without asking it.
FOUND_BY = {
    Step.MEASURE: Step.MEASURE,
    Step.RELEASE: Step.INJECT,
    Step.INJECT: Step.INJECT,
    Step.RESUME: Step.RESUME,
}
# What the agent has started, which performs the launch, or the real QEMU that runs below it.
_KILLED = pytest.mark.parametrize("killed", ["front", "QEMU"])


@refused("{killed} killed before {step}")
@_KILLED
@pytest.mark.parametrize("step", list(FOUND_BY))
async def test_a_machine_that_is_killed_takes_its_launch_with_it(scene: Scene, step: Step, killed: str) -> None:
    needs_it(scene, killed)
    crash = Crash(before={step: lambda: scene.kill("web", below=killed == "QEMU")})
    outcome = await scene.launch("web", PLAIN, crash=crash)
    scene.refused(outcome, FOUND_BY[step], Reason.GUEST_GONE)
    assert await state_at_host(scene, outcome) == "failed"
    assert bool(crash.packets) == (step in {Step.INJECT, Step.RELEASE, Step.RESUME})


@refused("{killed} killed while it starts")
@_KILLED
async def test_a_machine_that_is_killed_while_it_starts_fails_its_launch(scene: Scene, killed: str) -> None:
    needs_it(scene, killed)
    starting = asyncio.create_task(scene.launch("web", PLAIN))
    await until(lambda: scene.pid_below("web") if killed == "QEMU" else scene.pid("web"))
    scene.kill("web", below=killed == "QEMU")
    scene.refused(await starting, Step.START, Reason.HYPERVISOR_FAILED)


@refused("{killed} killed after resume, a second packet")
@_KILLED
async def test_a_machine_that_is_killed_after_its_guest_ran_gives_nobody_a_second_packet(
    scene: Scene, killed: str
) -> None:
    needs_it(scene, killed)
    scene.allow("web", PLAIN)
    outcome = await scene.launch("web", PLAIN)
    assert outcome.error is None, outcome.error
    assert outcome.session is not None
    assert outcome.measured is not None
    scene.kill("web", below=killed == "QEMU")
    await scene.was_killed_as_it_ran("web")
    with pytest.raises(WrongState) as refusal:
        await scene.sides.owner.release(outcome.session.launch_id, outcome.measured, request_id=uuid4(), within=20)
    assert refusal.value.reason is Reason.ALREADY_RELEASED
    assert await state_at_host(scene, outcome) == "stopped"
    scene.row.reason = refusal.value.reason.value


@refused("QMP socket gone before {step}")
@pytest.mark.parametrize("step", list(FOUND_BY))
async def test_a_machine_whose_monitor_has_vanished_is_ended(scene: Scene, step: Step) -> None:
    crash = Crash()
    launch_id: list[UUID] = []

    def vanish() -> None:
        (socket,) = scene.bench.site.host.glob("state/launches/*/qmp.sock")
        launch_id.append(UUID(socket.parent.name))
        socket.unlink()

    crash.before[step] = vanish
    outcome = await scene.launch("web", PLAIN, crash=crash, patience=IMPATIENT)
    scene.refused(outcome, FOUND_BY[step], Reason.PLATFORM_UNAVAILABLE)
    assert outcome.session is not None
    assert launch_id == [outcome.session.launch_id]
    assert await state_at_host(scene, outcome) == "aborted"


@refused("QMP socket gone from the start")
async def test_a_machine_whose_monitor_never_greets_is_ended(scene: Scene) -> None:
    outcome = await scene.launch("monitor-elsewhere", PLAIN)
    scene.refused(outcome, Step.START, Reason.HYPERVISOR_FAILED)
    assert outcome.error is not None
    assert "monitor did not greet" in str(outcome.error)


async def state_at_host(scene: Scene, outcome: Outcome) -> str:
    """Where the launch stands at the agent; it may be about to note a death."""
    assert outcome.session is not None
    launch_id = outcome.session.launch_id
    async with asyncio.timeout(10):
        while True:
            state = await scene.sides.host.state(launch_id, within=5)
            if state in {"failed", "aborted", "stopped"}:
                return state


def needs_it(scene: Scene, killed: str) -> None:
    """Skip where there is no real QEMU below the machine."""
    if killed == "QEMU" and not scene.bench.real:
        pytest.skip("the stand-in machine has no QEMU below it")
