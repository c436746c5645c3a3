"""A launch that is given up leaves no machine, no file and no way back."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from uuid import uuid4

import pytest

from common.errors import NotFound, OutcomeUnknown, WrongState
from host_agent.launches.launch import REQUESTS_MAX
from host_agent.launches.ledger import GIVEN_UP_MAX
from host_agent.launches.state import LaunchState as S
from tests.support.agent import ALICE, BOB, HEADER, PAYLOAD, QUICK, Rig, alive, pid_of, rig
from tests.support.rpc import SettableClock


class TestAbortLaunch:
    @pytest.mark.parametrize("state", [S.PAUSED, S.MEASURED, S.INJECTED])
    async def test_a_launch_that_is_given_up_leaves_no_machine_and_no_file(self, agent: Rig, state: S) -> None:
        launch = await agent.up_to(state)
        ended = await agent.runner.abort(ALICE, launch.launch_id, uuid4())
        assert ended.state is S.ABORTED
        assert not alive(pid_of(launch))
        assert [path.name for path in agent.folders.folder(launch.launch_id).iterdir()] == ["record.json"]

    async def test_a_guest_that_runs_is_stopped(self, agent: Rig) -> None:
        launch = await agent.up_to(S.RESUMED)
        ended = await agent.runner.abort(ALICE, launch.launch_id, uuid4())
        assert ended.state is S.STOPPED
        assert not alive(pid_of(launch))

    async def test_giving_up_again_is_answered_again(self, agent: Rig) -> None:
        launch = await agent.up_to(S.PAUSED)
        request_id = uuid4()
        first = await agent.runner.abort(ALICE, launch.launch_id, request_id)
        assert await agent.runner.abort(ALICE, launch.launch_id, request_id) == first
        assert (await agent.runner.abort(ALICE, launch.launch_id, uuid4())).state is S.ABORTED

    async def test_another_caller_ends_nothing(self, agent: Rig) -> None:
        launch = await agent.up_to(S.PAUSED)
        with pytest.raises(NotFound):
            await agent.runner.abort(BOB, launch.launch_id, uuid4())
        assert alive(pid_of(launch))

    async def test_a_start_that_arrives_after_it_was_given_up_starts_nothing(self, agent: Rig) -> None:
        order = agent.order()
        with pytest.raises(NotFound):
            await agent.runner.abort(ALICE, order.launch_id, uuid4())
        with pytest.raises(WrongState, match="given up"):
            await agent.runner.start(ALICE, order)
        assert not agent.script.started
        assert (await agent.runner.start(ALICE, agent.order())).state is S.PAUSED

    async def test_what_another_caller_gave_up_starts_all_the_same(self, agent: Rig) -> None:
        order = agent.order()
        with pytest.raises(NotFound):
            await agent.runner.abort(BOB, order.launch_id, uuid4())
        assert (await agent.runner.start(ALICE, order)).state is S.PAUSED

    async def test_an_id_that_was_given_up_is_remembered_for_a_while_only(self, tmp_path: Path) -> None:
        clock = SettableClock()
        async with rig(tmp_path, clock=clock) as agent:
            order = agent.order()
            with pytest.raises(NotFound):
                await agent.runner.abort(ALICE, order.launch_id, uuid4())
            clock.advance(timedelta(minutes=6))
            assert (await agent.runner.start(ALICE, order)).state is S.PAUSED

    async def test_invented_ids_cost_no_more_than_their_bound(self, agent: Rig) -> None:
        for _ in range(GIVEN_UP_MAX + 10):
            with pytest.raises(NotFound):
                await agent.runner.abort(ALICE, uuid4(), uuid4())
        assert len(agent.ledger.given_up) == GIVEN_UP_MAX

    async def test_a_launch_that_remembers_all_the_requests_that_it_can_is_ended_all_the_same(self, agent: Rig) -> None:
        launch = await agent.up_to(S.RESUMED)
        for _ in range(REQUESTS_MAX - len(agent.now(launch).requests)):
            await agent.runner.resume(ALICE, launch.launch_id, uuid4())
        assert (await agent.runner.abort(ALICE, launch.launch_id, uuid4())).state is S.STOPPED
        assert not alive(pid_of(launch))
        assert (await agent.runner.abort(ALICE, launch.launch_id, uuid4())).state is S.STOPPED

    async def test_a_launch_that_was_given_up_goes_nowhere(self, agent: Rig) -> None:
        launch = await agent.up_to(S.MEASURED)
        await agent.runner.abort(ALICE, launch.launch_id, uuid4())
        for step in (
            agent.runner.measure(ALICE, launch.launch_id),
            agent.runner.inject(ALICE, launch.launch_id, uuid4(), HEADER, PAYLOAD),
            agent.runner.resume(ALICE, launch.launch_id, uuid4()),
            agent.runner.report(ALICE, launch.launch_id, bytes(16)),
        ):
            with pytest.raises(WrongState):
                await step

    async def test_a_stubborn_machine_and_its_family_are_killed(self, tmp_path: Path) -> None:
        async with rig(tmp_path, settings=replace(QUICK, stop_timeout=1)) as agent:
            agent.script.set(stubborn=True, child=True)
            launch = await agent.up_to(S.PAUSED)
            [child] = [entry["child"] for entry in agent.script.journal if "child" in entry]
            assert alive(child)
            await agent.runner.abort(ALICE, launch.launch_id, uuid4())
            assert not alive(pid_of(launch))
            assert not alive(child)

    async def test_a_guest_whose_resumption_is_unknown_is_stopped_as_what_it_is(self, hasty: Rig) -> None:
        launch = await hasty.up_to(S.INJECTED)
        hasty.hurry()
        hasty.script.set(
            on={
                "cont": [{"do": "close", "effect": True}],
                "query-status": [{"do": "events", "count": 0}, {"do": "silence"}],
            }
        )
        with pytest.raises(OutcomeUnknown):
            await hasty.runner.resume(ALICE, launch.launch_id, uuid4())
        assert (await hasty.runner.abort(ALICE, launch.launch_id, uuid4())).state is S.STOPPED
