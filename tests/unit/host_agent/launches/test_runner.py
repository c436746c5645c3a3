"""The steps of a launch, over a fake device and a fake QEMU that misbehaves on request."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from uuid import uuid4

import pytest

from common.errors import (
    InvalidInput,
    LimitExceeded,
    NotFound,
    OutcomeUnknown,
    PlatformFailed,
    Reason,
    Refused,
    SevattestError,
    Unavailable,
    WrongState,
)
from host_agent.launches.launch import REQUESTS_MAX
from host_agent.launches.ledger import GIVEN_UP_MAX
from host_agent.launches.state import LaunchState as S
from tests.support.agent import (
    ALICE,
    BOB,
    HEADER,
    PAYLOAD,
    QUICK,
    Rig,
    alive,
    dh_certificate,
    machines_live_on,
    pid_of,
    rig,
    strays,
)
from tests.support.firmware import secret_entry, with_footer
from tests.support.rpc import SettableClock


@pytest.fixture
async def agent(tmp_path: Path) -> AsyncIterator[Rig]:
    async with rig(tmp_path) as made:
        yield made
    assert not list(strays(tmp_path))


@pytest.fixture
def hasty(agent: Rig, monkeypatch: pytest.MonkeyPatch) -> Rig:
    """An agent that can be hurried, over machines that do not die."""
    machines_live_on(monkeypatch)
    return agent


class TestStartLaunch:
    async def test_a_guest_is_started_paused_under_the_owners_session(self, agent: Rig) -> None:
        order = agent.order()
        launch = await agent.runner.start(ALICE, order)
        assert launch.state is S.PAUSED
        assert alive(pid_of(launch))
        [started] = agent.script.started
        words = started["argv"]
        assert "-S" in words
        sev_guest = words[words.index("-object") + 1].split(",")
        assert {"policy=0xf", "cbitpos=51", "reduced-phys-bits=1", "kernel-hashes=on"} <= set(sev_guest)
        assert base64.b64decode(started["files"]["godh.b64"]) == order.godh
        assert base64.b64decode(started["files"]["session.b64"]) == order.session
        assert started["modes"] == {"godh.b64": "0o100600", "session.b64": "0o100600", "": "0o40700"}

    async def test_the_machine_has_read_its_files_and_they_are_gone(self, agent: Rig) -> None:
        launch = await agent.up_to(S.PAUSED)
        assert {path.name for path in agent.folders.folder(launch.launch_id).iterdir()} == {
            "record.json",
            "machine.log",
            "qmp.sock",
        }

    async def test_the_same_request_again_has_the_same_answer_and_one_machine(self, agent: Rig) -> None:
        order = agent.order()
        first = await agent.runner.start(ALICE, order)
        assert await agent.runner.start(ALICE, order) == first
        assert len(agent.script.started) == 1

    async def test_the_same_request_twice_at_once_starts_one_machine(self, agent: Rig) -> None:
        order = agent.order()
        first, second = await asyncio.gather(agent.runner.start(ALICE, order), agent.runner.start(ALICE, order))
        assert first == second
        assert len(agent.script.started) == 1

    async def test_a_request_id_with_other_content_is_refused(self, agent: Rig) -> None:
        order = agent.order()
        await agent.runner.start(ALICE, order)
        for change in ({"guest": "db"}, {"policy": 5}, {"godh": bytes(2084)}, {"launch_id": uuid4()}):
            with pytest.raises(InvalidInput) as refusal:
                await agent.runner.start(ALICE, replace(order, **change))
            assert refusal.value.reason is Reason.REQUEST_ID_REUSED

    async def test_a_launch_is_started_by_one_request_only(self, agent: Rig) -> None:
        order = agent.order()
        await agent.runner.start(ALICE, order)
        with pytest.raises(WrongState) as refusal:
            await agent.runner.start(ALICE, replace(order, request_id=uuid4()))
        assert refusal.value.reason is Reason.WRONG_STATE

    async def test_another_callers_launch_id_is_not_found(self, agent: Rig) -> None:
        order = agent.order()
        await agent.runner.start(ALICE, order)
        with pytest.raises(NotFound):
            await agent.runner.start(BOB, replace(order, request_id=uuid4()))
        with pytest.raises(NotFound):
            await agent.runner.start(BOB, order)

    async def test_an_unknown_guest_is_not_found(self, agent: Rig) -> None:
        with pytest.raises(NotFound):
            await agent.runner.start(ALICE, agent.order(guest="nope"))
        assert not agent.script.started

    async def test_a_guest_has_one_machine_at_a_time(self, agent: Rig) -> None:
        await agent.up_to(S.PAUSED)
        with pytest.raises(WrongState) as refusal:
            await agent.runner.start(BOB, agent.order())
        assert refusal.value.reason is Reason.GUEST_BUSY
        assert (await agent.runner.start(BOB, agent.order(guest="db"))).state is S.PAUSED

    async def test_two_launches_of_one_guest_at_once_start_one_machine(self, agent: Rig) -> None:
        outcomes = await asyncio.gather(
            *(agent.runner.start(ALICE, agent.order()) for _ in range(4)), return_exceptions=True
        )
        refused = [outcome for outcome in outcomes if isinstance(outcome, WrongState)]
        assert [outcome.reason for outcome in refused] == [Reason.GUEST_BUSY] * 3
        assert len(agent.script.started) == 1

    async def test_a_guest_is_free_again_when_its_launch_has_ended(self, agent: Rig) -> None:
        launch = await agent.up_to(S.PAUSED)
        await agent.runner.abort(ALICE, launch.launch_id, uuid4())
        assert (await agent.up_to(S.PAUSED)).state is S.PAUSED

    async def test_a_platform_with_another_pdh_is_refused_before_anything_starts(self, agent: Rig) -> None:
        order = agent.order()
        agent.device.pdh = dh_certificate()
        with pytest.raises(WrongState) as refusal:
            await agent.runner.start(ALICE, order)
        assert refusal.value.reason is Reason.SESSION_STALE
        assert not agent.script.started
        assert agent.runner.launches(ALICE) == []

    async def test_a_device_without_an_answer_leaves_nothing_behind_and_the_request_can_be_repeated(
        self, agent: Rig
    ) -> None:
        order = agent.order()
        agent.device.errors.append(Unavailable(Reason.PLATFORM_UNAVAILABLE, "busy"))
        with pytest.raises(Unavailable):
            await agent.runner.start(ALICE, order)
        assert (await agent.runner.start(ALICE, order)).state is S.PAUSED

    async def test_a_firmware_without_a_secret_area_is_refused_before_anything_starts(self, agent: Rig) -> None:
        agent.firmware.write_bytes(with_footer(b"code", [secret_entry(0, 0)]))
        with pytest.raises(WrongState) as refusal:
            await agent.runner.start(ALICE, agent.order())
        assert refusal.value.reason is Reason.NO_SECRET_AREA
        assert not agent.script.started

    @pytest.mark.parametrize(
        ("fw_error", "name", "kind", "reason"),
        [
            (11, "Bad measurement", Refused, Reason.FIRMWARE_BAD_MEASUREMENT),
            (7, "Policy failure", Refused, Reason.FIRMWARE_POLICY_FAILURE),
            (10, "Bad signature", Refused, Reason.FIRMWARE_BAD_SIGNATURE),
            (23, "Resource limit", PlatformFailed, Reason.FIRMWARE_FAILED),
        ],
    )
    async def test_what_the_firmware_told_a_dying_machine_reaches_the_caller(
        self, agent: Rig, fw_error: int, name: str, kind: type[SevattestError], reason: Reason
    ) -> None:
        words = f"sev_launch_start: LAUNCH_START ret=1 fw_error={fw_error} '{name}'"
        agent.script.set(die={"stderr": f"{words}\n-accel kvm: failed to initialize kvm: Operation not permitted"})
        order = agent.order()
        with pytest.raises(kind) as failure:
            await agent.runner.start(ALICE, order)
        assert failure.value.reason is reason
        assert failure.value.fields["fw_error"] == str(fw_error)
        assert words in failure.value.message
        assert "exit code 1" in failure.value.message
        with pytest.raises(kind) as again:
            await agent.runner.start(ALICE, order)
        assert (again.value.reason, again.value.message) == (reason, failure.value.message)
        [launch] = agent.runner.launches(ALICE)
        assert launch.state is S.FAILED

    async def test_a_machine_that_dies_without_a_firmware_status_is_the_hypervisors_failure(self, agent: Rig) -> None:
        agent.script.set(die={"stderr": "-accel kvm: sev_kvm_init: cbitpos check failed, host '0' requested '47'"})
        with pytest.raises(PlatformFailed, match="cbitpos check failed") as failure:
            await agent.runner.start(ALICE, agent.order())
        assert failure.value.reason is Reason.HYPERVISOR_FAILED

    @pytest.mark.parametrize(
        ("script", "words"),
        [
            ({"sev": {"enabled": False, "state": "uninit", "policy": 0}}, "SEV is not enabled"),
            ({"sev": {"policy": 7}}, "policy 0x7"),
            ({"sev": {"state": "launch-update"}}, "launch-update"),
            ({"run": {"status": "internal-error"}}, "internal-error"),
            ({"run": {"status": "running", "running": True}}, "running"),
            ({"sev": {"state": "walking"}}, "makes no sense: state"),
            ({"sev": {"api-minor": 256}}, "makes no sense: api-minor"),
            ({"sev": {"sev-type": "sev-snp"}}, "makes no sense: sev-type"),
        ],
    )
    async def test_a_machine_that_is_not_what_was_asked_for_is_ended(
        self, agent: Rig, script: dict[str, object], words: str
    ) -> None:
        agent.script.set(**script)
        with pytest.raises(SevattestError, match=words):
            await agent.runner.start(ALICE, agent.order())
        [launch] = agent.runner.launches(ALICE)
        assert launch.state is S.FAILED
        assert launch.machine is None
        assert not list(strays(agent.folder))

    @pytest.mark.parametrize("script", [{"no_socket": True}, {"mute": "silence"}, {"mute": "close"}])
    async def test_a_machine_that_does_not_greet_in_time_is_ended(
        self, tmp_path: Path, script: dict[str, object]
    ) -> None:
        async with rig(tmp_path, settings=replace(QUICK, start_timeout=0.7)) as agent:
            agent.script.set(**script)
            with pytest.raises(PlatformFailed, match="did not greet") as failure:
                await agent.runner.start(ALICE, agent.order())
            assert failure.value.reason is Reason.HYPERVISOR_FAILED
            assert not list(strays(tmp_path))

    async def test_the_record_is_on_disk_before_the_program_begins(self, agent: Rig) -> None:
        await agent.up_to(S.PAUSED)
        points = [point for point in agent.passed if point.startswith("start")]
        assert points == [
            "start: begun",
            "start: written down",
            "start: machine held",
            "start: machine written down",
            "start: machine released",
            "start: machine checked",
            "start: paused",
            "start: done",
        ]

    async def test_the_machine_inherits_nothing_that_is_the_agents(
        self, agent: Rig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("NOTIFY_SOCKET", "/run/x")
        monkeypatch.setenv("SEVATTEST_LISTEN", "x")
        monkeypatch.setenv("LANG", "C.UTF-8")
        launch = await agent.up_to(S.PAUSED)
        environ = agent.script.started[0]["environ"]
        assert environ["SEV_HOST_AGENT_LAUNCH"] == str(launch.launch_id)
        assert environ["LANG"] == "C.UTF-8"
        assert not {"NOTIFY_SOCKET", "SEVATTEST_LISTEN"} & environ.keys()


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
