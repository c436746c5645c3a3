"""A guest is started paused under the owner's session, once, and nothing is left of one that is not."""

from __future__ import annotations

import asyncio
import base64
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import pytest

from common.errors import (
    InvalidInput,
    NotFound,
    PlatformFailed,
    Reason,
    Refused,
    SevattestError,
    Unavailable,
    WrongState,
)
from host_agent.launches.state import LaunchState as S
from tests.support.agent import ALICE, BOB, QUICK, Rig, alive, dh_certificate, pid_of, rig, strays
from tests.support.firmware import secret_entry, with_footer


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

    async def test_two_launches_with_one_request_id_at_once_are_not_both_taken(self, agent: Rig) -> None:
        request_id = uuid4()
        orders = [agent.order(guest=guest, request_id=request_id) for guest in ("web", "db")]
        ends = await asyncio.gather(*(agent.runner.start(ALICE, order) for order in orders), return_exceptions=True)
        [error] = [end for end in ends if isinstance(end, InvalidInput)]
        assert error.reason is Reason.REQUEST_ID_REUSED
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
