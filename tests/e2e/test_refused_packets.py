"""Sessions, measurements and packets that are not of this launch, were altered, come twice, too late or too large."""

from __future__ import annotations

from uuid import UUID, uuid4

import pytest

from common.errors import Reason, WrongState
from common.ids import step_request_id
from orchestrator.drivers.base import Host
from orchestrator.flow import Step
from tests.e2e.conftest import refused
from tests.e2e.meddling import LookingAtHashes, PacketChanging, Resuming, SessionSwapping, flipped
from tests.e2e.scene import Scene
from tests.e2e.test_accepted import needs_ram
from tests.e2e.workloads import LARGE_SIZE, MISJUDGED, PLAIN, TOO_LARGE
from tests.support.stack import Crash

# The GUID of the kernel hashes' table as it stands in memory: edk2, OvmfPkg/AmdSev/BlobVerifierLibSevHashes.
_HASH_TABLE = UUID("9438d606-4f22-4cc9-b479-a793d411fd21").bytes_le


@refused("session of another launch")
async def test_a_session_of_another_launch_gives_a_measurement_that_is_refused(scene: Scene) -> None:
    earlier = await scene.begun("second", PLAIN, Step.BEGIN)
    outcome = await scene.launch("web", PLAIN, host=lambda honest: SessionSwapping(honest, earlier, certificate=True))
    scene.refused(outcome, Step.RELEASE, Reason.MEASUREMENT_REFUSED)


@refused("session of another launch under this certificate")
async def test_a_session_blob_does_not_open_under_another_launchs_certificate(scene: Scene) -> None:
    earlier = await scene.begun("second", PLAIN, Step.BEGIN)
    outcome = await scene.launch("web", PLAIN, host=lambda honest: SessionSwapping(honest, earlier, certificate=False))
    scene.refused(outcome, Step.START, Reason.FIRMWARE_BAD_MEASUREMENT)


@refused("packet altered in flight: {part}")
@pytest.mark.parametrize("part", ["flags", "iv", "mac", "payload"])
async def test_a_packet_with_one_bit_changed_is_refused_by_the_platform(scene: Scene, part: str) -> None:
    outcome = await scene.launch("web", PLAIN, host=lambda honest: PacketChanging(honest, lambda p: flipped(p, part)))
    scene.refused(outcome, Step.INJECT, Reason.FIRMWARE_BAD_MEASUREMENT)


@refused("packet of another launch")
async def test_a_packet_of_another_launch_is_refused_by_the_platform(scene: Scene) -> None:
    earlier = await scene.begun("second", PLAIN, Step.MEASURE)
    packet = await scene.released(earlier, step_request_id(earlier.launch_id, Step.RELEASE))
    outcome = await scene.launch("web", PLAIN, host=lambda honest: PacketChanging(honest, lambda _: packet))
    scene.refused(outcome, Step.INJECT, Reason.FIRMWARE_BAD_MEASUREMENT)


@refused("release asked twice, with another request id")
async def test_a_second_release_under_another_request_id_is_refused(scene: Scene) -> None:
    session = await scene.begun("web", PLAIN, Step.MEASURE)
    request_id = uuid4()
    packet = await scene.released(session, request_id)
    with pytest.raises(WrongState) as refusal:
        await scene.released(session, uuid4())
    assert refusal.value.reason is Reason.ALREADY_RELEASED
    scene.row.reason = refusal.value.reason.value
    # The same request again is the same answer, byte for byte.
    assert await scene.released(session, request_id) == packet
    await scene.end()
    scene.never_ran("web")


@refused("guest already running before {step}")
@pytest.mark.parametrize("step", [Step.MEASURE, Step.INJECT])
async def test_a_guest_that_somebody_resumed_gets_no_secret_and_is_ended(scene: Scene, step: Step) -> None:
    scene.allow("web", None)
    outcome = await scene.launch("web", PLAIN, host=lambda honest: Resuming(honest, scene, step))
    assert outcome.error is not None
    assert (outcome.steps[-1].step, outcome.error.reason) == (step, Reason.GUEST_NOT_PAUSED), outcome.error
    assert not scene.bench.stack.machine_runs("web")
    scene.row.reason = outcome.error.reason.value
    scene.saw("ended, had no secret")


@refused("secret larger than the area: the owner refuses")
async def test_the_owner_refuses_a_secret_that_its_firmware_has_no_room_for(scene: Scene) -> None:
    outcome = await scene.launch("web", TOO_LARGE)
    scene.refused(outcome, Step.BEGIN, Reason.SECRET_TOO_LARGE)
    complaints = scene.bench.check_owner()
    assert len(complaints) == 1
    assert f"{TOO_LARGE}.yaml" in complaints[0]
    assert "its firmware has room for 3072" in complaints[0]


@refused("secret larger than the area: the agent refuses")
async def test_the_agent_refuses_a_packet_before_it_overwrites_the_kernel_hashes(scene: Scene) -> None:
    needs_ram(scene)
    meddling: list[LookingAtHashes] = []

    def look(honest: Host) -> Host:
        meddling.append(LookingAtHashes(honest, scene))
        return meddling[0]

    crash = Crash()
    outcome = await scene.launch("web", MISJUDGED, host=look, crash=crash)
    scene.refused(outcome, Step.INJECT, Reason.SECRET_TOO_LARGE)
    before, after, overwritten = meddling[0].seen
    assert before.startswith(_HASH_TABLE)
    assert after == before
    # The packet was a good one: past its agent the host can do that damage, to nobody's good.
    assert not overwritten.startswith(_HASH_TABLE)
    assert [len(payload) > LARGE_SIZE for _, payload in crash.packets] == [True]
