"""Honest hosts: every guest that may run runs, and reads exactly the secrets that its owner has on file."""

from __future__ import annotations

import asyncio

import pytest

from emulator.guest import read_secrets as secrets_in
from orchestrator.flow import Step
from tests.e2e.conftest import accepted
from tests.e2e.inventory import DISK_CONTENT
from tests.e2e.scene import Scene
from tests.e2e.workloads import CPUS, DISK, FIRMWARE_ONLY, MILAN, PLAIN, ROME, SEVERAL, VCPUS, WRONG_DISK, es
from tests.support.stack import Crash


@accepted("SEV, direct kernel boot")
async def test_a_plain_guest_boots_and_reads_its_secret(scene: Scene) -> None:
    await scene.reads(await scene.launch("web", PLAIN))


@accepted("SEV-ES, {vcpus} vCPU, {cpu}")
@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("vcpus", VCPUS)
async def test_an_es_guest_of_the_expected_shape_reads_its_secret(scene: Scene, vcpus: int, cpu: str) -> None:
    outcome = await scene.launch(es(vcpus, cpu), es(vcpus, cpu))
    said = await scene.reads(outcome)
    assert scene.receipt(outcome)["shape"] == {"vcpus": vcpus, "cpu": cpu, "flavour": "legacy"}
    if scene.bench.real:
        assert f", {vcpus} CPU" in said


@accepted("SEV-ES on a QEMU of 9.1 or newer")
async def test_a_guest_of_a_newer_qemu_is_attested_alike(scene: Scene) -> None:
    if "newer" not in scene.bench.guests:
        pytest.skip("no second QEMU among the guest's parts: the machine's own is 9.1 or newer, or none could be had")
    outcome = await scene.launch("newer", es(4, MILAN))
    await scene.reads(outcome)
    assert outcome.session is not None
    with scene.monitor(outcome.session.launch_id) as machine:
        version = machine.ask("query-version")["qemu"]
        assert (version["major"], version["minor"]) >= (9, 1)
        assert machine.ask("query-sev")["sev-type"] == "sev"
    scene.saw(f"QEMU {version['major']}.{version['minor']}")


@accepted("SEV, one vCPU more, another CPU model: not measured")
async def test_a_plain_guest_of_another_shape_is_accepted_and_the_receipt_says_why(scene: Scene) -> None:
    outcome = await scene.launch("larger", PLAIN)
    await scene.reads(outcome)
    assert scene.receipt(outcome)["shape"] == {
        "note": "plain SEV: the number of vCPUs and the CPU type are not measured"
    }


@accepted("several secrets (a trailing NUL), the swapped parts expected")
async def test_a_guest_reads_several_secrets_and_boots_the_other_artefacts_where_they_are_expected(
    scene: Scene,
) -> None:
    await scene.reads(await scene.launch("other", SEVERAL))


@accepted("disk opened with the secret")
async def test_a_guest_opens_its_disk_with_the_secret(scene: Scene) -> None:
    needs_disk(scene)
    said = await scene.reads(await scene.launch("disk", DISK))
    assert f"disk: {DISK_CONTENT.decode().strip()}" in said
    scene.saw("opened its disk")


@accepted("disk of another passphrase")
async def test_a_guest_with_another_secret_does_not_open_the_disk(scene: Scene) -> None:
    needs_disk(scene)
    said = await scene.reads(await scene.launch("disk", WRONG_DISK))
    assert "disk: cannot be opened" in said
    assert DISK_CONTENT.decode().strip() not in said
    scene.saw("its disk stays shut")


@accepted("firmware-only boot")
async def test_a_guest_without_a_kernel_has_its_secret_in_ram_and_runs(scene: Scene) -> None:
    needs_ram(scene)
    outcome = await scene.launch("firmware-only", FIRMWARE_ONLY)
    assert outcome.error is None, outcome.error
    assert outcome.session is not None
    scene.allow("firmware-only", FIRMWARE_ONLY)
    lines = list(secrets_in(scene.ram(outcome.session.launch_id, scene.bench.footer.secret_area)))
    (secret,) = scene.bench.owner.workloads[FIRMWARE_ONLY].secrets
    assert lines == [f"secret {secret.guid} {len(secret.in_the_guest)} {secret.in_the_guest.hex()}"]
    with scene.monitor(outcome.session.launch_id) as machine:
        assert machine.ask("query-status")["running"] is True
        assert machine.ask("query-sev")["state"] == "running"
    scene.saw("runs, the secret is in its RAM")


@accepted("two guests at once on one host")
async def test_two_guests_at_once_read_their_own_secrets(scene: Scene) -> None:
    outcomes = await asyncio.gather(scene.launch("web", PLAIN), scene.launch("other", SEVERAL))
    for outcome in outcomes:
        await scene.reads(outcome)


@accepted("agent killed and started again while the guest is paused")
async def test_a_guest_outlives_its_agent_while_it_is_paused(scene: Scene) -> None:
    stack = scene.bench.stack

    def crash_and_return() -> None:
        stack.agent.kill()
        stack.restart(stack.agent)

    before = scene.bench.stack.agent.pid
    await scene.reads(await scene.launch("web", PLAIN, crash=Crash(before={Step.MEASURE: crash_and_return})))
    assert scene.bench.stack.agent.pid != before


@accepted("verifier killed and started again between begin and release")
async def test_a_launch_outlives_its_verifier_between_begin_and_release(scene: Scene) -> None:
    stack = scene.bench.stack

    def crash_and_return() -> None:
        stack.verifier.kill()
        stack.restart(stack.verifier)

    before = stack.verifier.pid
    outcome = await scene.launch(es(1, ROME), es(1, ROME), crash=Crash(before={Step.RELEASE: crash_and_return}))
    await scene.reads(outcome)
    assert stack.verifier.pid != before


def needs_disk(scene: Scene) -> None:
    """Skip where the guest has no disk."""
    if DISK not in scene.bench.owner.workloads:
        pytest.skip("no disk can be made here: cryptsetup or the kernel's modules are missing")


def needs_ram(scene: Scene) -> None:
    """Skip where nobody can look into the guest's memory."""
    if not scene.bench.real:
        pytest.skip("the stand-in machine does not save its memory (pmemsave)")
