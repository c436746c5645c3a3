"""Two verifiers over one PostgreSQL: what is mixed, replayed or taken back is refused by the one that did not see it.

The host's half is the emulator's code; the same ways over a real agent and platform are in `test_hostile_flows.py`.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import grpc
import pytest
import yaml

from common.errors import Reason
from common.rpc import MAX_ADMIN_MESSAGE
from common.rpc.client import call, open_channel
from common.rpc.identity import Role
from sevattest.v1 import platform_pb2, reason_pb2, verifier_admin_service_pb2_grpc, verifier_service_pb2
from sevattest.v1 import verifier_admin_service_pb2 as admin_pb2
from tests.integration.test_verifier_service import ask, begin, measured, refused, release
from tests.support.chains import make_platform
from tests.support.documents import grant, revocation
from tests.support.postgres import Server
from tests.support.verifier_process import VerifierSite

pytestmark = pytest.mark.slow


@pytest.fixture
def folder() -> Iterator[Path]:
    # Not tmp_path: a unix socket's path has at most 107 bytes.
    path = Path(tempfile.mkdtemp(prefix="sevattest-r-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@dataclass(kw_only=True)
class Replicas:
    """Two verifiers, and their owner.

    Attributes:
        site: what both are configured by; they keep everything in one schema.
        first: the first one's orchestrators' stub.
        second: the second one's.
        address: the second one's.
        owner: the first one's owner's stub: the second is told nothing by anybody.
    """

    site: VerifierSite
    first: Any
    second: Any
    address: str
    owner: Any

    async def apply(self, content: dict[str, Any]) -> None:
        """Put a document into force."""
        request = admin_pb2.ApplyDocumentRequest(request_id=str(uuid4()), text=yaml.safe_dump(content))
        await ask(self.owner.ApplyDocument, request)

    async def delete(self, kind: Any, name: str) -> None:
        """Take a document back."""
        request = admin_pb2.DeleteDocumentRequest(request_id=str(uuid4()), kind=kind, name=name)
        await ask(self.owner.DeleteDocument, request)

    async def log(self, launch_id: str) -> list[tuple[str, str]]:
        """Events and reasons of a launch, as the owner reads them."""
        request = admin_pb2.ListAuditRecordsRequest(launch_id=launch_id, page_size=100)
        page = await call(self.owner.ListAuditRecords, request, timeout=20, mutating=False)
        return [(each.event, _word(each.reason)) for each in page.records]


def _word(reason: Any) -> str:
    return "" if not reason else reason_pb2.Reason.Name(reason).removeprefix("REASON_")


@pytest.fixture
async def replicas(folder: Path, postgres_server: Server, postgres_schema: str) -> AsyncIterator[Replicas]:
    # The sweep looks after the documents, too: here it must not be what notices.
    extra = '[kds]\nsource = "kds"\n[limits]\nsweep_interval = 3600\n'
    environ = {"SEVATTEST_STORE__SCHEMA": postgres_schema}
    site = VerifierSite.make(folder, dsn=postgres_server.dsn, owners=True, extra=extra, environ=environ)
    (folder / "kds").mkdir()
    async with AsyncExitStack() as stack:
        first = stack.enter_context(site.serve(environ=environ))
        second = stack.enter_context(site.serve(environ={**environ, "SEVATTEST_HEALTH__SOCKET": "h2.sock"}))
        assert first.admin is not None
        tls = site.pki.client_tls(Role.OWNER, "alice", server=Role.VERIFIER)
        owner = await stack.enter_async_context(open_channel(first.admin, tls, message=MAX_ADMIN_MESSAGE))
        channels: list[grpc.aio.Channel] = [
            await stack.enter_async_context(site.channel(each.address)) for each in (first, second)
        ]
        yield Replicas(
            site=site,
            first=site.stub(channels[0]),
            second=site.stub(channels[1]),
            address=second.address,
            owner=verifier_admin_service_pb2_grpc.VerifierAdminServiceStub(owner),
        )


async def test_a_launch_begun_at_one_is_released_once_at_either(replicas: Replicas) -> None:
    site = replicas.site
    begun = await ask(replicas.first.BeginLaunch, begin(site))
    request = release(begun, measured(site, begun))
    packet = await ask(replicas.second.ReleaseSecret, request)
    assert await ask(replicas.first.ReleaseSecret, request) == packet
    for stub in (replicas.first, replicas.second):
        other = await refused(stub.ReleaseSecret, release(begun, request.measurement))
        assert other.reason is Reason.ALREADY_RELEASED
    assert await replicas.log(begun.launch.launch_id) == [("launch.begun", ""), ("launch.released", "")]


async def test_another_launchs_measurement_is_refused_by_the_replica_that_saw_neither(replicas: Replicas) -> None:
    site = replicas.site
    a = await ask(replicas.first.BeginLaunch, begin(site))
    b = await ask(replicas.first.BeginLaunch, begin(site))
    of_a, of_b = measured(site, a), measured(site, b)
    mixed = await refused(replicas.second.ReleaseSecret, release(b, of_a))
    assert mixed.reason is Reason.MEASUREMENT_REFUSED
    spent = await refused(replicas.first.ReleaseSecret, release(b, of_b))
    assert spent.reason is Reason.LAUNCH_REFUSED
    assert (await ask(replicas.second.ReleaseSecret, release(a, of_a))).payload
    assert await replicas.log(b.launch.launch_id) == [("launch.begun", ""), ("launch.refused", "MEASUREMENT_REFUSED")]


async def test_a_request_id_is_spent_for_both(replicas: Replicas) -> None:
    site = replicas.site
    request = begin(site)
    a = await ask(replicas.first.BeginLaunch, request)
    assert await ask(replicas.second.BeginLaunch, request) == a
    other = platform_pb2.PlatformEvidence(chain=make_platform().chain.to_bytes())
    swapped = await refused(replicas.second.BeginLaunch, begin(site, request_id=request.request_id, platform=other))
    assert swapped.reason is Reason.REQUEST_ID_REUSED
    b = await ask(replicas.second.BeginLaunch, begin(site))
    first = release(a, measured(site, a))
    await ask(replicas.first.ReleaseSecret, first)
    mixed = await refused(replicas.second.ReleaseSecret, release(b, measured(site, b), request_id=first.request_id))
    assert mixed.reason is Reason.REQUEST_ID_REUSED
    assert (await ask(replicas.second.ReleaseSecret, release(b, measured(site, b)))).payload


async def test_what_is_abandoned_at_one_is_released_at_none(replicas: Replicas) -> None:
    begun = await ask(replicas.first.BeginLaunch, begin(replicas.site))
    gone = verifier_service_pb2.AbandonLaunchRequest(request_id=str(uuid4()), launch_id=begun.launch.launch_id)
    await ask(replicas.first.AbandonLaunch, gone)
    late = await refused(replicas.second.ReleaseSecret, release(begun, measured(replicas.site, begun)))
    assert late.reason is Reason.LAUNCH_ABANDONED
    assert await replicas.log(begun.launch.launch_id) == [("launch.begun", ""), ("launch.abandoned", "")]


async def test_a_grant_taken_back_at_one_stops_what_was_begun_at_the_other(replicas: Replicas) -> None:
    site = replicas.site
    async with site.channel(replicas.address, name="stranger") as channel:
        stub = site.stub(channel)
        assert (await refused(stub.BeginLaunch, begin(site))).reason is Reason.CALLER_NOT_ALLOWED
        await replicas.apply(grant())
        begun = await ask(stub.BeginLaunch, begin(site))
        kept = await ask(stub.BeginLaunch, begin(site))
        assert (await ask(stub.ReleaseSecret, release(kept, measured(site, kept)))).payload
        await replicas.apply(grant("fleet", "2", suspended=True))
        stopped = await refused(stub.ReleaseSecret, release(begun, measured(site, begun)))
        assert stopped.reason is Reason.GRANT_SUSPENDED


async def test_a_chip_revoked_by_its_id_counts_at_both_at_once_for_a_host_that_leaves_the_id_out(
    replicas: Replicas,
) -> None:
    site = replicas.site
    chip_id, other = site.platform.chip_id.hex(), make_platform()
    for platform in (site.platform, other):
        file = site.folder / "kds" / f"{platform.chip_id.hex().upper()}.cert"
        file.write_bytes(platform.chain.cek.raw)
    begun = [await ask(replicas.second.BeginLaunch, begin(site)) for _ in range(2)]
    await replicas.apply(revocation("sold", ceks=None, chips=[other.chip_id.hex()]))
    assert (await ask(replicas.second.ReleaseSecret, release(begun[0], measured(site, begun[0])))).payload
    await replicas.apply(revocation("stolen", ceks=None, chips=[chip_id]))
    # No wait: the document is in force once the key behind the id is known.
    late = await refused(replicas.second.ReleaseSecret, release(begun[1], measured(site, begun[1])))
    assert late.reason is Reason.CHIP_REVOKED
    for stub in (replicas.first, replicas.second):
        assert (await refused(stub.BeginLaunch, begin(site))).reason is Reason.CHIP_REVOKED
    await replicas.delete(admin_pb2.DOCUMENT_KIND_REVOCATION, "stolen")
    for stub in (replicas.second, replicas.first):
        assert (await ask(stub.BeginLaunch, begin(site))).session
