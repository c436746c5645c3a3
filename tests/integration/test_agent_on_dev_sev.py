"""The agent with `device.driver = "dev_sev"`: a whole launch through the ioctl, under `sevattest platform run`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.errors import InvalidInput, Reason, SevattestError, Unavailable
from host_agent.devices import open_administration
from sevattest.v1 import host_agent_service_pb2 as pb
from tests.support.agent_site import Owner, Site
from tests.support.dev_sev_site import DevSevSite, dev_sev_site
from tests.support.pki import Pki
from tests.support.platform import Platform

pytestmark = pytest.mark.slow


@pytest.fixture
def site(platform: Platform, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DevSevSite]:
    with dev_sev_site(DevSevSite, platform, Pki(tmp_path_factory.mktemp("pki"))) as made:
        yield made


async def test_a_guest_is_launched_with_what_the_ioctl_exports(site: DevSevSite) -> None:
    async with site.caller(site.start()) as call:
        exported = (await call("ExportChain", pb.ExportChainRequest())).platform
        assert exported.chip_id.hex().upper() == next(site.platform.kds.iterdir()).stem
        owner = Owner(pdh=await call.pdh())
        launch = await call.whole(owner, site.shape())
        assert launch.state == pb.GUEST_LAUNCH_STATE_RESUMED
        await _until_read(site, owner)


async def test_a_session_for_the_pdh_before_is_stale(site: DevSevSite) -> None:
    async with site.caller(site.start()) as call:
        owner = Owner(pdh=await call.pdh())
        await open_administration(site.platform.socket, timeout=30).pdh_gen()
        with pytest.raises(SevattestError) as refusal:
            await call.start(owner)
        assert refusal.value.reason is Reason.SESSION_STALE


@pytest.mark.skipif(Path("/dev/sev").exists(), reason="this host has a SEV device")
async def test_without_a_device_the_agent_serves_and_says_what_is_missing(site: DevSevSite) -> None:
    site.intercepted = False
    async with site.caller(site.start()) as call:
        with pytest.raises(Unavailable, match="/dev/sev cannot be opened for reading") as error:
            await call("ExportChain", pb.ExportChainRequest())
        assert error.value.reason is Reason.PLATFORM_UNAVAILABLE


LITTLE = ["prlimit", "--memlock=65536:65536"]
# Root may lock more, whatever the limit is; others may not, and cannot give up what they do not have.
MAY_NOT = ["setpriv", "--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock"] if os.geteuid() == 0 else []


async def test_a_guest_that_is_larger_than_what_may_be_locked_is_refused(site: DevSevSite) -> None:
    del site.qemu["check_memlock"]
    site.prefix = [*LITTLE, *MAY_NOT]
    async with site.caller(site.start()) as call:
        with pytest.raises(InvalidInput, match="266240 KiB of RAM and flash, and the agent may lock 64 KiB") as refusal:
            await call.start(Owner(pdh=await call.pdh()))
        assert refusal.value.reason is Reason.INVALID_CONFIGURATION
        assert "LimitMEMLOCK=" in refusal.value.message
    assert site.machines() == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has CAP_IPC_LOCK")
async def test_the_right_to_lock_memory_lifts_the_limit(site: DevSevSite) -> None:
    del site.qemu["check_memlock"]
    site.prefix = LITTLE
    async with site.caller(site.start()) as call:
        assert (await call.start(Owner(pdh=await call.pdh()))).state == pb.GUEST_LAUNCH_STATE_PAUSED


async def test_where_nothing_is_pinned_the_limit_need_not_be_looked_at(site: DevSevSite) -> None:
    assert site.qemu["check_memlock"] == "false"
    site.prefix = [*LITTLE, *MAY_NOT]
    async with site.caller(site.start()) as call:
        assert (await call.start(Owner(pdh=await call.pdh()))).state == pb.GUEST_LAUNCH_STATE_PAUSED


async def _until_read(site: Site, owner: Owner) -> None:
    async with asyncio.timeout(60):
        while not any(owner.secret.hex() in line for line in site.read_by_guest):  # noqa: ASYNC110 -- a guest gives no event
            await asyncio.sleep(0.05)
