"""The agent as a process on the software platform: launches, restarts, and a kill at every point of every step."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
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
    WrongState,
)
from common.sev.certs.sev import SevCertificate
from common.sev.report import AttestationReport
from common.sev.secret import SecretPacket
from host_agent.launches.state import FINAL
from sevattest.v1 import host_agent_service_pb2 as pb
from tests.support.agent_site import ES, PLAIN, REPOSITORY, SECRET_ID, Caller, Owner, Site
from tests.support.eventually import until
from tests.support.kill_table import KILLED, POINTS

pytestmark = pytest.mark.slow

END_POINTS = ["end: written down", "end: machine gone", "end: done"]
FINAL_STATES = {pb.GuestLaunchState.Value(f"GUEST_LAUNCH_STATE_{state}") for state in FINAL}


def said(owner: Owner) -> str:
    return f"secret {SECRET_ID} {len(owner.secret)} {owner.secret.hex()}"


async def until_read(site: Site, owner: Owner) -> None:
    """Wait until the guest has written what it read, and see that it is the owner's secret and nothing else."""
    await until(lambda: site.read_by_guest)
    assert site.read_by_guest == [said(owner)]


async def until_final(caller: Caller, owner: Owner) -> pb.GuestLaunch:
    """Wait until the launch has ended."""
    stream = caller.stub.WatchLaunches(pb.WatchLaunchesRequest(), timeout=30)
    while True:
        launch: pb.GuestLaunch = (await stream.read()).launch
        if launch.launch_id == str(owner.launch_id) and launch.state in FINAL_STATES:
            stream.cancel()
            return launch


async def until_no_machine(site: Site) -> None:
    await until(lambda: not site.machines())


@pytest.mark.parametrize("policy", [ES, PLAIN], ids=["sev-es", "sev"])
async def test_a_guest_reads_the_owners_secret(site: Site, policy: object) -> None:
    async with site.caller(site.start()) as caller:
        owner = Owner(pdh=await caller.pdh(), policy=policy)  # type: ignore[arg-type]  # a parameter
        launch = await caller.whole(owner, site.shape(owner.policy))
        assert launch.state == pb.GUEST_LAUNCH_STATE_RESUMED
        await until_read(site, owner)
        assert (await caller.abort(owner)).state == pb.GUEST_LAUNCH_STATE_STOPPED
        await until_no_machine(site)


async def test_the_platforms_state_is_told(site: Site) -> None:
    async with site.caller(site.start()) as caller:
        platform = await caller("GetPlatform", pb.GetPlatformRequest())
        assert (platform.firmware.api_major, platform.firmware.api_minor, platform.firmware.build) == (1, 55, 24)
        assert platform.state in {pb.GetPlatformResponse.STATE_INIT, pb.GetPlatformResponse.STATE_WORKING}
        assert platform.es_enabled
        assert platform.pdh_fingerprint == (await caller.pdh()).fingerprint
        exported = await caller("ExportChain", pb.ExportChainRequest())
        assert len(exported.platform.chip_id) == 64
        assert (site.platform.kds / f"{exported.platform.chip_id.hex().upper()}.cert").exists()


async def test_a_report_is_signed_by_the_platform_over_the_callers_nonce(site: Site) -> None:
    async with site.caller(site.start()) as caller:
        exported = await caller("ExportChain", pb.ExportChainRequest())
        owner = Owner(pdh=SevCertificate.parse(exported.platform.chain[:2084]))
        await caller.start(owner)
        nonce = os.urandom(16)
        answer = await caller(
            "GetAttestationReport", pb.GetAttestationReportRequest(launch_id=str(owner.launch_id), nonce=nonce)
        )
        report = AttestationReport.parse(answer.report)
        report.verify(SevCertificate.parse(exported.platform.chain[2084:4168]))
        assert report.nonce == nonce
        await caller.abort(owner)


async def test_a_session_under_another_policy_is_the_firmwares_refusal(site: Site) -> None:
    async with site.caller(site.start()) as caller:
        owner = Owner(pdh=await caller.pdh())
        with pytest.raises(Refused) as refusal:
            await caller.start(owner, policy=0x3701000E)
        assert refusal.value.reason is Reason.FIRMWARE_BAD_MEASUREMENT
        assert refusal.value.fields["fw_error"] == "11"
        assert (await caller.get(owner)).state == pb.GUEST_LAUNCH_STATE_FAILED
        await until_no_machine(site)


async def test_a_session_for_another_pdh_is_refused_before_anything_starts(site: Site) -> None:
    async with site.caller(site.start()) as caller:
        pdh = await caller.pdh()
        owner = Owner(pdh=pdh)
        with pytest.raises(WrongState) as refusal:
            await caller.start(owner, pdh_fingerprint=bytes(32))
        assert refusal.value.reason is Reason.SESSION_STALE
        with pytest.raises(NotFound):
            await caller.get(owner)


async def test_a_packet_with_one_bit_changed_is_the_firmwares_refusal_and_the_guest_is_ended(site: Site) -> None:
    async with site.caller(site.start()) as caller:
        owner = Owner(pdh=await caller.pdh())
        await caller.start(owner)
        packet = owner.release(await caller.measure(owner), site.shape())
        changed = replace(packet, payload=bytes([packet.payload[0] ^ 1]) + packet.payload[1:])
        with pytest.raises(Refused) as refusal:
            await caller.inject(owner, changed)
        assert refusal.value.reason is Reason.FIRMWARE_BAD_MEASUREMENT
        with pytest.raises(SevattestError):
            await caller.resume(owner)
        await until_no_machine(site)
        assert site.read_by_guest == []


async def test_a_packet_of_another_launch_is_the_firmwares_refusal(site: Site) -> None:
    async with site.caller(site.start()) as caller:
        first = Owner(pdh=await caller.pdh())
        await caller.start(first)
        packet = first.release(await caller.measure(first), site.shape())
        await caller.abort(first)
        second = Owner(pdh=await caller.pdh())
        await caller.start(second)
        await caller.measure(second)
        with pytest.raises(Refused):
            await caller.inject(second, packet)
        await until_no_machine(site)
        assert site.read_by_guest == []


async def test_a_secret_larger_than_the_firmwares_area_never_reaches_the_machine(site: Site) -> None:
    async with site.caller(site.start()) as caller:
        owner = Owner(pdh=await caller.pdh())
        await caller.start(owner)
        await caller.measure(owner)
        with pytest.raises(WrongState) as refusal:
            await caller.inject(owner, SecretPacket(header=bytes(52), payload=bytes(0xC10)))
        assert refusal.value.reason is Reason.SECRET_TOO_LARGE
        assert (await caller.get(owner)).state == pb.GUEST_LAUNCH_STATE_MEASURED
        await caller.abort(owner)


async def test_a_program_that_cannot_start_says_why(site: Site) -> None:
    site.program = [*site.platform.machine()[:-1], str(site.root / "nowhere")]
    async with site.caller(site.start()) as caller:
        owner = Owner(pdh=await caller.pdh())
        with pytest.raises(PlatformFailed, match="died before its monitor greeted") as failure:
            await caller.start(owner)
        assert failure.value.reason is Reason.HYPERVISOR_FAILED


async def test_a_stopped_agent_leaves_its_paused_guest_alone_and_finds_it_again(site: Site) -> None:
    first = site.start()
    async with site.caller(first) as caller:
        owner = Owner(pdh=await caller.pdh())
        await caller.start(owner)
        [machine] = site.machines()
        process = first._process
        first.stop()
        assert process is not None
        assert process.returncode == 0
    assert site.machines() == [machine]
    async with site.caller(site.start()) as caller:
        assert (await caller.get(owner)).state == pb.GUEST_LAUNCH_STATE_PAUSED
        assert (await caller.whole(owner, site.shape())).state == pb.GUEST_LAUNCH_STATE_RESUMED
        assert site.machines() == [machine]
        await until_read(site, owner)
        with pytest.raises(NotFound):
            async with site.caller(site.services[-1], "bob") as bob:
                await bob.get(owner)


async def test_a_guest_that_runs_outlives_the_agent_and_its_end_is_noticed(site: Site) -> None:
    first = site.start()
    async with site.caller(first) as caller:
        owner = Owner(pdh=await caller.pdh())
        await caller.whole(owner, site.shape())
    first.kill()
    async with site.caller(site.start()) as caller:
        stream = caller.stub.WatchLaunches(pb.WatchLaunchesRequest(), timeout=60)
        assert (await stream.read()).launch.state == pb.GUEST_LAUNCH_STATE_RESUMED
        [machine] = site.machines()
        os.kill(machine, signal.SIGKILL)
        assert (await stream.read()).launch.state == pb.GUEST_LAUNCH_STATE_STOPPED
        stream.cancel()


async def test_a_guest_that_is_not_resumed_in_time_is_ended(site: Site) -> None:
    site.settings["lifetime"] = 1
    async with site.caller(site.start()) as caller:
        owner = Owner(pdh=await caller.pdh())
        await caller.start(owner)
        await until_no_machine(site)
        launch = await until_final(caller, owner)
        assert launch.state == pb.GUEST_LAUNCH_STATE_ABORTED
        with pytest.raises(WrongState) as refusal:
            await caller.measure(owner)
        assert refusal.value.reason is Reason.LAUNCH_EXPIRED
    assert site.read_by_guest == []


async def test_a_changed_configuration_brings_guests_without_a_restart(site: Site) -> None:
    agent = site.start()
    async with site.caller(agent) as caller:
        owner = Owner(pdh=await caller.pdh())
        with pytest.raises(NotFound, match="no such guest"):
            await caller.start(owner, guest="db")
        log = site.root / "sev-host-agent.log"
        site.config.write_text(site.config.read_text() + "surprise = 1\n")
        os.kill(agent.pid, signal.SIGHUP)
        await until(lambda: "config.reload_failed" in log.read_text())
        site.config.write_text(
            site.config.read_text().replace("surprise = 1\n", "").replace("[guests.web]", "[guests.db]")
        )
        os.kill(agent.pid, signal.SIGHUP)
        await until(lambda: "config.reloaded" in log.read_text())
        assert (await caller.start(owner, guest="db")).state == pb.GUEST_LAUNCH_STATE_PAUSED
        await caller.abort(owner)


async def test_a_stopping_agent_does_not_wait_for_those_who_watch(site: Site) -> None:
    agent = site.start()
    async with site.caller(agent) as caller:
        owner = Owner(pdh=await caller.pdh())
        await caller.start(owner)
        stream = caller.stub.WatchLaunches(pb.WatchLaunchesRequest(), timeout=60)
        await stream.read()
        process = agent._process
        assert process is not None
        os.kill(agent.pid, signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, 10) == 0
        stream.cancel()


async def test_the_agent_is_healthy_and_its_probe_says_so(site: Site) -> None:
    probe = [sys.executable, "-m", "host_agent.cli", "health", "--config", str(site.config)]
    agent = site.start()
    agent.wait_ready()
    assert (await _run(probe)).returncode == 0
    agent.stop()
    assert (await _run(probe)).returncode == 3


async def test_a_second_agent_on_the_same_folder_is_refused(site: Site) -> None:
    site.start().wait_ready()
    second = await _run([sys.executable, "-m", "host_agent.cli", "serve", "--config", str(site.config)])
    assert second.returncode == 2
    assert "another sev-host-agent uses" in second.stderr
    assert second.stdout == ""


async def test_the_agents_memory_and_log_hold_no_secret(site: Site) -> None:
    agent = site.start()
    async with site.caller(agent) as caller:
        owner = Owner(pdh=await caller.pdh())
        await caller.whole(owner, site.shape())
        await until_read(site, owner)
        canaries = [owner.secret, owner.keys.tek, owner.keys.tik]
        for kept in (
            *_memory(agent.pid),
            (site.root / "sev-host-agent.log").read_bytes(),
            *_files(site.root / "state"),
        ):
            assert not any(canary in kept or canary.hex().encode() in kept for canary in canaries)


async def _given_up(site: Site, caller: Caller, owner: Owner, *, inject: bool) -> None:
    """A launch that is never resumed."""
    await caller.start(owner)
    packet = owner.release(await caller.measure(owner), site.shape())
    if inject:
        await caller.inject(owner, packet)
    await caller.abort(owner)


@pytest.mark.parametrize("run", [1, 2, 3])
@pytest.mark.parametrize("point", POINTS)
async def test_after_a_kill_at_any_point_the_guest_runs_attested_or_does_not_run(
    site: Site, point: str, run: int, record_property: Callable[[str, object], None]
) -> None:
    doomed = site.start(point)
    async with site.caller(doomed) as caller:
        owner = Owner(pdh=await caller.pdh())
        with pytest.raises(SevattestError):
            await caller.whole(owner, site.shape())
    process = doomed._process
    assert process is not None
    assert process.wait(30) == -signal.SIGKILL
    before = site.read_by_guest
    assert before in ([], [said(owner)]), "a guest ran without its secret"
    if before:
        assert point in {"resume: answered", "resume: done"}

    async with site.caller(site.start()) as caller:
        launch = await caller.whole_again(owner, site.shape())
        if launch.state == pb.GUEST_LAUNCH_STATE_RESUMED:
            assert len(site.machines()) == 1
            await until_read(site, owner)
            await caller.abort(owner)
            outcome = "was running, attested" if before else "resumed, attested"
        else:
            assert launch.state == pb.GUEST_LAUNCH_STATE_FAILED, launch
            assert point in {"start: machine held", "start: written down", "start: machine written down"}
            # Its machine never began; another launch of the guest may.
            again = Owner(pdh=await caller.pdh())
            await caller.whole(again, site.shape())
            await until_read(site, again)
            await caller.abort(again)
            outcome = "stopped, never ran"
        await until_no_machine(site)
    record_property(KILLED, (POINTS.index(point), point, run, outcome))


@pytest.mark.parametrize("point", [*POINTS[3:13:2], "start: paused", "inject: done", *END_POINTS])
async def test_after_a_kill_and_with_nobody_to_go_on_no_machine_is_left(site: Site, point: str) -> None:
    doomed = site.start(point)
    async with site.caller(doomed) as caller:
        owner = Owner(pdh=await caller.pdh())
        with pytest.raises(SevattestError):
            await _given_up(site, caller, owner, inject=point not in END_POINTS)
    process = doomed._process
    assert process is not None
    assert process.wait(30) == -signal.SIGKILL
    site.settings["lifetime"] = 1
    async with site.caller(site.start()) as caller:
        await until_no_machine(site)
        launch = await until_final(caller, owner)
        assert launch.state in {pb.GUEST_LAUNCH_STATE_ABORTED, pb.GUEST_LAUNCH_STATE_FAILED}
    assert site.read_by_guest == []
    assert not list((site.root / "state" / "launches" / str(owner.launch_id)).glob("*.b64"))


def test_every_point_of_every_step_is_killed_at() -> None:
    named: set[str] = set()
    for source in (REPOSITORY / "host_agent" / "launches").glob("*.py"):
        named |= set(re.findall(r'observe\("([^"]+)"', source.read_text()))
    assert named == {*POINTS, *END_POINTS}


async def test_requests_of_a_killed_agent_cannot_be_used_for_something_else(site: Site) -> None:
    doomed = site.start("measure: read")
    async with site.caller(doomed) as caller:
        owner = Owner(pdh=await caller.pdh())
        await caller.start(owner)
        with pytest.raises(SevattestError):
            await caller.measure(owner)
    async with site.caller(site.start()) as caller:
        with pytest.raises(InvalidInput) as refusal:
            await caller.start(owner, launch_id=str(uuid4()))
        assert refusal.value.reason is Reason.REQUEST_ID_REUSED
        await caller.abort(owner)


async def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return await asyncio.to_thread(
        subprocess.run, command, capture_output=True, text=True, check=False, timeout=60, env=environ
    )


def _files(folder: Path) -> Iterator[bytes]:
    for path in folder.rglob("*"):
        if path.is_file():
            yield path.read_bytes()


def _memory(pid: int) -> Iterator[bytes]:
    """The readable and writable memory of a process, where we may look at it."""
    with contextlib.suppress(PermissionError), open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:  # noqa: PTH123 -- unbuffered
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            places, rights = line.split()[:2]
            if rights.startswith("rw") and "[v" not in line:
                start, end = (int(place, 16) for place in places.split("-"))
                with contextlib.suppress(OSError):
                    memory.seek(start)
                    yield memory.read(end - start)
