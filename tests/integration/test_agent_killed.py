"""A kill -9 of the agent's process at every point of every step, with each driver whose guests something else starts.

The driver `qemu`, and what else happens to an agent: test_agent_on_platform.py. libvirt comes twice: a fake daemon,
which runs everywhere, and libvirt's own with an unmodified QEMU on /dev/kvm (`libvirtd`).
"""

from __future__ import annotations

import asyncio
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache

import pytest

from common.errors import SevattestError
from sevattest.v1 import host_agent_service_pb2 as pb
from tests.support.agent_site import REPOSITORY, Owner
from tests.support.driver_sites import StageSite, stage_site
from tests.support.eventually import until
from tests.support.kill_table import KILLED, POINTS
from tests.support.kvm import needs_kvm
from tests.support.libvirt_daemon import Daemon, libvirt_daemon
from tests.support.libvirt_site import LibvirtSite, libvirt_site
from tests.support.pki import Pki
from tests.support.platform import Platform
from tests.support.stages import short_folder

pytestmark = pytest.mark.slow

DRIVERS = ["attach", "attach-command", "proxmox", "libvirt", pytest.param("libvirtd", marks=needs_kvm)]
# The command that starts the machine waits for the agent, and ends with it.
HELD = ("start: machine held", "start: machine written down")
NOBODY_BEGINS = {(driver, point) for driver in ("attach-command", "proxmox") for point in HELD}
# And libvirt is asked after this.
NEVER_BEGAN = {"start: written down", *HELD, "start: machine released"}


@pytest.fixture(scope="module")
def daemons(platform: Platform) -> Iterator[Callable[[], Daemon]]:
    """The daemon of libvirt itself, made when it is first asked for."""
    with ExitStack() as stack:

        @cache
        def daemon() -> Daemon:
            return stack.enter_context(libvirt_daemon(stack.enter_context(short_folder()), platform))

        yield daemon


@pytest.fixture(params=DRIVERS)
def site(
    request: pytest.FixtureRequest, platform: Platform, pki: Pki, daemons: Callable[[], Daemon]
) -> Iterator[StageSite | LibvirtSite]:
    if request.param == "libvirtd":
        with libvirt_site(platform, pki, daemons()) as real:
            yield real
    else:
        with stage_site(request.param, platform, pki) as made:
            yield made


@pytest.mark.parametrize("point", POINTS)
async def test_after_a_kill_at_any_point_the_guest_runs_attested_or_does_not_run(
    site: StageSite | LibvirtSite,
    point: str,
    request: pytest.FixtureRequest,
    record_property: Callable[[str, object], None],
) -> None:
    driver = request.node.callspec.params["site"]
    async with site.somebody():
        owner = await until_killed(site, point)
        before = site.saw(owner)
        assert not before or point in {"resume: answered", "resume: done"}
        if (driver, point) in NOBODY_BEGINS:
            site.qemu["start_timeout"] = 1  # an agent that is back waits that long for a machine that does not come
        agent = site.start()
        await asyncio.to_thread(agent.wait_ready)  # it may wait for the machine, which somebody here starts
        async with site.caller(agent) as caller:
            launch = await caller.whole_again(owner, site.shape())
            if launch.state == pb.GUEST_LAUNCH_STATE_RESUMED:
                assert len(site.machines()) == 1
                await until(lambda: site.saw(owner))
                await caller.abort(owner)
                outcome = "was running, attested" if before else "resumed, attested"
            else:
                assert launch.state == pb.GUEST_LAUNCH_STATE_FAILED, launch
                assert point in NEVER_BEGAN
                assert not site.saw(owner)
                outcome = "stopped, never ran"
    await until(lambda: not site.machines())
    if outcome == "stopped, never ran":
        await may_be_launched_again(site)
    record_property(KILLED, (POINTS.index(point), point, driver, outcome))


async def until_killed(site: StageSite | LibvirtSite, point: str) -> Owner:
    """A launch that goes on until the agent is killed at this point."""
    doomed = site.start(point)
    async with site.caller(doomed) as caller:
        owner = Owner(pdh=await caller.pdh())
        with pytest.raises(SevattestError):
            await caller.whole(owner, site.shape())
    assert doomed._process is not None
    assert doomed._process.wait(30) == -signal.SIGKILL
    return owner


async def may_be_launched_again(site: StageSite | LibvirtSite) -> None:
    """What a launch that failed has left is in nobody's way."""
    if "start_timeout" in site.qemu:
        del site.qemu["start_timeout"]
        site.services[-1].kill()
        site.start()
    async with site.somebody(), site.caller(site.services[-1]) as caller:
        owner = Owner(pdh=await caller.pdh())
        await caller.whole(owner, site.shape())
        await until(lambda: site.saw(owner))
        await caller.abort(owner)
    await until(lambda: not site.machines())


def test_every_point_of_every_step_is_killed_at() -> None:
    named: set[str] = set()
    for source in (REPOSITORY / "host_agent" / "launches").glob("*.py"):
        named |= set(re.findall(r'observe\("([^"]+)"', source.read_text()))
    assert {point for point in named if not point.startswith("end: ")} == set(POINTS)
