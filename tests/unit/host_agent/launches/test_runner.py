"""What is asked of a launch: its measurement, a report, and how it stands."""

from __future__ import annotations

import asyncio
import base64
from datetime import timedelta
from uuid import uuid4

import pytest

from common.errors import NotFound, PlatformFailed, Reason, Unavailable, WrongState
from host_agent.launches.state import LaunchState as S
from tests.support.agent import ALICE, BOB, Rig, machines_live_on


class TestGetMeasurement:
    async def test_the_measurement_comes_with_the_firmwares_version(self, agent: Rig) -> None:
        launch = await agent.up_to(S.MEASURED)
        assert launch.measurement == bytes(range(48))
        assert str(launch.firmware) == "1.55.24"
        assert launch.state is S.MEASURED

    async def test_a_measurement_is_read_once_and_then_answered_from_the_record(self, agent: Rig) -> None:
        launch = await agent.up_to(S.RESUMED)
        assert (await agent.runner.measure(ALICE, launch.launch_id)).measurement == launch.measurement
        assert len(agent.script.commands("query-sev-launch-measure")) == 1

    async def test_another_callers_launch_is_not_found(self, agent: Rig) -> None:
        launch = await agent.up_to(S.PAUSED)
        with pytest.raises(NotFound):
            await agent.runner.measure(BOB, launch.launch_id)
        with pytest.raises(NotFound):
            await agent.runner.measure(ALICE, uuid4())

    @pytest.mark.parametrize("blob", ["", "AAAA", "not base64", base64.b64encode(bytes(47)).decode()])
    async def test_an_answer_that_is_no_measurement_is_refused_and_can_be_asked_for_again(
        self, agent: Rig, blob: str
    ) -> None:
        launch = await agent.up_to(S.PAUSED)
        agent.script.set(blob=blob)
        with pytest.raises(PlatformFailed, match="makes no sense: data"):
            await agent.runner.measure(ALICE, launch.launch_id)
        agent.script.set()
        assert (await agent.runner.measure(ALICE, launch.launch_id)).state is S.MEASURED

    async def test_a_machine_that_dies_under_the_question_ends_the_launch(self, agent: Rig) -> None:
        launch = await agent.up_to(S.PAUSED)
        agent.script.set(on={"query-sev-launch-measure": [{"do": "die"}]})
        with pytest.raises(WrongState) as failure:
            await agent.runner.measure(ALICE, launch.launch_id)
        assert failure.value.reason is Reason.GUEST_GONE
        assert agent.now(launch).state is S.FAILED

    async def test_a_monitor_that_closes_under_the_question_leaves_the_launch_as_it_was(
        self, agent: Rig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        machines_live_on(monkeypatch)
        launch = await agent.up_to(S.PAUSED)
        agent.script.set(on={"query-sev-launch-measure": [{"do": "close"}]})
        with pytest.raises(Unavailable):
            await agent.runner.measure(ALICE, launch.launch_id)
        assert agent.now(launch).state is S.PAUSED
        assert (await agent.runner.measure(ALICE, launch.launch_id)).state is S.MEASURED


class TestReports:
    async def test_a_report_is_fetched_over_the_callers_nonce(self, agent: Rig) -> None:
        launch = await agent.up_to(S.RESUMED)
        nonce = bytes(range(16))
        assert await agent.runner.report(ALICE, launch.launch_id, nonce) == bytes(208)
        assert agent.script.commands("query-sev-attestation-report") == [{"mnonce": base64.b64encode(nonce).decode()}]

    async def test_a_report_of_another_size_is_refused(self, agent: Rig) -> None:
        launch = await agent.up_to(S.PAUSED)
        agent.script.set(report=base64.b64encode(bytes(207)).decode())
        with pytest.raises(PlatformFailed, match="makes no sense"):
            await agent.runner.report(ALICE, launch.launch_id, bytes(16))
        assert agent.now(launch).state is S.PAUSED


class TestWatch:
    async def test_a_watcher_sees_every_launch_and_then_each_change_of_its_own(self, agent: Rig) -> None:
        mine = await agent.up_to(S.PAUSED)
        await agent.runner.start(BOB, agent.order(guest="db"))
        changes = agent.runner.watch(ALICE)
        assert await anext(changes) == mine
        measured = await agent.runner.measure(ALICE, mine.launch_id)
        assert await anext(changes) == measured
        await changes.aclose()

    async def test_a_slow_watcher_sees_the_newest_state_of_each(self, agent: Rig) -> None:
        changes = agent.runner.watch(ALICE)
        waiting = asyncio.ensure_future(anext(changes))
        launch = await agent.up_to(S.INJECTED)
        assert (await waiting).launch_id == launch.launch_id
        assert (await anext(changes)).state is S.INJECTED
        await changes.aclose()

    async def test_launches_are_listed_newest_first_to_their_caller_only(self, agent: Rig) -> None:
        first = await agent.up_to(S.PAUSED)
        agent.clock.advance(timedelta(seconds=1))
        second = await agent.up_to(S.PAUSED, guest="db")
        assert [launch.launch_id for launch in agent.runner.launches(ALICE)] == [second.launch_id, first.launch_id]
        assert agent.runner.launches(BOB) == []
