"""The packet reaches the machine as it is, at most once, and only while the guest has not run."""

from __future__ import annotations

import base64
from uuid import uuid4

import pytest

from common.errors import InvalidInput, LimitExceeded, OutcomeUnknown, Reason, Refused, WrongState
from host_agent.launches.launch import REQUESTS_MAX
from host_agent.launches.state import LaunchState as S
from tests.support.agent import ALICE, HEADER, PAYLOAD, Rig, machines_live_on, strays


class TestInjectSecret:
    async def test_the_packet_reaches_the_machine_as_it_is_and_without_an_address(self, agent: Rig) -> None:
        launch = await agent.up_to(S.INJECTED)
        assert launch.state is S.INJECTED
        [arguments] = agent.script.commands("sev-inject-launch-secret")
        assert arguments.keys() == {"packet-header", "secret"}
        assert base64.b64decode(arguments["packet-header"]) == HEADER
        assert base64.b64decode(arguments["secret"]) == PAYLOAD

    async def test_the_record_holds_the_packets_hash_and_not_the_packet(self, agent: Rig) -> None:
        launch = await agent.up_to(S.INJECTED)
        record = (agent.folders.folder(launch.launch_id) / "record.json").read_bytes()
        assert launch.packet is not None
        assert base64.b64encode(PAYLOAD)[:32] not in record
        assert base64.b64encode(launch.packet) in record

    async def test_the_same_packet_again_is_answered_and_not_injected(self, agent: Rig) -> None:
        launch = await agent.up_to(S.INJECTED)
        again = await agent.runner.inject(ALICE, launch.launch_id, uuid4(), HEADER, PAYLOAD)
        assert again.state is S.INJECTED
        await agent.runner.resume(ALICE, launch.launch_id, uuid4())
        assert (await agent.runner.inject(ALICE, launch.launch_id, uuid4(), HEADER, PAYLOAD)).state is S.RESUMED
        assert len(agent.script.commands("sev-inject-launch-secret")) == 1

    async def test_another_packet_is_refused(self, agent: Rig) -> None:
        launch = await agent.up_to(S.INJECTED)
        for header, payload in ((HEADER, PAYLOAD[::-1]), (HEADER[::-1], PAYLOAD), (HEADER, PAYLOAD + bytes(16))):
            with pytest.raises(WrongState) as refusal:
                await agent.runner.inject(ALICE, launch.launch_id, uuid4(), header, payload)
            assert refusal.value.reason is Reason.PACKET_DIFFERS
        assert agent.now(launch).state is S.INJECTED
        assert len(agent.script.commands("sev-inject-launch-secret")) == 1

    async def test_a_request_id_with_another_packet_is_refused(self, agent: Rig) -> None:
        launch = await agent.up_to(S.MEASURED)
        request_id = uuid4()
        await agent.runner.inject(ALICE, launch.launch_id, request_id, HEADER, PAYLOAD)
        with pytest.raises(InvalidInput) as refusal:
            await agent.runner.inject(ALICE, launch.launch_id, request_id, HEADER, bytes(16))
        assert refusal.value.reason is Reason.REQUEST_ID_REUSED

    async def test_a_packet_before_the_measurement_is_not_due(self, agent: Rig) -> None:
        launch = await agent.up_to(S.PAUSED)
        with pytest.raises(WrongState) as refusal:
            await agent.runner.inject(ALICE, launch.launch_id, uuid4(), HEADER, PAYLOAD)
        assert refusal.value.reason is Reason.WRONG_STATE

    async def test_a_packet_that_fills_the_firmwares_area_is_injected(self, agent: Rig) -> None:
        launch = await agent.up_to(S.MEASURED)
        assert launch.secret_area.size == 0xC00
        assert (await agent.runner.inject(ALICE, launch.launch_id, uuid4(), HEADER, bytes(0xC00))).state is S.INJECTED

    async def test_a_packet_larger_than_the_firmwares_area_is_refused_before_the_machine_hears_of_it(
        self, agent: Rig
    ) -> None:
        launch = await agent.up_to(S.MEASURED)
        asked = len(agent.script.journal)
        with pytest.raises(WrongState) as refusal:
            await agent.runner.inject(ALICE, launch.launch_id, uuid4(), HEADER, bytes(0xC10))
        assert refusal.value.reason is Reason.SECRET_TOO_LARGE
        assert len(agent.script.journal) == asked
        assert agent.now(launch).state is S.MEASURED

    async def test_a_packet_that_the_firmware_refuses_ends_the_launch(self, agent: Rig) -> None:
        launch = await agent.up_to(S.MEASURED)
        refusal = "SEV: failed to inject secret ret=-5 fw_error=11 'Bad measurement'"
        agent.script.set(on={"sev-inject-launch-secret": [{"do": "error", "desc": refusal}]})
        for _ in range(2):
            with pytest.raises(Refused) as failure:
                await agent.runner.inject(ALICE, launch.launch_id, uuid4(), HEADER, PAYLOAD)
            assert failure.value.reason is Reason.FIRMWARE_BAD_MEASUREMENT
        assert agent.now(launch).state is S.FAILED
        assert not list(strays(agent.folder))

    @pytest.mark.parametrize("effect", [True, False])
    async def test_after_an_unknown_outcome_the_same_packet_may_be_sent_again(
        self, agent: Rig, monkeypatch: pytest.MonkeyPatch, *, effect: bool
    ) -> None:
        machines_live_on(monkeypatch)
        launch = await agent.up_to(S.MEASURED)
        agent.script.set(on={"sev-inject-launch-secret": [{"do": "close", "effect": effect}]})
        request_id = uuid4()
        with pytest.raises(OutcomeUnknown):
            await agent.runner.inject(ALICE, launch.launch_id, request_id, HEADER, PAYLOAD)
        assert agent.now(launch).state is S.INJECTING
        with pytest.raises(WrongState) as refusal:
            await agent.runner.inject(ALICE, launch.launch_id, uuid4(), HEADER, bytes(16))
        assert refusal.value.reason is Reason.PACKET_DIFFERS
        again = await agent.runner.inject(ALICE, launch.launch_id, request_id, HEADER, PAYLOAD)
        assert again.state is S.INJECTED
        first, second = agent.script.commands("sev-inject-launch-secret")
        assert first == second

    async def test_after_an_unknown_outcome_the_machine_is_looked_at_before_anything_else(
        self, agent: Rig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        machines_live_on(monkeypatch)
        launch = await agent.up_to(S.MEASURED)
        agent.script.set(on={"sev-inject-launch-secret": [{"do": "close"}]})
        with pytest.raises(OutcomeUnknown):
            await agent.runner.inject(ALICE, launch.launch_id, uuid4(), HEADER, PAYLOAD)
        seen = len(agent.script.journal)
        await agent.runner.inject(ALICE, launch.launch_id, uuid4(), HEADER, PAYLOAD)
        said = [entry["execute"] for entry in agent.script.journal[seen:]]
        assert said.index("query-sev") < said.index("sev-inject-launch-secret")

    async def test_a_silent_machine_leaves_the_outcome_unknown(self, hasty: Rig) -> None:
        launch = await hasty.up_to(S.MEASURED)
        hasty.hurry()
        hasty.script.set(on={"sev-inject-launch-secret": [{"do": "silence"}]})
        with pytest.raises(OutcomeUnknown):
            await hasty.runner.inject(ALICE, launch.launch_id, uuid4(), HEADER, PAYLOAD)
        assert hasty.now(launch).state is S.INJECTING

    async def test_a_machine_that_dies_with_the_packet_ends_the_launch(self, agent: Rig) -> None:
        launch = await agent.up_to(S.MEASURED)
        agent.script.set(on={"sev-inject-launch-secret": [{"do": "die"}]})
        with pytest.raises(WrongState) as failure:
            await agent.runner.inject(ALICE, launch.launch_id, uuid4(), HEADER, PAYLOAD)
        assert failure.value.reason is Reason.GUEST_GONE
        assert agent.now(launch).state is S.FAILED

    async def test_a_guest_that_runs_already_is_ended_and_gets_no_packet(self, agent: Rig) -> None:
        launch = await agent.up_to(S.MEASURED)
        agent.script.set(run={"status": "running", "running": True}, sev={"state": "running"})
        with pytest.raises(WrongState) as failure:
            await agent.runner.inject(ALICE, launch.launch_id, uuid4(), HEADER, PAYLOAD)
        assert failure.value.reason is Reason.GUEST_NOT_PAUSED
        assert agent.now(launch).state is S.FAILED
        assert not agent.script.commands("sev-inject-launch-secret")
        assert not list(strays(agent.folder))

    async def test_a_guest_whose_vcpus_were_stopped_again_after_running_is_ended_too(self, agent: Rig) -> None:
        launch = await agent.up_to(S.MEASURED)
        agent.script.set(run={"status": "paused"}, sev={"state": "running"})
        with pytest.raises(WrongState) as failure:
            await agent.runner.inject(ALICE, launch.launch_id, uuid4(), HEADER, PAYLOAD)
        assert failure.value.reason is Reason.GUEST_NOT_PAUSED

    async def test_a_launch_remembers_so_many_requests_and_no_more(self, agent: Rig) -> None:
        launch = await agent.up_to(S.INJECTED)
        for _ in range(REQUESTS_MAX - 2):
            await agent.runner.inject(ALICE, launch.launch_id, uuid4(), HEADER, PAYLOAD)
        with pytest.raises(LimitExceeded):
            await agent.runner.inject(ALICE, launch.launch_id, uuid4(), HEADER, PAYLOAD)
