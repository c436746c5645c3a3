"""The agent drives an unmodified QEMU on /dev/kvm through whole launches, over gRPC, under `sevattest platform run`.

The agent's ioctl driver and QEMU's target/i386/sev.c both speak to the software PSP; between agent and QEMU there is
nothing. Who says what is right: libvirt's virt-qemu-sev-validate of the measurement, QEMU's own view of its memory, and
the guest's processor, which prints what it finds where the firmware's footer puts secrets.

A machine is its `platform run`'s for life: the supervisor answers its SEV calls. An agent that is killed alone leaves
both behind, and another agent under a `platform run` of its own finds the machine. Where the supervisor is killed, the
agent dies with it and the machine's SEV calls are answered by nobody: as if the host's kernel had lost the guest.
"""

from __future__ import annotations

import asyncio
import os
import signal
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from common.errors import PlatformFailed, Reason, Refused, SevattestError
from common.sev.certs.sev import SevCertificate
from common.sev.digest.compute import LaunchShape, measure_firmware
from common.sev.digest.cpus import parse_cpu
from common.sev.digest.kernel_hashes import KernelHashes
from common.sev.digest.vmsa import Flavour
from common.sev.policy import GuestPolicy
from common.sev.report import AttestationReport
from common.sev.secret import SecretEntry, build_table
from orchestrator.demo.processes import Service
from sevattest.v1 import host_agent_service_pb2 as pb
from tests.support.agent import alive
from tests.support.agent_site import CMDLINE, CPU, ES, PLAIN, SECRET_ID, Caller, Owner
from tests.support.dev_sev_site import KvmSite, dev_sev_site
from tests.support.eventually import until
from tests.support.kvm import needs_kvm
from tests.support.pki import Pki
from tests.support.platform import Platform, running_platform
from tests.support.real_qemu import EACH_QEMU, qemu
from tests.support.sev_host import wait_for_guests, wait_for_no_guest
from tests.support.witnesses import ACCEPTED, REFUSED, verdicts

__all__ = ["qemu"]  # a fixture
pytestmark = [pytest.mark.slow, needs_kvm]

NONCE = bytes(range(16))
KINDS = {"SEV": PLAIN, "SEV-ES": ES}


@pytest.fixture
def site(platform: Platform, pki: Pki, qemu: str) -> Iterator[KvmSite]:
    with dev_sev_site(KvmSite, platform, pki) as made:
        made.use(qemu)
        yield made
    wait_for_no_guest(platform)


def table_of(owner: Owner) -> bytes:
    """What the guest is to find."""
    return build_table([SecretEntry(guid=SECRET_ID, data=owner.secret)])


def twins(site: KvmSite, policy: GuestPolicy) -> Iterator[LaunchShape]:
    """What the owner does not expect: one thing is another each time."""
    shape = site.shape(policy)
    yield replace(shape, firmware=measure_firmware([site.firmware.read_bytes()[:-1] + b"!"]))
    yield replace(shape, hashes=None if shape.hashes else KernelHashes.of(bytes(32), bytes(32), b""))
    if policy.requires_es:
        yield replace(shape, vcpus=site.vcpus + 1)
        yield replace(shape, cpu=parse_cpu("EPYC-Genoa"))
        yield replace(shape, flavour=Flavour.INIT2)


@EACH_QEMU
@pytest.mark.parametrize("directly", [True, False], ids=["kernel", "firmware"])
@pytest.mark.parametrize("vcpus", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
async def test_a_whole_launch_ends_with_the_secret_in_ram_and_a_guest_that_prints_it(
    site: KvmSite, kind: str, vcpus: int, *, directly: bool
) -> None:
    site.vcpus, site.boots_directly = vcpus, directly
    policy = KINDS[kind]
    shape = site.shape(policy)
    async with site.caller(site.start()) as call:
        chain = (await call("ExportChain", pb.ExportChainRequest())).platform.chain
        owner = Owner(pdh=SevCertificate.parse(chain[:2084]), policy=policy)
        assert (await call.start(owner)).state == pb.GUEST_LAUNCH_STATE_PAUSED
        measured = await call.measure(owner)
        assert all(not owner.accepts(measured, twin) for twin in twins(site, policy))
        packet = owner.release(measured, shape)
        wanted = table_of(owner)
        assert owner.secret not in site.secret_area()
        await call.inject(owner, packet)
        assert site.secret_area().startswith(wanted)

        asked = pb.GetAttestationReportRequest(launch_id=str(owner.launch_id), nonce=NONCE)
        report = AttestationReport.parse((await call("GetAttestationReport", asked)).report)
        report.verify(SevCertificate.parse(chain[2084:4168]))
        assert (report.nonce, report.policy, report.digest) == (NONCE, policy, shape.digest())

        assert not site.printed.read_bytes()
        assert (await call.resume(owner)).state == pb.GUEST_LAUNCH_STATE_RESUMED
        await until(lambda: site.printed.read_bytes().startswith(wanted))
        assert (await call.abort(owner)).state == pb.GUEST_LAUNCH_STATE_STOPPED
        await until(lambda: not site.machines())


def expectation(site: KvmSite, owner: Owner, measured: pb.GetMeasurementResponse) -> dict[str, object]:
    """All that the owner expects, as options of libvirt's tool."""
    options: dict[str, object] = {"firmware": site.firmware, "policy": owner.policy.value}
    options["measurement"] = b64encode(measured.measurement).decode()
    if site.boots_directly:
        options |= {"kernel": site.kernel, "initrd": site.initrd, "cmdline": CMDLINE}
    for name, key in (("tik", owner.keys.tik), ("tek", owner.keys.tek)):
        (site.root / name).write_bytes(key)
        options[name] = site.root / name
    version = measured.firmware
    options |= {"api-major": version.api_major, "api-minor": version.api_minor, "build-id": version.build}
    if owner.policy.requires_es:
        cpu = parse_cpu(CPU)
        options |= {"num-cpus": site.vcpus, "cpu-family": cpu.family}
        options |= {"cpu-model": cpu.model, "cpu-stepping": cpu.stepping}
    return options


@EACH_QEMU
@pytest.mark.parametrize("directly", [True, False], ids=["kernel", "firmware"])
@pytest.mark.parametrize("vcpus", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
async def test_libvirts_tool_accepts_the_measurement_and_none_of_its_twins(
    site: KvmSite, kind: str, vcpus: int, *, directly: bool
) -> None:
    site.vcpus, site.boots_directly = vcpus, directly
    policy = KINDS[kind]
    async with site.caller(site.start()) as call:
        owner = Owner(pdh=await call.pdh(), policy=policy)
        await call.start(owner)
        expected = expectation(site, owner, await call.measure(owner))
        await call.abort(owner)
    other = site.root / "other"
    other.write_bytes(site.firmware.read_bytes()[:-1] + b"!")
    changes: list[dict[str, object]] = [{"firmware": other}, {"policy": policy.value ^ 2}, {"build-id": 23}]
    if directly:
        changes += [{"kernel": other}, {"initrd": other}, {"cmdline": f"{CMDLINE} "}]
    if policy.requires_es:
        changes += [{"num-cpus": vcpus + 1}, {"cpu-model": 49}]
    said = await asyncio.to_thread(verdicts, [expected, *(expected | change for change in changes)])
    assert said == [ACCEPTED, *(REFUSED for _ in changes)], changes


async def paused(call: Caller, policy: GuestPolicy = ES) -> Owner:
    """The owner of a guest that stands still."""
    owner = Owner(pdh=await call.pdh(), policy=policy)
    await call.start(owner)
    return owner


async def test_a_packet_that_was_changed_on_its_way_ends_the_guest(site: KvmSite) -> None:
    async with site.caller(site.start()) as call:
        owner = await paused(call)
        packet = owner.release(await call.measure(owner), site.shape())
        changed = replace(packet, payload=bytes([packet.payload[0] ^ 1]) + packet.payload[1:])
        with pytest.raises(Refused, match="BAD_MEASUREMENT") as refusal:
            await call.inject(owner, changed)
        assert refusal.value.reason is Reason.FIRMWARE_BAD_MEASUREMENT
        assert (await call.get(owner)).state == pb.GUEST_LAUNCH_STATE_FAILED
    assert site.machines() == []
    assert not site.printed.read_bytes()


async def test_a_session_for_another_policy_is_the_firmwares_refusal(site: KvmSite) -> None:
    async with site.caller(site.start()) as call:
        owner = Owner(pdh=await call.pdh())
        with pytest.raises(Refused, match="LAUNCH_START") as refusal:
            await call.start(owner, policy=owner.policy.value ^ 2)
        assert refusal.value.reason is Reason.FIRMWARE_BAD_MEASUREMENT


@EACH_QEMU
async def test_a_platform_without_sev_es_is_named_also_where_qemu_crashes_over_it(
    tmp_path: Path, pki: Pki, qemu: str
) -> None:
    # QEMU 7.2 says why and then dies of SIGSEGV; newer ones go on to say that KVM cannot be used.
    with running_platform(tmp_path / "p", options=["--no-es"]) as served, dev_sev_site(KvmSite, served, pki) as site:
        site.use(qemu)
        async with site.caller(site.start()) as call:
            owner = Owner(pdh=await call.pdh())
            with pytest.raises(
                PlatformFailed, match="guest policy requires SEV-ES, but host SEV-ES support unav"
            ) as why:
                await call.start(owner)
            assert why.value.reason is Reason.HYPERVISOR_FAILED
            assert site.machines() == []
            plain = await paused(call, PLAIN)
            assert plain.accepts(await call.measure(plain), site.shape(PLAIN))


# -------------------------------------------------------------------------------------------------- kill -9


def only_child(service: Service) -> int:
    """The program under `platform run`: the agent itself."""
    children = Path(f"/proc/{service.pid}/task/{service.pid}/children").read_text().split()
    found = [int(pid) for pid in children if b"host_agent.cli" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(found) == 1, children
    return found[0]


@EACH_QEMU
async def test_an_agent_that_is_killed_alone_is_followed_by_one_that_goes_on(site: KvmSite) -> None:
    first = site.start()
    async with site.caller(first) as call:
        owner = await paused(call)
        measured = await call.measure(owner)
    agent = only_child(first)
    os.kill(agent, signal.SIGKILL)
    await until(lambda: not alive(agent))
    [machine] = site.machines()
    async with site.caller(site.start()) as call:
        assert (await call.get(owner)).state == pb.GUEST_LAUNCH_STATE_MEASURED
        assert await call.measure(owner) == measured
        assert site.machines() == [machine]
        await call.inject(owner, owner.release(measured, site.shape()))
        assert (await call.resume(owner)).state == pb.GUEST_LAUNCH_STATE_RESUMED
        await until(lambda: site.printed.read_bytes().startswith(table_of(owner)))
        await call.abort(owner)
    await until(lambda: not first.running)  # nobody is left under it


async def test_a_machine_that_lost_its_supervisor_gets_no_secret_and_is_ended(
    site: KvmSite, platform: Platform
) -> None:
    first = site.start()
    async with site.caller(first) as call:
        owner = await paused(call)
        measured = await call.measure(owner)
    agent = only_child(first)
    first.kill()
    await until(lambda: not alive(agent))
    wait_for_guests(platform, 0)
    [machine] = site.machines()  # QEMU itself goes on
    async with site.caller(site.start()) as call:
        assert (await call.get(owner)).state == pb.GUEST_LAUNCH_STATE_MEASURED
        with pytest.raises(SevattestError) as failure:
            await call.inject(owner, owner.release(measured, site.shape()))
        assert failure.value.reason is Reason.HYPERVISOR_FAILED
        assert (await call.get(owner)).state == pb.GUEST_LAUNCH_STATE_FAILED
    await until(lambda: not alive(machine))
    assert not site.printed.read_bytes()
