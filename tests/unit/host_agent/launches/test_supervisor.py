"""What happens to launches when nobody asks: deaths, time limits, guests that run too early, a full disk."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from common.errors import InvalidInput, NotFound, OutcomeUnknown, Reason, Unavailable, WrongState
from host_agent.launches.launch import Failure
from host_agent.launches.state import LaunchState as S
from tests.support.agent import ALICE, HEADER, LIMITS, PAYLOAD, Rig, alive, machines_live_on, pid_of, reason, rig
from tests.support.eventually import until
from tests.support.plays import RUNNING


class TestDeath:
    @pytest.mark.parametrize(
        ("state", "then"),
        [(S.PAUSED, S.FAILED), (S.MEASURED, S.FAILED), (S.INJECTED, S.FAILED), (S.RESUMED, S.STOPPED)],
    )
    async def test_a_machines_death_is_noticed_as_it_happens(self, agent: Rig, state: S, then: S) -> None:
        launch = await agent.up_to(state)
        os.kill(pid_of(launch), signal.SIGKILL)
        seen = await agent.until(launch, then)
        assert reason(seen) is (Reason.GUEST_GONE if then is S.FAILED else None)
        assert agent.ledger.unfinished() == []

    async def test_what_a_dead_machine_leaves_behind_is_ended(self, agent: Rig) -> None:
        agent.script.set(child=True)
        launch = await agent.up_to(S.PAUSED)
        [child] = [entry["child"] for entry in agent.script.journal if "child" in entry]
        os.kill(pid_of(launch), signal.SIGKILL)
        await agent.until(launch, S.FAILED)
        assert not alive(child)

    async def test_a_failed_launch_keeps_its_machines_last_words(self, agent: Rig) -> None:
        launch = await agent.up_to(S.PAUSED)
        os.kill(pid_of(launch), signal.SIGKILL)
        await agent.until(launch, S.FAILED)
        # The end is written down first; the machine's files go right after.
        folder = agent.folders.folder(launch.launch_id)
        await until(lambda: {path.name for path in folder.iterdir()} == {"record.json", "machine.log"})


class TestLifetime:
    @pytest.mark.parametrize("state", [S.PAUSED, S.MEASURED, S.INJECTED])
    async def test_a_launch_that_is_not_resumed_in_time_is_ended(self, agent: Rig, state: S) -> None:
        launch = await agent.up_to(state)
        agent.clock.advance(LIMITS.lifetime)
        await agent.supervisor.tick()
        assert agent.now(launch).state is state
        agent.clock.advance(timedelta(seconds=1))
        await agent.supervisor.tick()
        assert agent.now(launch).state is S.ABORTED
        assert not alive(pid_of(launch))
        with pytest.raises(WrongState) as refusal:
            await agent.runner.inject(ALICE, launch.launch_id, uuid4(), HEADER, PAYLOAD)
        assert refusal.value.reason is Reason.LAUNCH_EXPIRED

    async def test_a_guest_that_runs_has_no_lifetime(self, agent: Rig) -> None:
        launch = await agent.up_to(S.RESUMED)
        agent.clock.advance(timedelta(days=400))
        await agent.supervisor.tick()
        assert agent.now(launch).state is S.RESUMED
        assert alive(pid_of(launch))


class TestLooks:
    @pytest.mark.parametrize("state", [S.PAUSED, S.MEASURED])
    async def test_a_guest_that_somebody_else_resumed_too_early_is_ended(self, agent: Rig, state: S) -> None:
        launch = await agent.up_to(state)
        agent.script.set(**RUNNING)
        await agent.supervisor.tick()
        assert agent.now(launch).state is S.FAILED
        assert reason(agent.now(launch)) is Reason.GUEST_NOT_PAUSED
        assert not alive(pid_of(launch))

    async def test_a_paused_guest_is_left_alone(self, agent: Rig) -> None:
        launch = await agent.up_to(S.MEASURED)
        for _ in range(5):
            agent.clock.advance(LIMITS.check_interval)
            await agent.supervisor.tick()
        assert agent.now(launch) == launch

    async def test_looks_keep_their_interval(self, agent: Rig) -> None:
        await agent.up_to(S.MEASURED)
        await agent.supervisor.tick()
        looks = len(agent.script.commands("query-status"))
        await agent.supervisor.tick()
        assert len(agent.script.commands("query-status")) == looks
        agent.clock.advance(LIMITS.check_interval)
        await agent.supervisor.tick()
        assert len(agent.script.commands("query-status")) == looks + 1

    @pytest.mark.parametrize(("state", "then"), [(S.MEASURED, S.FAILED), (S.INJECTED, S.INJECTED)])
    async def test_a_machine_that_never_says_whether_it_runs_is_ended_unless_it_is_attested(
        self, tmp_path: Path, state: S, then: S, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        machines_live_on(monkeypatch)
        async with rig(tmp_path) as agent:
            launch = await agent.up_to(state)
            agent.hurry(0.2)
            agent.script.set(mute="silence")
            for _ in range(LIMITS.silent_checks):
                assert agent.now(launch).state is state
                agent.clock.advance(LIMITS.check_interval)
                await agent.supervisor.tick()
            assert agent.now(launch).state is then
            assert alive(pid_of(launch)) is (then is S.INJECTED)

    async def test_an_end_that_takes_many_tries_keeps_its_reason(
        self, agent: Rig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        launch = await agent.up_to(S.MEASURED)
        machine = agent.custody.machine(launch.launch_id)
        assert machine is not None

        async def hung() -> None:
            raise Unavailable(Reason.PLATFORM_UNAVAILABLE, "the machine was killed, and its process does not end")

        with monkeypatch.context() as patch:
            patch.setattr(machine, "end", hung)
            with pytest.raises(Unavailable):
                await agent.runner.abort(ALICE, launch.launch_id, uuid4())
            for _ in range(LIMITS.silent_checks - 1):
                await agent.supervisor.tick()
            tries = []

            async def at_last() -> None:
                tries.append(1)
                if len(tries) == 1:
                    await hung()

            patch.setattr(machine, "end", at_last)
            await agent.supervisor.tick()
            await agent.supervisor.tick()
        ended = agent.now(launch)
        assert ended.state is S.ABORTED
        assert ended.failure is None
        os.kill(pid_of(launch), signal.SIGKILL)
        await until(lambda: not alive(pid_of(launch)))

    async def test_the_machines_log_is_kept_within_its_bound(self, agent: Rig) -> None:
        agent.script.set(noise=1 << 20)
        launch = await agent.up_to(S.PAUSED)
        log = agent.folders.folder(launch.launch_id) / "machine.log"
        assert log.stat().st_size > 1 << 20
        await agent.supervisor.tick()
        assert log.stat().st_size <= 256 * 1024


class TestRetention:
    async def test_ended_launches_are_forgotten_when_they_are_old(self, agent: Rig) -> None:
        order = agent.order()
        launch = await agent.runner.start(ALICE, order)
        await agent.runner.abort(ALICE, launch.launch_id, uuid4())
        agent.clock.advance(LIMITS.retain_age)
        await agent.supervisor.tick()
        assert agent.now(launch).state is S.ABORTED
        agent.clock.advance(timedelta(minutes=11))
        await agent.supervisor.tick()
        with pytest.raises(NotFound):
            agent.now(launch)
        assert not agent.folders.folder(launch.launch_id).exists()

    async def test_the_oldest_of_too_many_ended_launches_are_forgotten(self, tmp_path: Path) -> None:
        async with rig(tmp_path, limits=replace(LIMITS, retain_count=2)) as agent:
            for _ in range(4):
                launch = await agent.up_to(S.PAUSED)
                await agent.runner.abort(ALICE, launch.launch_id, uuid4())
                agent.clock.advance(timedelta(seconds=1))
            running = await agent.up_to(S.RESUMED)
            newest = [launch.launch_id for launch in agent.runner.launches(ALICE)][:3]
            await agent.supervisor.tick()
            assert [launch.launch_id for launch in agent.runner.launches(ALICE)] == newest
            assert running.launch_id in newest


class TestFullDisk:
    async def test_a_launch_that_cannot_be_written_down_starts_nothing(
        self, agent: Rig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        order = agent.order()
        with monkeypatch.context() as patch:
            patch.setattr(agent.folders, "save", full)
            with pytest.raises(Unavailable) as failure:
                await agent.runner.start(ALICE, order)
        assert failure.value.reason is Reason.STORE_UNAVAILABLE
        assert not agent.script.started
        assert (await agent.runner.start(ALICE, order)).state is S.PAUSED

    async def test_a_packet_that_cannot_be_written_down_is_not_sent(
        self, agent: Rig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        launch = await agent.up_to(S.MEASURED)
        with monkeypatch.context() as patch:
            patch.setattr(agent.folders, "save", full)
            with pytest.raises(Unavailable):
                await agent.runner.inject(ALICE, launch.launch_id, uuid4(), HEADER, PAYLOAD)
        assert not agent.script.commands("sev-inject-launch-secret")
        assert agent.now(launch).state is S.MEASURED
        done = await agent.runner.inject(ALICE, launch.launch_id, uuid4(), HEADER, PAYLOAD)
        assert done.state is S.INJECTED

    async def test_a_packet_that_was_handed_over_and_not_written_down_is_of_unknown_outcome(
        self, agent: Rig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        launch = await agent.up_to(S.MEASURED)
        with monkeypatch.context() as patch:
            full_after(agent, "inject: answered", patch)
            with pytest.raises(OutcomeUnknown):
                await agent.runner.inject(ALICE, launch.launch_id, uuid4(), HEADER, PAYLOAD)
        assert agent.now(launch).state is S.INJECTING
        done = await agent.runner.inject(ALICE, launch.launch_id, uuid4(), HEADER, PAYLOAD)
        assert done.state is S.INJECTED

    @pytest.mark.parametrize("lives", [True, False])
    async def test_a_guest_that_was_resumed_and_not_written_down_is_of_unknown_outcome(
        self, agent: Rig, monkeypatch: pytest.MonkeyPatch, *, lives: bool
    ) -> None:
        launch = await agent.up_to(S.INJECTED)
        if not lives:
            agent.script.set(on={"query-status": [{"do": "events", "count": 0}, {"do": "die"}]})
        with monkeypatch.context() as patch:
            full_after(agent, "resume: answered", patch)
            with pytest.raises(OutcomeUnknown):
                await agent.runner.resume(ALICE, launch.launch_id, uuid4())
        assert agent.now(launch).state is S.RESUMING
        if lives:
            assert (await agent.runner.resume(ALICE, launch.launch_id, uuid4())).state is S.RESUMED

    async def test_a_start_that_failed_and_could_not_be_written_down_is_no_success_when_it_is_repeated(
        self, agent: Rig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        order = agent.order()
        with monkeypatch.context() as patch:
            full_after(agent, "start: machine checked", patch)
            for _ in range(2):
                with pytest.raises(Unavailable):
                    await agent.runner.start(ALICE, order)
        with pytest.raises(WrongState) as refusal:
            await agent.runner.start(ALICE, order)
        assert refusal.value.reason is Reason.GUEST_GONE

    async def test_a_machine_is_ended_although_its_end_cannot_be_written_down_and_the_record_follows(
        self, agent: Rig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        launch = await agent.up_to(S.MEASURED)
        with monkeypatch.context() as patch:
            patch.setattr(agent.folders, "save", full)
            with pytest.raises(Unavailable):
                await agent.runner.abort(ALICE, launch.launch_id, uuid4())
            assert not alive(pid_of(launch))
            async with agent.ledger.lock(launch.launch_id):
                pass  # whoever noticed the death has met the full disk too
        await agent.supervisor.tick()
        assert agent.now(launch).is_final


async def test_two_agents_never_share_a_folder(agent: Rig) -> None:
    with pytest.raises(InvalidInput, match="another sev-host-agent"):
        async with rig(agent.folder):
            pass


def full(_launch_id: object, _record: bytes) -> None:
    raise Unavailable(Reason.STORE_UNAVAILABLE, "no space left on device")


def full_after(agent: Rig, point: str, patch: pytest.MonkeyPatch) -> None:
    """Let the disk be full from the moment that a step passes `point`."""

    def note(passed: str, _launch_id: UUID, /) -> None:
        if passed == point:
            patch.setattr(agent.folders, "save", full)

    patch.setattr(agent.custody, "observe", note)


def test_a_failure_comes_back_as_the_error_that_it_was() -> None:
    error = WrongState(Reason.LAUNCH_EXPIRED, "too late", launch_id="x")
    again = Failure.of(error).error()
    assert (type(again), again.reason, again.message, again.fields) == (
        WrongState,
        error.reason,
        "too late",
        error.fields,
    )
