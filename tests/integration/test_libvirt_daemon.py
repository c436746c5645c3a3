"""The driver `libvirt` with libvirt's own daemon and an unmodified QEMU on /dev/kvm; nothing of libvirt is a fake here.

Where the host has no SEV the daemon refuses the machine, and says so in its words. Under `sevattest platform run` it
and QEMU find the software platform's SEV, and the agent drives them through whole launches. The guest's processor
prints what it finds where the firmware's footer puts secrets. The QEMU is the distribution's, as libvirt is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import replace
from uuid import uuid4
from xml.etree import ElementTree as ET

import pytest

from common.errors import InvalidInput, OutcomeUnknown, PlatformFailed, Reason, Refused, SevattestError, Unavailable
from common.sev.certs.sev import SevCertificate
from common.sev.report import AttestationReport
from host_agent.hypervisors.arguments import MachineOptions
from host_agent.hypervisors.domain_xml import check_domain, launch_xml
from host_agent.hypervisors.libvirt_calls import load
from sevattest.v1 import host_agent_service_pb2 as pb
from tests.support.agent_site import ES, PLAIN, Owner
from tests.support.c_bit import c_bit_of_this_machine
from tests.support.eventually import until
from tests.support.kvm import needs_kvm
from tests.support.libvirt_daemon import Daemon, libvirt_daemon
from tests.support.libvirt_site import LibvirtSite, libvirt_site
from tests.support.pki import Pki
from tests.support.platform import Platform
from tests.support.sev_host import wait_for_no_guest
from tests.support.stages import short_folder

pytestmark = [pytest.mark.slow, needs_kvm]

NONCE = bytes(range(16))
KINDS = {"SEV": PLAIN, "SEV-ES": ES}
NO_SEV = "SEV launch security is not supported with this QEMU binary"


@pytest.fixture(scope="module")
def without_sev() -> Iterator[Daemon]:
    with short_folder() as root, libvirt_daemon(root) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def with_sev(platform: Platform) -> Iterator[Daemon]:
    with short_folder() as root, libvirt_daemon(root, platform) as daemon:
        yield daemon


@pytest.fixture
def plain_host(platform: Platform, pki: Pki, without_sev: Daemon) -> Iterator[LibvirtSite]:
    with libvirt_site(platform, pki, without_sev) as site:
        yield site


@pytest.fixture
def sev_host(platform: Platform, pki: Pki, with_sev: Daemon) -> Iterator[LibvirtSite]:
    with libvirt_site(platform, pki, with_sev) as site:
        yield site
    wait_for_no_guest(platform)


async def refusal_of(site: LibvirtSite) -> PlatformFailed:
    """What the agent answers to a start that fails; the launch has failed and nothing is left of it."""
    async with site.caller(site.start()) as caller:
        owner = Owner(pdh=await caller.pdh())
        with pytest.raises(PlatformFailed) as failure:
            await caller.start(owner)
        assert (await caller.get(owner)).state == pb.GUEST_LAUNCH_STATE_FAILED
        assert not site.printed.exists()
        return failure.value


async def test_where_the_host_has_no_sev_the_daemon_refuses_the_machine_and_nothing_is_left(
    plain_host: LibvirtSite,
) -> None:
    refused = await refusal_of(plain_host)
    assert refused.reason is Reason.HYPERVISOR_FAILED
    assert str(refused).startswith("libvirt refused to start the domain: ")
    assert NO_SEV in str(refused)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("<vcpu>", "<surprise/><vcpu>"),
        ("<memory unit='MiB'>", "<memory unit='parsec'>"),
        ("<on_reboot>destroy", "<on_reboot>dance"),
    ],
)
async def test_what_libvirts_schema_does_not_know_the_daemon_refuses(
    plain_host: LibvirtSite, old: str, new: str
) -> None:
    plain_host.changes.append((old, new))
    check_domain("guests.web.domain", plain_host.domain)  # the agent leaves the rest to libvirt
    refused = await refusal_of(plain_host)
    assert "XML document failed to validate against schema" in str(refused)
    assert NO_SEV not in str(refused)


def test_without_acpi_the_daemon_refuses_the_firmware_and_the_agent_says_so_before(plain_host: LibvirtSite) -> None:
    assert NO_SEV in said_of(plain_host, plain_host.domain)
    plain_host.changes.append(("<features><acpi/></features>", ""))
    assert "UEFI requires ACPI" in said_of(plain_host, plain_host.domain)
    with pytest.raises(InvalidInput, match="<acpi/>"):
        check_domain("guests.web.domain", plain_host.domain)


def said_of(site: LibvirtSite, text: str) -> str:
    """What the daemon says to the start of a machine of this definition."""
    libvirt = load()
    with closing(libvirt.open(site.daemon.uri)) as connection, pytest.raises(libvirt.libvirtError) as failure:
        connection.createXML(whole(site, text), libvirt.VIR_DOMAIN_START_PAUSED | libvirt.VIR_DOMAIN_START_VALIDATE)
    return str(failure.value)


def whole(site: LibvirtSite, text: str, policy: int = 0x3701000F) -> str:
    """The XML of one launch."""
    options = MachineOptions(
        firmware=site.firmware, cbitpos=c_bit_of_this_machine(), reduced_phys_bits=1, policy=policy
    )
    return launch_xml(text, options, launch=uuid4(), godh=bytes(range(256)) * 8 + bytes(36), session=bytes(range(128)))


def test_the_daemon_keeps_of_a_launch_what_the_agent_wrote(sev_host: LibvirtSite) -> None:
    text = whole(sev_host, sev_host.domain)
    libvirt = load()
    with closing(libvirt.open(sev_host.daemon.uri)) as connection:
        kept = connection.defineXMLFlags(text, libvirt.VIR_DOMAIN_DEFINE_VALIDATE)
        try:
            wrote, told = ET.fromstring(text), ET.fromstring(kept.XMLDesc())  # noqa: S314 -- our own, and the daemon's
            for path in ("uuid", "os/loader", "os/kernel", "os/initrd", "os/cmdline", "vcpu", "cpu/model"):
                assert seen(told, path) == seen(wrote, path) != [], path
            assert security(told) == security(wrote)
        finally:
            kept.undefine()
        for wrong in (text.replace("<policy>0x3701000f", "<policy>lax"), text.replace("<dhCert>", "<dhcert>", 1)):
            with pytest.raises(libvirt.libvirtError):
                connection.defineXMLFlags(wrong, libvirt.VIR_DOMAIN_DEFINE_VALIDATE)


def seen(domain_of: ET.Element, path: str) -> list[tuple[dict[str, str], str | None]]:
    """Attributes and text of an element, without what libvirt adds of its own."""
    own = {"placement", "fallback"}
    found = domain_of.findall(path)
    return [({key: value for key, value in each.items() if key not in own}, each.text) for each in found]


def security(domain_of: ET.Element) -> dict[str, str | None]:
    [element] = domain_of.findall("launchSecurity")
    return {**dict(element.items()), **{child.tag: child.text for child in element}}


@pytest.mark.parametrize("kind", KINDS)
async def test_a_whole_launch_through_the_daemon_ends_with_a_guest_that_prints_the_secret(
    sev_host: LibvirtSite, kind: str
) -> None:
    site, policy = sev_host, KINDS[kind]
    shape = site.shape(policy)
    async with site.caller(site.start()) as call:
        chain = (await call("ExportChain", pb.ExportChainRequest())).platform.chain
        owner = Owner(pdh=SevCertificate.parse(chain[:2084]), policy=policy)
        assert (await call.start(owner)).state == pb.GUEST_LAUNCH_STATE_PAUSED
        assert site.domains() == [str(owner.launch_id)]
        measured = await call.measure(owner)
        assert not owner.accepts(measured, replace(shape, hashes=None))
        await call.inject(owner, owner.release(measured, shape))

        asked = pb.GetAttestationReportRequest(launch_id=str(owner.launch_id), nonce=NONCE)
        report = AttestationReport.parse((await call("GetAttestationReport", asked)).report)
        report.verify(SevCertificate.parse(chain[2084:4168]))
        assert (report.nonce, report.policy, report.digest) == (NONCE, policy, shape.digest())

        assert not site.printed.read_bytes()
        assert (await call.resume(owner)).state == pb.GUEST_LAUNCH_STATE_RESUMED
        await until(lambda: site.saw(owner))
        assert (await call.abort(owner)).state == pb.GUEST_LAUNCH_STATE_STOPPED


async def test_a_packet_with_one_bit_changed_is_the_firmwares_refusal_and_the_domain_is_ended(
    sev_host: LibvirtSite,
) -> None:
    async with sev_host.caller(sev_host.start()) as call:
        owner = Owner(pdh=await call.pdh())
        await call.start(owner)
        packet = owner.release(await call.measure(owner), sev_host.shape())
        changed = replace(packet, payload=bytes([packet.payload[0] ^ 1]) + packet.payload[1:])
        with pytest.raises(Refused) as refusal:
            await call.inject(owner, changed)
        assert refusal.value.reason is Reason.FIRMWARE_BAD_MEASUREMENT
        with pytest.raises(SevattestError):
            await call.resume(owner)
        await until(lambda: sev_host.domains() == [])
        assert not sev_host.printed.read_bytes()


async def test_a_session_under_another_policy_is_the_firmwares_refusal_in_the_daemons_words(
    sev_host: LibvirtSite,
) -> None:
    async with sev_host.caller(sev_host.start()) as call:
        owner = Owner(pdh=await call.pdh())
        with pytest.raises(Refused) as refusal:
            await call.start(owner, policy=0x3701000E)
        assert refusal.value.reason is Reason.FIRMWARE_BAD_MEASUREMENT
        assert (await call.get(owner)).state == pb.GUEST_LAUNCH_STATE_FAILED


async def test_an_agent_that_was_killed_finds_its_domain_again(sev_host: LibvirtSite) -> None:
    doomed = sev_host.start()
    async with sev_host.caller(doomed) as call:
        owner = Owner(pdh=await call.pdh())
        await call.start(owner)
    doomed.kill()
    assert sev_host.domains() == [str(owner.launch_id)]
    async with sev_host.caller(sev_host.start()) as call:
        assert (await call.whole(owner, sev_host.shape())).state == pb.GUEST_LAUNCH_STATE_RESUMED
        await until(lambda: sev_host.saw(owner))
        await call.abort(owner)


async def test_a_daemon_that_is_killed_and_comes_back_costs_a_repeated_question_and_no_launch(
    sev_host: LibvirtSite,
) -> None:
    async with sev_host.caller(sev_host.start()) as call:
        owner = Owner(pdh=await call.pdh())
        await call.start(owner)
        sev_host.daemon.kill()
        await until(lambda: serves(sev_host))
        launch = None
        for _ in range(3):
            with suppress(Unavailable, OutcomeUnknown):
                launch = await call.whole(owner, sev_host.shape())
                break
        assert launch is not None
        assert launch.state == pb.GUEST_LAUNCH_STATE_RESUMED
        await until(lambda: sev_host.saw(owner))
        await call.abort(owner)


def serves(site: LibvirtSite) -> bool:
    """Whether a daemon answers, and has the domain."""
    with suppress(load().libvirtError):
        return len(site.domains()) == 1
    return False


async def test_a_domain_that_somebody_destroys_is_noticed_and_not_mourned_for_ever(sev_host: LibvirtSite) -> None:
    async with sev_host.caller(sev_host.start()) as call:
        owner = Owner(pdh=await call.pdh())
        await call.start(owner)
        with closing(load().open(sev_host.daemon.uri)) as connection:
            connection.lookupByUUIDString(str(owner.launch_id)).destroy()
        stream = call.stub.WatchLaunches(pb.WatchLaunchesRequest(), timeout=30)
        while (await stream.read()).launch.state != pb.GUEST_LAUNCH_STATE_FAILED:
            pass
        stream.cancel()
