"""What every driver promises, on every driver: one launch, with a real QEMU and with the stand-in, and its evil twins.

The agent's runner, ledger and supervisor are the real ones, in this process. The rest of the promise is in
test_hypervisors_evil.py (machines that are not as they must be) and test_hypervisors_restart.py (lost answers,
restarts, nobody else's machine).
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any
from uuid import uuid4

import pytest

from common.errors import PlatformFailed, Reason, Refused, SevattestError
from common.sev.certs.sev import SevCertificate
from common.sev.digest.compute import LaunchShape, measure_firmware
from common.sev.digest.cpus import parse_cpu
from common.sev.digest.kernel_hashes import KernelHashes
from common.sev.digest.vmsa import Flavour
from common.sev.measurement import MeasurementBlob, match
from common.sev.policy import GuestPolicy
from common.sev.secret import SecretEntry, SecretPacket, build_table, seal_packet
from emulator.firmware_image import SECRET_AREA
from host_agent.devices.socket import SocketDevice
from host_agent.hypervisors.fleet import DRIVERS
from host_agent.hypervisors.monitored import QemuSettings
from host_agent.launches.launch import Launch
from host_agent.launches.runner import StartRequest
from host_agent.launches.state import LaunchState as S
from tests.support.agent import ALICE, QUICK, Rig
from tests.support.agent_site import ES, PLAIN, SECRET_ID, Owner
from tests.support.eventually import until
from tests.support.machine_kinds import CMDLINE, CPU, VCPUS, Kind, builtin, front
from tests.support.platform import Platform
from tests.support.plays import agent, staged
from tests.support.real_qemu import installed_qemu
from tests.support.stages import STAGES, Stage, short_folder


@pytest.fixture(params=list(STAGES))
def driver(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@dataclass
class Scene:
    """A guest owner and an agent over a stage on the software platform."""

    stage: Stage
    rig: Rig
    owner: Owner

    def order(self, **changes: Any) -> StartRequest:
        fields: dict[str, Any] = {
            "request_id": uuid4(),
            "launch_id": self.owner.launch_id,
            "guest": "web",
            "policy": self.owner.policy.value,
            "godh": self.owner.session.godh.raw,
            "session": self.owner.session.blob,
            "pdh_fingerprint": self.owner.pdh.fingerprint,
        }
        return StartRequest(**{**fields, **changes})

    async def start(self, **changes: Any) -> Launch:
        async with self.stage.somebody():
            return await self.rig.runner.start(ALICE, self.order(**changes))

    async def packet(self) -> SecretPacket:
        """The owner's packet, for a measurement that is the one that the owner expects."""
        launch = await self.rig.runner.measure(ALICE, self.owner.launch_id)
        assert launch.measurement is not None
        assert launch.firmware is not None
        blob = MeasurementBlob.parse(launch.measurement)
        digests = [self._shape().digest()]
        keys, policy = self.owner.keys, self.owner.policy
        assert match(tik=keys.tik, blob=blob, firmware=launch.firmware, policy=policy, digests=digests) == 0
        table = build_table([SecretEntry(guid=SECRET_ID, data=self.owner.secret)])
        return seal_packet(
            keys=keys, table=table, measurement=blob.measurement, iv=os.urandom(16), area_size=SECRET_AREA[1]
        )

    def _shape(self) -> LaunchShape:
        root, es = self.stage.root, self.owner.policy.requires_es
        kernel, initrd = (sha256((root / name).read_bytes()).digest() for name in ("vmlinuz", "initrd"))
        return LaunchShape(
            firmware=measure_firmware([self.stage.firmware.read_bytes()]),
            hashes=KernelHashes.of(kernel, initrd, CMDLINE.encode()),
            vcpus=VCPUS if es else None,
            cpu=parse_cpu(CPU) if es else None,
            flavour=Flavour.LEGACY if es else None,
        )

    @property
    def secret_line(self) -> str:
        return f"secret {SECRET_ID} {len(self.owner.secret)} {self.owner.secret.hex()}"


@asynccontextmanager
async def scene(
    driver: str,
    kind: Kind,
    platform: Platform,
    monkeypatch: pytest.MonkeyPatch,
    *,
    policy: GuestPolicy = ES,
    settings: QemuSettings = QUICK,
) -> AsyncIterator[Scene]:
    with short_folder() as root:
        (root / "agent").mkdir()
        device = SocketDevice(platform.socket, timeout=20)
        async with (
            staged(driver, kind, root, monkeypatch) as stage,
            agent(stage, device=device, settings=settings) as rig,
        ):
            pdh = SevCertificate.parse((await device.export_chain())[:2084])
            yield Scene(stage, rig, Owner(pdh=pdh, policy=policy))
            for launch in rig.ledger.unfinished():
                await rig.runner.abort(ALICE, launch.launch_id, uuid4())


@pytest.mark.slow
@pytest.mark.parametrize("policy", [ES, PLAIN], ids=["sev-es", "sev"])
async def test_a_guest_reads_the_owners_secret(
    driver: str, policy: GuestPolicy, platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with scene(driver, builtin(platform), platform, monkeypatch, policy=policy) as act:
        runner, launch_id = act.rig.runner, act.owner.launch_id
        assert (await act.start()).state is S.PAUSED
        packet = await act.packet()
        assert act.stage.serial == []
        await runner.inject(ALICE, launch_id, uuid4(), packet.header, packet.payload)
        assert (await runner.resume(ALICE, launch_id, uuid4())).state is S.RESUMED
        await until(lambda: act.stage.serial)
        assert act.stage.serial == [act.secret_line]
        assert len(await runner.report(ALICE, launch_id, bytes(16))) == 208
        assert (await runner.abort(ALICE, launch_id, uuid4())).state is S.STOPPED
        assert act.stage.machines() == []


@pytest.mark.slow
@pytest.mark.parametrize("policy", [ES, PLAIN], ids=["sev-es", "sev"])
async def test_a_real_qemu_is_measured_takes_the_secret_and_runs(
    driver: str, policy: GuestPolicy, platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with scene(driver, front(platform, installed_qemu()), platform, monkeypatch, policy=policy) as act:
        runner, launch_id = act.rig.runner, act.owner.launch_id
        assert (await act.start()).state is S.PAUSED
        packet = await act.packet()
        await runner.inject(ALICE, launch_id, uuid4(), packet.header, packet.payload)
        assert (await runner.resume(ALICE, launch_id, uuid4())).state is S.RESUMED
        machine = act.rig.custody.machine(launch_id)
        assert machine is not None
        assert (await machine.inspect()).has_run
        assert (await runner.abort(ALICE, launch_id, uuid4())).state is S.STOPPED
        assert act.stage.machines() == []


@pytest.mark.slow
async def test_a_session_for_another_policy_is_refused_and_no_machine_is_left(
    driver: str, platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of a machine that somebody else starts, nobody tells the agent that it died: it waits.
    settings = replace(QUICK, start_timeout=3) if driver == "attach" else QUICK
    async with scene(driver, builtin(platform), platform, monkeypatch, settings=settings) as act:
        with pytest.raises((Refused, PlatformFailed)) as failure:
            await act.start(policy=act.owner.policy.value & ~1)
        if driver != "attach":
            # Whoever starts an attached machine hears QEMU's last words, and the agent does not.
            assert failure.value.reason is Reason.FIRMWARE_BAD_MEASUREMENT
        assert act.rig.runner.get(ALICE, act.owner.launch_id).state is S.FAILED
        assert act.stage.machines() == []


@pytest.mark.slow
async def test_a_packet_with_one_bit_changed_is_refused_and_the_guest_is_ended(
    driver: str, platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with scene(driver, builtin(platform), platform, monkeypatch) as act:
        await act.start()
        packet = await act.packet()
        changed = bytes([packet.payload[0] ^ 1]) + packet.payload[1:]
        with pytest.raises(Refused) as refusal:
            await act.rig.runner.inject(ALICE, act.owner.launch_id, uuid4(), packet.header, changed)
        assert refusal.value.reason is Reason.FIRMWARE_BAD_MEASUREMENT
        with pytest.raises(SevattestError):
            await act.rig.runner.resume(ALICE, act.owner.launch_id, uuid4())
        assert act.stage.serial == []
        assert act.stage.machines() == []


def test_every_driver_is_on_a_stage() -> None:
    assert {name.removesuffix("-command") for name in STAGES} == DRIVERS
