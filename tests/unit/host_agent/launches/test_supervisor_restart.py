"""An agent that restarts: each launch goes on where it stood, or ends."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import NoReturn
from uuid import UUID, uuid4

import pytest

from common.errors import InvalidInput, OutcomeUnknown, PlatformFailed, Reason, Unavailable, WrongState
from host_agent.hypervisors.base import MachineId
from host_agent.hypervisors.qemu import QemuMachine
from host_agent.launches.launch import Launch
from host_agent.launches.runner import StartRequest
from host_agent.launches.state import LaunchState as S
from tests.support.agent import (
    ALICE,
    HEADER,
    PAYLOAD,
    QUICK,
    FakeDevice,
    Rig,
    alive,
    machines_live_on,
    pid_of,
    reason,
    rig,
    strays,
)
from tests.support.eventually import until
from tests.support.plays import RUNNING
from tests.support.rpc import SettableClock


@contextmanager
def somebody_else() -> Iterator[subprocess.Popen[bytes]]:
    """A process that is nobody's machine, leader of its own session."""
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as process:
        try:
            yield process
        finally:
            process.kill()


async def died_while_starting(tmp_path: Path, device: FakeDevice) -> tuple[Launch, Launch, StartRequest]:
    """An agent dies while a machine does not greet: a guest that runs, that launch, and what was asked for it."""
    first = Rig(tmp_path, device=device)
    first.folders.open()
    running = await first.up_to(S.RESUMED, guest="db")
    first.script.set(mute="close")
    order = first.order()

    def dies(point: str, _launch_id: UUID, /) -> None:
        if point == "start: machine released":
            raise asyncio.CancelledError

    first.custody.observe = dies
    with pytest.raises(asyncio.CancelledError):
        await first.runner.start(ALICE, order)
    await first.leave()
    return running, first.runner.get(ALICE, order.launch_id), order


class TestRestart:
    @pytest.mark.parametrize("state", [S.PAUSED, S.MEASURED, S.INJECTED, S.RESUMED])
    async def test_a_launch_whose_machine_lives_goes_on_where_it_stood(self, tmp_path: Path, state: S) -> None:
        device, clock = FakeDevice(), SettableClock()
        first = Rig(tmp_path, device=device, clock=clock)
        first.folders.open()
        launch = await first.up_to(state)
        await first.leave()
        async with rig(tmp_path, device=device, clock=clock) as second:
            found = second.now(launch)
            assert found == launch
            assert alive(pid_of(found))
            if state is S.PAUSED:
                found = await second.runner.measure(ALICE, launch.launch_id)
            if found.state is S.MEASURED:
                await second.runner.inject(ALICE, launch.launch_id, uuid4(), HEADER, PAYLOAD)
            assert (await second.runner.resume(ALICE, launch.launch_id, uuid4())).state is S.RESUMED
            assert len(second.script.commands("sev-inject-launch-secret")) == 1
        assert not list(strays(tmp_path))

    @pytest.mark.parametrize(
        ("state", "then"),
        [(S.PAUSED, S.FAILED), (S.MEASURED, S.FAILED), (S.INJECTED, S.FAILED), (S.RESUMED, S.STOPPED)],
    )
    async def test_a_launch_whose_machine_died_meanwhile_ends(self, tmp_path: Path, state: S, then: S) -> None:
        first = Rig(tmp_path)
        first.folders.open()
        launch = await first.up_to(state)
        await first.leave()
        os.kill(pid_of(launch), signal.SIGKILL)
        async with rig(tmp_path) as second:
            assert (await second.until(launch, then)).state is then
            assert reason(second.now(launch)) is (Reason.GUEST_GONE if then is S.FAILED else None)

    @pytest.mark.parametrize("missing", ["os.pidfd_open", "pathlib.Path.read_bytes"])
    async def test_a_guest_that_cannot_be_looked_for_is_left_alone_and_stops_the_agent(
        self, tmp_path: Path, missing: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = Rig(tmp_path)
        first.folders.open()
        launch = await first.up_to(S.RESUMED)
        await first.leave()

        def refuse(*_: object) -> NoReturn:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

        with monkeypatch.context() as patch:
            patch.setattr(missing, refuse)
            with pytest.raises(Unavailable, match="Too many open files"):
                async with rig(tmp_path):
                    pass
        assert alive(pid_of(launch))
        async with rig(tmp_path) as second:
            assert second.now(launch).state is S.RESUMED

    async def test_another_process_with_the_machines_pid_is_not_touched(self, tmp_path: Path) -> None:
        first = Rig(tmp_path)
        first.folders.open()
        launch = await first.up_to(S.PAUSED)
        await first.leave()
        os.kill(pid_of(launch), signal.SIGKILL)
        record = tmp_path / "state" / "launches" / str(launch.launch_id) / "record.json"
        written = json.loads(record.read_text())
        with somebody_else() as other:
            written["machine"]["pid"] = other.pid
            record.write_text(json.dumps(written))
            async with rig(tmp_path) as second:
                assert second.now(launch).state is S.FAILED
                assert reason(second.now(launch)) is Reason.GUEST_GONE
            assert other.poll() is None

    async def test_a_machine_of_another_boot_is_not_looked_for(self, tmp_path: Path) -> None:
        async with rig(tmp_path) as agent:
            launch = await agent.up_to(S.PAUSED)
            identity = launch.machine
            assert identity is not None
            other = MachineId(pid=identity.pid, start_time=identity.start_time, boot_id=str(uuid4()))
            assert await agent.hypervisor.find(replace(launch.trace(tmp_path), identity=other)) is None

    async def test_a_restarted_agent_remembers_its_requests(self, tmp_path: Path) -> None:
        device = FakeDevice()
        first = Rig(tmp_path, device=device)
        first.folders.open()
        order = first.order()
        launch = await first.runner.start(ALICE, order)
        await first.leave()
        async with rig(tmp_path, device=device) as second:
            assert await second.runner.start(ALICE, order) == launch
            with pytest.raises(InvalidInput):
                await second.runner.start(ALICE, replace(order, policy=5))
            assert len(second.script.started) == 1

    async def test_an_injection_of_unknown_outcome_waits_for_the_same_packet(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        machines_live_on(monkeypatch)
        first = Rig(tmp_path)
        first.folders.open()
        launch = await first.up_to(S.MEASURED)
        first.script.set(on={"sev-inject-launch-secret": [{"do": "close", "effect": True}]})
        with pytest.raises(OutcomeUnknown):
            await first.runner.inject(ALICE, launch.launch_id, uuid4(), HEADER, PAYLOAD)
        await first.leave()
        async with rig(tmp_path) as second:
            assert second.now(launch).state is S.INJECTING
            with pytest.raises(WrongState) as refusal:
                await second.runner.inject(ALICE, launch.launch_id, uuid4(), HEADER, bytes(16))
            assert refusal.value.reason is Reason.PACKET_DIFFERS
            second.script.set()
            again = await second.runner.inject(ALICE, launch.launch_id, uuid4(), HEADER, PAYLOAD)
            assert again.state is S.INJECTED

    @pytest.mark.parametrize(("runs", "then"), [(True, S.RESUMED), (False, S.INJECTED)])
    async def test_a_resumption_of_unknown_outcome_is_settled_by_the_machine(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, runs: bool, then: S
    ) -> None:
        machines_live_on(monkeypatch)
        first = Rig(tmp_path)
        first.folders.open()
        launch = await first.up_to(S.INJECTED)
        first.hurry()
        silence = [{"do": "events", "count": 0}, {"do": "silence"}]
        first.script.set(on={"cont": [{"do": "close", "effect": runs}], "query-status": silence})
        with pytest.raises(OutcomeUnknown):
            await first.runner.resume(ALICE, launch.launch_id, uuid4())
        await first.leave()
        first.script.set()
        async with rig(tmp_path) as second:
            assert second.now(launch).state is then

    @pytest.mark.parametrize("state", [S.PAUSED, S.MEASURED])
    async def test_a_guest_that_is_found_running_without_its_secret_is_ended(self, tmp_path: Path, state: S) -> None:
        first = Rig(tmp_path)
        first.folders.open()
        launch = await first.up_to(state)
        await first.leave()
        first.script.set(**RUNNING)
        async with rig(tmp_path) as second:
            assert second.now(launch).state is S.FAILED
            assert reason(second.now(launch)) is Reason.GUEST_NOT_PAUSED
            assert not alive(pid_of(launch))

    async def test_a_machine_that_is_long_in_coming_keeps_only_its_own_callers_waiting(self, tmp_path: Path) -> None:
        device = FakeDevice()
        running, _, order = await died_while_starting(tmp_path, device)
        patient = replace(QUICK, start_timeout=100)
        async with asyncio.timeout(50), rig(tmp_path, device=device, settings=patient) as second:
            assert second.runner.get(ALICE, order.launch_id).state is S.STARTING
            assert (await second.runner.abort(ALICE, running.launch_id, uuid4())).state is S.STOPPED
            with pytest.raises(WrongState, match="the guest has a launch"):
                await second.runner.start(ALICE, second.order())
            again = asyncio.create_task(second.runner.start(ALICE, order))
            await second.supervisor.tick()
            assert not again.done()
            second.script.set()
            assert (await again).state is S.PAUSED
            assert len(second.script.started) == 2

    async def test_a_machine_that_never_comes_up_after_a_restart_fails_its_launch(self, tmp_path: Path) -> None:
        device = FakeDevice()
        _, starting, order = await died_while_starting(tmp_path, device)
        async with rig(tmp_path, device=device, settings=replace(QUICK, start_timeout=0.5)) as second:
            with pytest.raises(PlatformFailed, match="did not greet"):
                await second.runner.start(ALICE, order)
            assert second.runner.get(ALICE, order.launch_id).state is S.FAILED
            assert not alive(pid_of(starting))

    async def test_an_agent_that_ends_while_a_machine_comes_up_leaves_it_to_the_next(self, tmp_path: Path) -> None:
        device = FakeDevice()
        _, _, order = await died_while_starting(tmp_path, device)
        second = Rig(tmp_path, device=device)
        second.folders.open()
        await second.supervisor.recover()
        await second.leave()
        second.script.set()
        async with rig(tmp_path, device=device) as third:
            assert (await third.runner.start(ALICE, order)).state is S.PAUSED

    async def test_a_defect_met_while_a_machine_comes_up_is_told_and_the_next_look_goes_on(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        device = FakeDevice()
        _, _, order = await died_while_starting(tmp_path, device)

        async def defect(_machine: object) -> None:
            raise ZeroDivisionError

        with monkeypatch.context() as patch:
            patch.setattr(QemuMachine, "wait_ready", defect)
            async with rig(tmp_path, device=device) as second:
                await until(lambda: second.log.named("supervisor.defect"))
                patch.undo()
                second.script.set()
                await second.supervisor.tick()
                assert second.runner.get(ALICE, order.launch_id).state is S.PAUSED

    async def test_an_attested_guest_that_somebody_else_resumed_runs_on(self, tmp_path: Path) -> None:
        first = Rig(tmp_path)
        first.folders.open()
        launch = await first.up_to(S.INJECTED)
        await first.leave()
        first.script.set(**RUNNING)
        async with rig(tmp_path) as second:
            assert second.now(launch).state is S.RESUMED

    async def test_an_end_that_was_begun_is_finished(self, tmp_path: Path) -> None:
        first = Rig(tmp_path)
        first.folders.open()
        launch = await first.up_to(S.MEASURED)
        record = tmp_path / "state" / "launches" / str(launch.launch_id) / "record.json"
        written = json.loads(record.read_text())
        written["ending"] = {"event": "ABORTED", "failure": None}
        record.write_text(json.dumps(written))
        await first.leave()
        async with rig(tmp_path) as second:
            assert second.now(launch).state is S.ABORTED
            assert not alive(pid_of(launch))

    async def test_a_launch_that_expired_while_the_agent_was_down_is_ended(self, tmp_path: Path) -> None:
        clock = SettableClock()
        first = Rig(tmp_path, clock=clock)
        first.folders.open()
        launch = await first.up_to(S.MEASURED)
        await first.leave()
        clock.advance(timedelta(minutes=16))
        async with rig(tmp_path, clock=clock) as second:
            assert second.now(launch).state is S.ABORTED
            assert reason(second.now(launch)) is Reason.LAUNCH_EXPIRED
            assert not alive(pid_of(launch))

    async def test_a_launch_from_a_time_that_has_yet_to_come_is_ended(self, tmp_path: Path) -> None:
        clock = SettableClock()
        clock.advance(timedelta(days=5000))  # before the host has heard what time it is
        first = Rig(tmp_path, clock=clock)
        first.folders.open()
        launch = await first.up_to(S.MEASURED)
        await first.leave()
        clock.advance(timedelta(days=-5000))
        async with rig(tmp_path, clock=clock) as second:
            assert second.now(launch).state is S.ABORTED
            assert reason(second.now(launch)) is Reason.LAUNCH_EXPIRED
            assert not alive(pid_of(launch))

    async def test_a_record_that_cannot_be_read_stops_the_agent_and_is_named(self, tmp_path: Path) -> None:
        first = Rig(tmp_path)
        first.folders.open()
        launch = await first.up_to(S.PAUSED)
        await first.runner.abort(ALICE, launch.launch_id, uuid4())
        await first.leave()
        record = tmp_path / "state" / "launches" / str(launch.launch_id) / "record.json"
        whole = record.read_bytes()
        for broken in (b"", whole[:-20], b"{}", b"\xff", whole.replace(b'"version": 1', b'"version": 2'), b"[" * 10**5):
            record.write_bytes(broken)
            with pytest.raises(InvalidInput, match=str(record)):
                async with rig(tmp_path):
                    pass
        record.write_bytes(whole)
        other = record.parent.with_name(str(uuid4()))
        record.parent.rename(other)
        with pytest.raises(InvalidInput, match="another launch"):
            async with rig(tmp_path):
                pass

    async def test_the_family_of_a_machine_that_died_meanwhile_is_ended(self, tmp_path: Path) -> None:
        first = Rig(tmp_path)
        first.folders.open()
        first.script.set(child=True)
        launch = await first.up_to(S.PAUSED)
        [child] = [entry["child"] for entry in first.script.journal if "child" in entry]
        await first.leave()
        os.kill(pid_of(launch), signal.SIGKILL)
        assert alive(child)
        async with rig(tmp_path) as second:
            assert second.now(launch).state is S.FAILED
            assert not alive(child)
