"""The agent with `device.driver = "dev_sev"`: a whole launch through the ioctl, under `sevattest platform run`."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.errors import Reason, SevattestError, Unavailable
from host_agent.devices import open_administration
from orchestrator.demo.processes import Service
from sevattest.v1 import host_agent_service_pb2 as pb
from tests.support.agent_site import REPOSITORY, Owner, Site
from tests.support.pki import Pki
from tests.support.platform import SEVATTEST, Platform, running_platform

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    with running_platform(tmp_path_factory.mktemp("p")) as running:
        words = [*SEVATTEST, "platform", "run", "--state", str(running.state), "--", "true"]
        tried = subprocess.run(words, check=False, capture_output=True, text=True, timeout=60)
        if tried.returncode:
            pytest.skip(f"system calls cannot be intercepted here (seccomp user notification): {tried.stderr.strip()}")
        yield running


class DevSevSite(Site):
    """A site whose agent looks for /dev/sev; with `intercepted` it finds the software platform's there."""

    intercepted = True

    def write_config(self) -> None:
        super().write_config()
        text = self.config.read_text()
        socket = f'driver = "socket"\npath = "{self.platform.socket}"'
        assert socket in text
        self.config.write_text(text.replace(socket, 'driver = "dev_sev"'))

    def start(self, point: str | None = None) -> Service:
        assert point is None
        self.write_config()
        front = [*SEVATTEST, "platform", "run", "--state", str(self.platform.state), "--"] if self.intercepted else []
        agent = [sys.executable, "-c", "import sys; from host_agent.cli import main; sys.exit(main())"]
        command = [*front, *agent, "serve", "--config", str(self.config)]
        environ = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        service = Service("sev-host-agent", command, logs=self.root, environ=environ)
        self.services.append(service)
        service.start()
        return service


@pytest.fixture
def site(platform: Platform, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DevSevSite]:
    root = Path(tempfile.mkdtemp(prefix="sevattest-agent-"))  # short enough for a socket's path
    made = DevSevSite(root, platform, Pki(tmp_path_factory.mktemp("pki")))
    try:
        yield made
    finally:
        made.end()
        shutil.rmtree(root, ignore_errors=True)


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


async def _until_read(site: Site, owner: Owner) -> None:
    async with asyncio.timeout(60):
        while not any(owner.secret.hex() in line for line in site.read_by_guest):  # noqa: ASYNC110 -- a guest gives no event
            await asyncio.sleep(0.05)
