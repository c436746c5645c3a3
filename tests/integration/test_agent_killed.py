"""A kill -9 of the agent's process at every point of every step, with each driver whose guests something else starts.

The driver `qemu`, and what else happens to an agent: test_agent_on_platform.py. libvirt is its own daemon with an
unmodified QEMU on /dev/kvm (`libvirtd`), or where that cannot run a fake of the daemon.
"""

from __future__ import annotations

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
from tests.support.kvm import why_no_kvm
from tests.support.libvirt_daemon import Daemon, libvirt_daemon, why_no_daemon
from tests.support.libvirt_site import LibvirtSite, libvirt_site
from tests.support.pki import Pki
from tests.support.platform import Platform
from tests.support.stages import short_folder
from tests.support.under import why_not_under

pytestmark = pytest.mark.slow

# Once it is met, a machine that a command started is like one that somebody else did.
STARTS = [point for point in POINTS if point.startswith("start: machine")]
# Between each of these and the point before, nothing is asked of the machine but a measurement: the record alone has
# changed, or nothing, which is the same with every driver.
ON_RECORD = {"start: begun", "measure: read", "measure: done", "inject: done"}
OUTSIDE = [point for point in POINTS if point not in ON_RECORD]
CASES = [
    *(("attach", point) for point in POINTS),
    *(("attach-command", point) for point in STARTS),
    *(("proxmox", point) for point in OUTSIDE),
    *(("libvirt", point) for point in OUTSIDE),
]
# Whatever starts the machine waits until the launch is on record; and libvirt is asked after the last of these.
NEVER_BEGAN = {"start: written down", "start: machine held", "start: machine written down"}
NEVER_ASKED = {*NEVER_BEGAN, "start: machine released"}


@pytest.fixture(scope="module")
def daemons(platform: Platform) -> Iterator[Callable[[], Daemon]]:
    """The daemon of libvirt itself, made when it is first asked for."""
    with ExitStack() as stack:

        @cache
        def daemon() -> Daemon:
            return stack.enter_context(libvirt_daemon(stack.enter_context(short_folder()), platform))

        yield daemon


@pytest.fixture
def site(driver: str, platform: Platform, pki: Pki, daemons: Callable[[], Daemon]) -> Iterator[StageSite | LibvirtSite]:
    if driver == "libvirt" and not (why_no_kvm() or why_no_daemon() or why_not_under(platform)):
        with libvirt_site(platform, pki, daemons()) as real:
            yield real
    else:
        with stage_site(driver, platform, pki) as made:
            yield made


@pytest.mark.parametrize(("driver", "point"), CASES)
async def test_after_a_kill_at_any_point_the_guest_runs_attested_or_does_not_run(
    site: StageSite | LibvirtSite, driver: str, point: str, record_property: Callable[[str, object], None]
) -> None:
    never_began = NEVER_ASKED if driver == "libvirt" else NEVER_BEGAN
    async with site.somebody():
        owner = await until_killed(site, point)
        before = site.saw(owner)
        assert not before or point in {"resume: answered", "resume: done"}
        async with site.caller(site.start()) as caller:
            launch = await caller.whole_again(owner, site.shape())
            if launch.state == pb.GUEST_LAUNCH_STATE_RESUMED:
                assert len(site.machines()) == 1
                await until(lambda: site.saw(owner))
                await caller.abort(owner)
                outcome = "was running, attested" if before else "resumed, attested"
            else:
                assert launch.state == pb.GUEST_LAUNCH_STATE_FAILED, launch
                assert point in never_began
                assert not site.saw(owner)
                outcome = "stopped, never ran"
    await until(lambda: not site.machines())
    if outcome == "stopped, never ran":
        await may_be_launched_again(site)
    column = "libvirtd" if isinstance(site, LibvirtSite) else driver
    record_property(KILLED, (POINTS.index(point), point, column, outcome))


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
