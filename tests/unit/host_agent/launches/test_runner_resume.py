"""A guest runs once it has its secret, and what became of a lost answer is seen at the machine."""

from __future__ import annotations

import json
from uuid import uuid4

import pytest

from common.errors import OutcomeUnknown, PlatformFailed, Reason, Unavailable, WrongState
from host_agent.launches.state import LaunchState as S
from tests.support.agent import ALICE, HEADER, PAYLOAD, Rig, machines_live_on


class TestResumeGuest:
    async def test_a_guest_that_has_its_secret_runs(self, agent: Rig) -> None:
        launch = await agent.up_to(S.RESUMED)
        assert launch.state is S.RESUMED
        assert len(agent.script.commands("cont")) == 1

    @pytest.mark.parametrize("state", [S.PAUSED, S.MEASURED])
    async def test_a_guest_without_its_secret_never_runs(self, agent: Rig, state: S) -> None:
        launch = await agent.up_to(state)
        with pytest.raises(WrongState) as refusal:
            await agent.runner.resume(ALICE, launch.launch_id, uuid4())
        assert refusal.value.reason is Reason.WRONG_STATE
        assert not agent.script.commands("cont")

    async def test_a_guest_whose_injection_is_unknown_does_not_run(
        self, agent: Rig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        machines_live_on(monkeypatch)
        launch = await agent.up_to(S.MEASURED)
        agent.script.set(on={"sev-inject-launch-secret": [{"do": "close"}]})
        with pytest.raises(OutcomeUnknown):
            await agent.runner.inject(ALICE, launch.launch_id, uuid4(), HEADER, PAYLOAD)
        with pytest.raises(WrongState):
            await agent.runner.resume(ALICE, launch.launch_id, uuid4())
        assert not agent.script.commands("cont")

    async def test_resuming_again_is_answered_again(self, agent: Rig) -> None:
        launch = await agent.up_to(S.RESUMED)
        request_id = uuid4()
        for _ in range(2):
            assert (await agent.runner.resume(ALICE, launch.launch_id, request_id)).state is S.RESUMED
        assert len(agent.script.commands("cont")) == 1

    async def test_a_lost_answer_is_settled_by_looking_at_the_machine(self, agent: Rig) -> None:
        launch = await agent.up_to(S.INJECTED)
        agent.script.set(on={"cont": [{"do": "close", "effect": True}]})
        assert (await agent.runner.resume(ALICE, launch.launch_id, uuid4())).state is S.RESUMED

    async def test_a_lost_command_is_settled_by_looking_at_the_machine(self, agent: Rig) -> None:
        launch = await agent.up_to(S.INJECTED)
        agent.script.set(on={"cont": [{"do": "close"}]})
        with pytest.raises(PlatformFailed, match="ask again"):
            await agent.runner.resume(ALICE, launch.launch_id, uuid4())
        assert agent.now(launch).state is S.INJECTED
        assert (await agent.runner.resume(ALICE, launch.launch_id, uuid4())).state is S.RESUMED

    async def test_a_machine_that_does_not_say_leaves_the_outcome_unknown_until_it_does(self, hasty: Rig) -> None:
        launch = await hasty.up_to(S.INJECTED)
        hasty.hurry()
        hasty.script.set(on={"cont": [{"do": "close", "effect": True}], "query-status": [{"do": "silence"}] * 3})
        # query-status comes once before cont, and is silent.
        with pytest.raises(Unavailable):
            await hasty.runner.resume(ALICE, launch.launch_id, uuid4())
        assert hasty.now(launch).state is S.INJECTED
        hasty.script.set(
            on={
                "cont": [{"do": "close", "effect": True}],
                "query-status": [{"do": "events", "count": 1}] * 2 + [{"do": "silence"}],
            }
        )
        with pytest.raises(OutcomeUnknown):
            await hasty.runner.resume(ALICE, launch.launch_id, uuid4())
        assert hasty.now(launch).state is S.RESUMING
        hasty.script.set()
        assert (await hasty.runner.resume(ALICE, launch.launch_id, uuid4())).state is S.RESUMED

    async def test_a_machine_that_says_no_stays_injected(self, agent: Rig) -> None:
        launch = await agent.up_to(S.INJECTED)
        agent.script.set(on={"cont": [{"do": "error", "desc": "Resetting the Virtual Machine is required"}]})
        with pytest.raises(PlatformFailed, match="is required"):
            await agent.runner.resume(ALICE, launch.launch_id, uuid4())
        assert agent.now(launch).state is S.INJECTED

    async def test_a_machine_that_says_yes_and_stands_still_stays_injected(self, agent: Rig) -> None:
        launch = await agent.up_to(S.INJECTED)
        agent.script.set(on={"cont": [{"do": "wrong_id"}]}, run={"running": False, "status": "paused"})
        agent.script.set(on={"cont": [{"do": "text", "text": json.dumps({"return": {}, "id": "$ID"})}]})
        with pytest.raises(PlatformFailed, match="still paused"):
            await agent.runner.resume(ALICE, launch.launch_id, uuid4())
        assert agent.now(launch).state is S.INJECTED

    async def test_a_machine_that_dies_of_being_resumed_ends_the_launch(self, agent: Rig) -> None:
        launch = await agent.up_to(S.INJECTED)
        agent.script.set(on={"cont": [{"do": "die", "stderr": "LAUNCH_FINISH ret=-5 fw_error=2"}]})
        with pytest.raises(WrongState) as failure:
            await agent.runner.resume(ALICE, launch.launch_id, uuid4())
        assert failure.value.reason is Reason.GUEST_GONE
        assert agent.now(launch).state is S.FAILED

    async def test_a_guest_with_a_very_short_life_has_run(self, agent: Rig) -> None:
        launch = await agent.up_to(S.INJECTED)
        agent.script.set(on={"query-status": [{"do": "events", "count": 0}, {"do": "die"}]})
        outcome = await agent.runner.resume(ALICE, launch.launch_id, uuid4())
        assert outcome.state is S.STOPPED
        assert outcome.failure is None
