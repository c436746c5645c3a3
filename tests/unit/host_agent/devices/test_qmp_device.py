"""The platform's certificates by way of a QEMU, held against the device itself, and answers that make no sense."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from common.errors import PlatformFailed, Reason, Unavailable
from common.sev.abi import PlatformState
from host_agent.app import make_device
from host_agent.config import DeviceTable
from host_agent.devices.qmp import QmpDevice
from host_agent.devices.socket import SocketDevice
from tests.support.platform import Platform
from tests.support.qmp import running_machine
from tests.support.sev_host import make_host
from tests.support.stages import short_folder


@pytest.mark.slow
async def test_it_says_of_the_platform_what_the_device_says(platform: Platform) -> None:
    with short_folder() as folder:
        host = make_host(folder, platform)
        with running_machine(host.words(), host.qmp):
            device = make_device(DeviceTable(driver="qmp", path=host.qmp, timeout=20))
            itself = SocketDevice(platform.socket, timeout=20)
            assert await device.export_chain() == await itself.export_chain()
            assert await device.chip_id() == await itself.chip_id()
            status, real = await device.status(), await itself.status()
            assert (status.firmware, status.state) == (real.firmware, PlatformState.WORKING)


CAPABILITIES = {
    "pdh": base64.b64encode(bytes(2084)).decode(),
    "cert-chain": base64.b64encode(bytes(6252)).decode(),
    "cpu0-id": base64.b64encode(bytes(64)).decode(),
    "cbitpos": 51,
    "reduced-phys-bits": 1,
}


def told(**changes: object) -> QmpDevice:
    async def ask(command: str) -> object:
        if command == "query-sev":
            return {"enabled": False, "api-major": 0, "api-minor": 0, "build-id": 0, "state": "uninit"}
        return {key: value for key, value in {**CAPABILITIES, **changes}.items() if value is not None}

    return QmpDevice(ask)


async def test_a_monitor_that_is_not_there_is_a_platform_without_an_answer(tmp_path: Path) -> None:
    device = make_device(DeviceTable(driver="qmp", path=tmp_path / "q", timeout=1))
    for step in (device.export_chain, device.chip_id, device.status):
        with pytest.raises(Unavailable):
            await step()


async def test_a_qemu_that_does_not_know_the_chip_says_none() -> None:
    assert await told().chip_id() == bytes(64)
    assert await told(**{"cpu0-id": None}).chip_id() == b""


async def test_what_a_qemu_does_not_tell_is_not_known_and_not_made_up() -> None:
    status = await told().status()
    assert (status.state, status.firmware) == (PlatformState.INIT, None)
    assert (status.externally_owned, status.es_enabled, status.guest_count) == (None, None, None)


@pytest.mark.parametrize(
    "change",
    [
        {"pdh": None},
        {"pdh": ""},
        {"pdh": "!"},
        {"pdh": CAPABILITIES["cert-chain"]},
        {"cert-chain": None},
        {"cert-chain": CAPABILITIES["pdh"]},
        {"cert-chain": 7},
    ],
)
async def test_a_chain_that_is_none_is_the_platforms_failure(change: dict[str, object]) -> None:
    assert len(await told().export_chain()) == 8336
    with pytest.raises(PlatformFailed, match="makes no sense") as failure:
        await told(**change).export_chain()
    assert failure.value.reason is Reason.FIRMWARE_FAILED


@pytest.mark.parametrize("answer", [None, [], "x", 1])
async def test_an_answer_of_another_kind_is_the_platforms_failure(answer: object) -> None:
    async def ask(_command: str) -> object:
        return answer

    for step in (QmpDevice(ask).export_chain, QmpDevice(ask).chip_id, QmpDevice(ask).status):
        with pytest.raises(PlatformFailed):
            await step()


@pytest.mark.parametrize("part", [True, -1, 256, "1", 1.0, None])
async def test_a_version_that_is_none_is_the_platforms_failure(part: object) -> None:
    async def ask(command: str) -> object:
        sev = {"enabled": True, "api-major": 1, "api-minor": part, "build-id": 24}
        return sev if command == "query-sev" else CAPABILITIES

    with pytest.raises(PlatformFailed, match="its version") as failure:
        await QmpDevice(ask).status()
    assert failure.value.reason is Reason.FIRMWARE_FAILED


async def test_a_chip_id_of_another_size_is_the_platforms_failure() -> None:
    with pytest.raises(PlatformFailed):
        await told(**{"cpu0-id": base64.b64encode(bytes(63)).decode()}).chip_id()
