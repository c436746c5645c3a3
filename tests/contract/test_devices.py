"""One contract for every way to a SEV device: the socket, the ioctl, and the ioctl under `sevattest platform run`.

All three end at the software platform's firmware; the ioctl driver gets there over a fake kernel in this process, and
over the real system call in a process whose calls are intercepted (seccomp user notification; the test says so where
this host does not allow it).
"""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from common.errors import PlatformFailed, Reason, SevattestError, Unavailable, exit_code
from common.sev.abi import PlatformState, Status, Usage
from common.sev.certs.chain import PlatformChain
from common.sev.certs.oca import make_oca, sign_pek
from common.sev.certs.roots import named_root
from common.sev.certs.sev import SevCertificate, verify_signature
from common.sev.certs.verify import attach_cek, verify_platform
from common.sev.errors import UnsignedCek
from emulator import protocol
from emulator.device_client import Device as Connection
from emulator.driver import Driver
from emulator.keys import publish
from emulator.protocol import GuestRequest
from host_agent.devices import AdministeredDevice, open_administration
from host_agent.devices.dev_sev import DevSevDevice
from host_agent.devices.single_flight import SingleFlight
from tests.support.device_child import child_device
from tests.support.fake_kernel import FakeKernel
from tests.support.platform import SEVATTEST, running_platform
from tests.support.software_psp import make_psp

LIMIT = 60.0


@dataclass(frozen=True, kw_only=True)
class Site:
    """A device and what else is known of its platform.

    Attributes:
        device: what is tested.
        folder: the platform's: `kds/`, `ask_ark.cert`.
        guest: keeps a guest on the platform.
    """

    device: AdministeredDevice
    folder: Path
    guest: Callable[[], AbstractContextManager[object]]

    async def chain(self) -> PlatformChain:
        return PlatformChain.parse(await self.device.export_chain())


@contextmanager
def by_socket(folder: Path, *, initialise: bool) -> Iterator[Site]:
    with running_platform(folder, options=() if initialise else ("--no-init",)) as platform:
        device = open_administration(platform.socket, timeout=LIMIT)
        yield Site(device=device, folder=folder, guest=lambda: _guest(platform.socket))


@contextmanager
def by_fake_kernel(folder: Path, *, initialise: bool) -> Iterator[Site]:
    psp = make_psp(folder, "milan")
    publish(psp.chip, ask_ark=folder / "ask_ark.cert", kds=folder / "kds")
    driver = Driver(psp)
    if initialise:
        driver.init()
    node = folder / "sev"
    node.touch()
    device = DevSevDevice(node, timeout=LIMIT, ioctl=FakeKernel(driver).ioctl, flight=SingleFlight())

    @contextmanager
    def guest() -> Iterator[None]:
        handle = psp.launch_start(policy=0, shared=0, godh=None, session=b"")
        yield
        psp.decommission(handle)

    yield Site(device=device, folder=folder, guest=guest)


@contextmanager
def by_intercepted_kernel(folder: Path, *, initialise: bool) -> Iterator[Site]:
    with running_platform(folder, options=() if initialise else ("--no-init",)) as platform:
        words = [*SEVATTEST, "platform", "run", "--state", str(folder), "--"]
        tried = subprocess.run([*words, "true"], check=False, capture_output=True, text=True, timeout=LIMIT)
        if tried.returncode:
            pytest.skip(f"system calls cannot be intercepted here (seccomp user notification): {tried.stderr.strip()}")
        with child_device(words) as device:
            yield Site(device=device, folder=folder, guest=lambda: _guest(platform.socket))


WAYS = {"socket": by_socket, "dev_sev": by_fake_kernel, "platform run": by_intercepted_kernel}


@contextmanager
def _guest(socket: Path) -> Iterator[None]:
    with Connection(socket) as connection:
        connection.issue(GuestRequest.LAUNCH_START, protocol.LAUNCH_START.pack(0, 0, 0, 0))
        yield


async def _no_guests(site: Site) -> None:
    """Wait until the platform has noticed that a guest's connection is gone."""
    async with asyncio.timeout(LIMIT):
        while (await site.device.status()).guest_count:  # noqa: ASYNC110 -- another process gives no event
            await asyncio.sleep(0.01)


@pytest.fixture(params=WAYS)
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    with WAYS[request.param](tmp_path / "p", initialise=True) as site:
        yield site


@pytest.fixture(params=WAYS)
def uninitialised(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    with WAYS[request.param](tmp_path / "p", initialise=False) as site:
        yield site


async def test_the_status_is_the_platforms(site: Site) -> None:
    status = await site.device.status()
    assert str(status.firmware) == "1.55.24"
    assert (status.state, status.externally_owned, status.es_enabled) == (PlatformState.INIT, False, True)
    assert status.guest_count == 0
    with site.guest():
        status = await site.device.status()
    assert (status.state, status.guest_count) == (PlatformState.WORKING, 1)


async def test_chain_and_chip_id_lead_to_the_platforms_root_with_the_key_services_cek_only(site: Site) -> None:
    root = named_root((site.folder / "ask_ark.cert").read_bytes())
    chain = await site.chain()
    with pytest.raises(UnsignedCek):
        verify_platform(chain, [root])
    signed = site.folder / "kds" / f"{(await site.device.chip_id()).hex().upper()}.cert"
    verify_platform(attach_cek(chain, SevCertificate.parse(signed.read_bytes())), [root])


async def test_an_export_initialises_the_platform_and_a_look_does_not(uninitialised: Site) -> None:
    assert (await uninitialised.device.status()).state is PlatformState.UNINIT
    await uninitialised.device.chip_id()
    assert (await uninitialised.device.status()).state is PlatformState.UNINIT
    await uninitialised.chain()
    assert (await uninitialised.device.status()).state is PlatformState.INIT


async def test_an_owner_takes_the_platform_once_and_a_reset_gives_it_back(site: Site) -> None:
    before = await site.chain()
    oca, key = make_oca()
    csr = await site.device.pek_csr()
    assert csr[:1044] == before.pek.body
    assert not SevCertificate.parse(csr).is_signed
    await site.device.pek_cert_import(sign_pek(csr, key).raw, oca.raw)
    owned = await site.chain()
    assert (await site.device.status()).externally_owned
    assert owned.oca == oca
    assert owned.pek.body == before.pek.body
    assert owned.pdh.body != before.pdh.body
    for signer in (oca, owned.cek):
        verify_signature(owned.pek, signer)

    with pytest.raises(PlatformFailed) as refusal:
        await site.device.pek_cert_import(sign_pek(csr, key).raw, oca.raw)
    assert refusal.value.fields["fw_error"] == str(int(Status.ALREADY_OWNED))
    assert "sevattest reset" in refusal.value.fields["hint"]

    await site.device.factory_reset()
    assert (await site.device.status()).state is PlatformState.UNINIT
    after = await site.chain()
    assert not (await site.device.status()).externally_owned
    bodies = {chain.pek.body for chain in (before, after)} | {oca.body, after.oca.body}
    assert len(bodies) == 4, "a reset makes all keys anew"
    assert after.cek == before.cek, "but the chip's own"


async def test_a_new_pdh_is_under_the_same_pek_and_a_new_pek_under_a_new_oca(site: Site) -> None:
    first = await site.chain()
    await site.device.pdh_gen()
    second = await site.chain()
    assert second.pdh.body != first.pdh.body
    assert second.pek == first.pek
    await site.device.pek_gen()
    third = await site.chain()
    assert not {first.pek.body, first.oca.body, second.pdh.body} & {third.pek.body, third.oca.body, third.pdh.body}


@pytest.mark.parametrize("wrong", ["another owner's signature", "another platform's PEK", "a PDH", "cut off"])
async def test_what_no_owner_signed_for_this_platform_is_not_taken(site: Site, wrong: str) -> None:
    before = await site.chain()
    oca, key = make_oca()
    _, strange_key = make_oca()
    csr = await site.device.pek_csr()
    pek = sign_pek(csr, key).raw
    if wrong == "another owner's signature":
        pek = sign_pek(csr, strange_key).raw
    elif wrong == "another platform's PEK":
        await site.device.pek_gen()
        before = await site.chain()
    elif wrong == "a PDH":
        pek = before.pdh.raw
        assert before.pdh.usage is Usage.PDH
    else:
        pek = pek[:-1]
    with pytest.raises(SevattestError) as refusal:
        await site.device.pek_cert_import(pek, oca.raw)
    assert refusal.value.reason in {Reason.FIRMWARE_FAILED, Reason.FIRMWARE_BAD_SIGNATURE}
    assert await site.chain() == before
    assert not (await site.device.status()).externally_owned


async def test_a_platform_with_a_guest_is_not_reset_and_keeps_its_keys(site: Site) -> None:
    before = await site.chain()
    with site.guest():
        with pytest.raises(Unavailable) as busy:
            await site.device.factory_reset()
        assert (busy.value.fields["errno"], exit_code(busy.value)) == ("EBUSY", 3)
        assert "guests are running" in busy.value.fields["hint"]
        with pytest.raises(PlatformFailed) as refusal:
            await site.device.pek_gen()
        assert refusal.value.fields["fw_error"] == str(int(Status.INVALID_PLATFORM_STATE))
        assert await site.chain() == before
    await _no_guests(site)
    await site.device.factory_reset()
    assert (await site.chain()).pek != before.pek
