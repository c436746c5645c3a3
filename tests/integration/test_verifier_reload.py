"""What a reload promises once it is done: it holds for what is under way, and for chips that hide their id.

The composition root in this process, so that a test can stand between its steps.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.amd.kds import KeyService
from common.clock import SystemClock
from common.errors import NotFound, Reason
from common.rpc.client import call, open_channel
from common.rpc.identity import Role
from common.sev.certs.sev import SevCertificate
from common.telemetry.log import configure
from sevattest.v1 import verifier_admin_service_pb2 as admin_pb2
from sevattest.v1 import verifier_admin_service_pb2_grpc
from tests.integration.test_verifier_service import ask, begin, measured, refused, release
from tests.support.documents import revocation
from tests.support.store_rows import admin_request, audit, document
from tests.support.verifier_process import VerifierSite
from verifier.app import App, Surroundings
from verifier.store.rows import Outcome

_DEADLINE_S = 30.0
# The sweep looks after the documents, too: here it must not be what notices.
_KDS = '[kds]\nsource = "kds"\n[limits]\nsweep_interval = 3600\n'


@pytest.fixture
def site() -> Iterator[VerifierSite]:
    # Not tmp_path: a unix socket's path has at most 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="sevattest-l-"))
    made = VerifierSite.make(folder / "o", extra=_KDS, owners=True)
    kds = folder / "o" / "kds"
    kds.mkdir()
    (kds / f"{made.platform.chip_id.hex().upper()}.cert").write_bytes(made.platform.chain.cek.raw)
    yield made
    shutil.rmtree(folder, ignore_errors=True)


class SlowKeyService:
    """Knows the site's chip, and takes its time over it; knows no other."""

    def __init__(self, site: VerifierSite) -> None:
        self._platform = site.platform
        self.asked, self.open = asyncio.Event(), asyncio.Event()

    async def signed_cek(self, chip_id: bytes) -> SevCertificate:
        """See `KeyService`."""
        if chip_id != self._platform.chip_id:
            raise NotFound(Reason.NOT_FOUND, "no such chip")
        self.asked.set()
        async with asyncio.timeout(_DEADLINE_S):
            await self.open.wait()
        return self._platform.chain.cek


@asynccontextmanager
async def serving(site: VerifierSite, service: KeyService | None = None) -> AsyncIterator[tuple[App, Any, Any]]:
    """A verifier, its orchestrator's stub and its owner's."""
    app = App(site.config, configure("sev-verifier"), Surroundings(environ={}, clock=SystemClock(), random=os.urandom))
    if service is not None:
        app._service = service
    addresses = await app.start()
    assert addresses.admin is not None
    try:
        owner = open_channel(addresses.admin, site.pki.client_tls(Role.OWNER, "alice", server=Role.VERIFIER))
        async with site.channel(addresses.launches) as channel, owner:
            yield app, site.stub(channel), verifier_admin_service_pb2_grpc.VerifierAdminServiceStub(owner)
    finally:
        await app.stop()


def deny(site: VerifierSite, entry: str) -> None:
    """Put a chip on the configuration's deny-list."""
    text = site.config.read_text().replace("[platforms]\n", f'[platforms]\ndenied_chips = ["{entry}"]\n')
    site.config.write_text(text)


def revoke(site: VerifierSite, **spec: Any) -> None:
    """Put a revocation into the folder."""
    (site.folder / "documents" / "revoked.yaml").write_text(yaml.safe_dump(revocation(**spec)))


class Paused:
    """A release that stands between its judgement and its transaction."""

    def __init__(self, app: App, monkeypatch: pytest.MonkeyPatch) -> None:
        self._reached, self._go_on = asyncio.Event(), asyncio.Event()
        move = app._store.move

        async def paused(what: Any) -> Any:
            self._reached.set()
            await self._go_on.wait()
            return await move(what)

        monkeypatch.setattr(app._store, "move", paused)

    async def reached(self) -> None:
        async with asyncio.timeout(_DEADLINE_S):
            await self._reached.wait()

    def go_on(self) -> None:
        self._go_on.set()


@pytest.mark.parametrize("how", ["configuration", "folder", "configuration beside a bad folder"])
async def test_what_was_judged_before_a_reload_is_not_released_after_it(
    site: VerifierSite, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    fingerprint = site.platform.chain.cek.fingerprint.hex()
    async with serving(site) as (app, stub, _):
        begun = await ask(stub.BeginLaunch, begin(site))
        paused = Paused(app, monkeypatch)
        under_way = asyncio.create_task(refused(stub.ReleaseSecret, release(begun, measured(site, begun))))
        await paused.reached()
        if how == "folder":
            revoke(site, ceks=[fingerprint])
        else:
            deny(site, fingerprint)
        if "bad" in how:
            (site.folder / "documents" / "bad.yaml").write_text("kind: Nothing\n")
        await app.reload()
        paused.go_on()
        assert (await under_way).reason is Reason.CHIP_REVOKED


async def test_what_was_judged_before_a_reload_that_forbids_nothing_is_judged_again_and_released(
    site: VerifierSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(site) as (app, stub, _):
        begun = await ask(stub.BeginLaunch, begin(site))
        paused = Paused(app, monkeypatch)
        under_way = asyncio.create_task(ask(stub.ReleaseSecret, release(begun, measured(site, begun))))
        await paused.reached()
        await app.reload()
        paused.go_on()
        assert (await under_way).header


async def test_a_chip_that_the_configuration_denies_by_its_id_is_known_by_its_key_once_the_reload_is_done(
    site: VerifierSite,
) -> None:
    service = SlowKeyService(site)
    async with serving(site, service) as (app, stub, _):
        await ask(stub.BeginLaunch, begin(site))
        deny(site, site.platform.chip_id.hex())
        reloading = asyncio.create_task(app.reload())
        async with asyncio.timeout(_DEADLINE_S):
            await service.asked.wait()
        assert not reloading.done()
        service.open.set()
        await reloading
        assert (await refused(stub.BeginLaunch, begin(site))).reason is Reason.CHIP_REVOKED


async def test_a_chip_that_the_configuration_denies_by_its_id_is_known_by_its_key_from_the_first_call_on(
    site: VerifierSite,
) -> None:
    deny(site, site.platform.chip_id.hex())
    async with serving(site) as (app, _, _):
        assert app._denied.chips.why(site.platform.chain.cek.fingerprint.hex()) is not None


async def test_an_owner_who_hangs_up_while_chips_are_looked_up_leaves_none_of_them_unknown(
    site: VerifierSite,
) -> None:
    service = SlowKeyService(site)
    async with serving(site, service) as (app, stub, owner):
        # As if another replica had applied it: here the first look is a reader's, who may hang up.
        text = yaml.safe_dump(revocation(chips=[site.platform.chip_id.hex()], ceks=[])).encode()
        row = document("incident", text=text, kind="Revocation")
        assert (
            await app._store.apply_document(row, admin_request("ApplyDocument"), audit("document.applied"), app._seal)
            is Outcome.DONE
        )
        listing = admin_pb2.ListDocumentsRequest(kind=admin_pb2.DOCUMENT_KIND_REVOCATION)
        reading = asyncio.create_task(call(owner.ListDocuments, listing, timeout=20, mutating=False))
        async with asyncio.timeout(_DEADLINE_S):
            await service.asked.wait()
        reading.cancel()
        with suppress(asyncio.CancelledError):
            await reading
        service.open.set()
        assert (await refused(stub.BeginLaunch, begin(site))).reason is Reason.CHIP_REVOKED
