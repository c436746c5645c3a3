"""Hosts that start another guest than the owner expects: refused, explained to the owner, and the guest never ran."""

from __future__ import annotations

import pytest

from common.errors import Reason
from orchestrator.flow import Step
from tests.e2e.conftest import refused
from tests.e2e.guests import SWAPPED
from tests.e2e.scene import Scene
from tests.e2e.workloads import MILAN, PLAIN, ROME, SEVERAL, es

_NOUNS = {"cmdline": "command line"}


@refused("{what} swapped")
@pytest.mark.parametrize("what", ["firmware", *SWAPPED])
async def test_a_swapped_artefact_is_refused_and_named(scene: Scene, what: str) -> None:
    outcome = await scene.launch(f"swapped-{what}", PLAIN)
    scene.refused(outcome, Step.RELEASE, Reason.MEASUREMENT_REFUSED)
    noun = _NOUNS.get(what, what)
    sentence = scene.explained(outcome)
    assert sentence.startswith(f"the guest was measured with {noun} '{SEVERAL} 1' instead of "), sentence


@refused("kernel-hashes off")
async def test_a_guest_whose_kernel_is_not_measured_is_refused(scene: Scene) -> None:
    outcome = await scene.launch("without-hashes", PLAIN)
    scene.refused(outcome, Step.RELEASE, Reason.MEASUREMENT_REFUSED)
    assert scene.explained(outcome) == "the guest was measured with kernel hashes off instead of on"


@refused("SEV-ES, one vCPU more")
async def test_an_es_guest_with_one_vcpu_more_is_refused(scene: Scene) -> None:
    outcome = await scene.launch("es-2-EPYC-Rome", es(1, ROME))
    scene.refused(outcome, Step.RELEASE, Reason.MEASUREMENT_REFUSED)
    assert scene.explained(outcome) == "the guest was measured with vCPU count 2 instead of 1"


@refused("SEV-ES, another CPU model")
async def test_an_es_guest_with_another_cpu_model_is_refused(scene: Scene) -> None:
    outcome = await scene.launch(es(1, MILAN), es(1, ROME))
    scene.refused(outcome, Step.RELEASE, Reason.MEASUREMENT_REFUSED)
    sentence = "the guest was measured with CPU type EPYC-Milan (25-1-1) instead of EPYC-Rome (23-49-0)"
    assert scene.explained(outcome) == sentence


@refused("debug policy with the owner's session")
async def test_a_policy_that_allows_debugging_does_not_fit_the_session(scene: Scene) -> None:
    outcome = await scene.launch("debug", PLAIN)
    scene.refused(outcome, Step.START, Reason.FIRMWARE_BAD_MEASUREMENT)


@refused("debug policy without a session, the machine lies about it")
async def test_a_lowered_policy_is_found_by_the_owner_when_the_agent_was_lied_to(scene: Scene) -> None:
    outcome = await scene.launch("debug-denied", PLAIN)
    scene.refused(outcome, Step.RELEASE, Reason.MEASUREMENT_REFUSED)
    sentence = scene.explained(outcome)
    assert "without the session" in sentence
    assert "guest policy 0x1100000a" in sentence


@refused("the distribution's own OVMF")
async def test_firmware_without_areas_is_refused_before_a_machine_is_started(scene: Scene) -> None:
    needs_foreign(scene)
    outcome = await scene.launch("foreign-firmware", PLAIN)
    scene.refused(outcome, Step.START, Reason.NO_SECRET_AREA)
    assert not scene.bench.site.pid_file("foreign-firmware").exists()


@refused("the distribution's own OVMF behind the agent's back")
async def test_firmware_without_areas_ends_the_machine_with_qemus_words(scene: Scene) -> None:
    needs_foreign(scene)
    outcome = await scene.launch("foreign-firmware-behind", PLAIN)
    scene.refused(outcome, Step.START, Reason.HYPERVISOR_FAILED)
    assert outcome.error is not None
    assert "guest firmware hashes table area is invalid (base=0x0 size=0x0)" in str(outcome.error)


@refused("{what} swapped behind the measurement")
@pytest.mark.parametrize("what", SWAPPED)
async def test_firmware_is_the_last_line_where_the_measurement_was_right(scene: Scene, what: str) -> None:
    guest = f"behind-{what}"
    if guest not in scene.bench.guests:
        pytest.skip("the stand-in machine measures what it runs: nothing can be swapped in between")
    await scene.firmware_refuses(await scene.launch(guest, PLAIN))


def needs_foreign(scene: Scene) -> None:
    """Skip where the distribution's own OVMF is not there."""
    if "foreign-firmware" not in scene.bench.guests:
        pytest.skip("the distribution's own OVMF is not there; install Debian's ovmf")
