"""Somebody writes to the database past those who serve from it: nothing is released, and operators find out."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import yaml

from common.errors import Reason, SevattestError
from common.rpc import MAX_ADMIN_MESSAGE
from common.rpc.client import call, open_channel
from common.rpc.health import probe
from common.rpc.identity import Role
from sevattest.v1 import verifier_admin_service_pb2 as pb
from sevattest.v1 import verifier_admin_service_pb2_grpc
from tests.integration.test_verifier_service import ask, begin, measured, refused, release
from tests.support.documents import grant, revocation
from tests.support.postgres import Server
from tests.support.verifier_process import ServingVerifier, VerifierSite
from verifier.store.sqlite_file import FILE_NAME

pytestmark = pytest.mark.slow

MINE = grant("mine")  # for the caller `stranger`, whom no workload names
FAST = "[limits]\nsweep_interval = 1\n"


@pytest.fixture
def folder() -> Iterator[Path]:
    # Not tmp_path: a unix socket's path has at most 107 bytes.
    path = Path(tempfile.mkdtemp(prefix="sevattest-t-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@dataclass(kw_only=True)
class Place:
    """Where verifiers keep everything, and somebody who writes to it."""

    site: VerifierSite
    environ: dict[str, str]
    write: Callable[[str], None]
    blob: str  # bytes in a statement, from hex digits

    def serve(self, socket: str = "h.sock") -> ServingVerifier:
        return self.site.serve(environ={**self.environ, "SEVATTEST_HEALTH__SOCKET": socket})

    def command(self, *more: str) -> subprocess.CompletedProcess[str]:
        """`sev-verifier documents`."""
        words = [sys.executable, "-m", "verifier.cli", "documents", "--config", str(self.site.config), *more]
        environ = {**os.environ, **self.environ}
        return subprocess.run(words, capture_output=True, text=True, check=False, env=environ, timeout=60)

    def insert(self, content: dict[str, Any]) -> None:
        """Put a document in, past the verifier, and have everybody look at it."""
        metadata = content["metadata"]
        text = self.blob.format(yaml.safe_dump(content).encode().hex())
        place = f"'{content['kind']}', '{metadata['name']}', '{metadata['version']}'"
        self.write(f"INSERT INTO document VALUES ({place}, {text}, 0, 0)")  # noqa: S608 -- ours
        self.write("UPDATE mark SET value=value+1 WHERE name='revision'")

    async def ready(self, socket: str = "h.sock") -> bool:
        """Whether a process says that it is ready."""
        return await probe(self.site.folder / socket)

    @contextlib.asynccontextmanager
    async def sides(self, served: ServingVerifier, name: str = "stranger") -> AsyncIterator[tuple[Any, Any]]:
        """An orchestrator's stub and the owner's."""
        assert served.admin is not None
        tls = self.site.pki.client_tls(Role.OWNER, "alice", server=Role.VERIFIER)
        async with (
            self.site.channel(served.address, name=name) as channel,
            open_channel(served.admin, tls, message=MAX_ADMIN_MESSAGE) as owner,
        ):
            yield self.site.stub(channel), verifier_admin_service_pb2_grpc.VerifierAdminServiceStub(owner)


@pytest.fixture(params=["sqlite", "postgres"])
def place(request: pytest.FixtureRequest, folder: Path) -> Place:
    if request.param == "sqlite":
        site = VerifierSite.make(folder, owners=True, extra=FAST)

        def write(statement: str) -> None:
            with contextlib.closing(sqlite3.connect(folder / "state" / FILE_NAME, timeout=20)) as connection:
                assert connection.execute(statement).rowcount == 1
                connection.commit()

        return Place(site=site, environ={}, write=write, blob="x'{}'")
    server: Server = request.getfixturevalue("postgres_server")
    schema: str = request.getfixturevalue("postgres_schema")
    environ = {"SEVATTEST_STORE__SCHEMA": schema}
    return Place(
        site=VerifierSite.make(folder, dsn=server.dsn, owners=True, extra=FAST, environ=environ),
        environ=environ,
        write=lambda statement: _quietly(server.sql(f"SET search_path={schema}; {statement}")),
        blob="decode('{}', 'hex')",
    )


def _quietly(_printed: str) -> None:
    pass


async def apply(owner: Any, content: dict[str, Any]) -> None:
    await ask(owner.ApplyDocument, pb.ApplyDocumentRequest(request_id=str(uuid4()), text=yaml.safe_dump(content)))


async def listed(owner: Any) -> Any:
    request = pb.ListDocumentsRequest(kind=pb.DOCUMENT_KIND_GRANT)
    return await call(owner.ListDocuments, request, timeout=20, mutating=False)


async def is_told(owner: Any) -> bool:
    """Whether an owner who asks for documents is told that they are not sealed."""
    try:
        await listed(owner)
    except SevattestError as error:
        return error.reason is Reason.DOCUMENTS_NOT_SEALED and "sev-verifier documents" in error.message
    return False


async def turns(condition: Callable[[], Any]) -> None:
    """Return when a sweep has looked."""
    async with asyncio.timeout(30):
        while not await condition():  # noqa: ASYNC110 -- another process gives no event
            await asyncio.sleep(0.05)


async def test_a_grant_that_somebody_puts_in_releases_nothing_and_stops_everything_until_it_is_gone(
    place: Place,
) -> None:
    site = place.site
    with place.serve() as served:
        async with place.sides(served) as (stranger, owner), site.channel(served.address) as channel:
            stub = site.stub(channel)
            await apply(owner, revocation())
            kept = await ask(stub.BeginLaunch, begin(site))
            assert (await refused(stranger.BeginLaunch, begin(site))).reason is Reason.CALLER_NOT_ALLOWED
            assert await place.ready()
            place.insert(MINE)
            for method, request in (
                (stranger.BeginLaunch, begin(site)),
                (stub.BeginLaunch, begin(site)),
                (stub.ReleaseSecret, release(kept, measured(site, kept))),
            ):
                error = await refused(method, request)
                assert error.reason is Reason.DOCUMENTS_NOT_SEALED
            assert await is_told(owner)
            await turns(lambda: not_(place.ready()))
            said = await asyncio.to_thread(place.command)  # while it serves
    assert "documents.not_sealed" in (site.folder / "log").read_text()
    assert said.returncode == 1
    assert re.search(r"^Grant mine 1  [0-9a-f]{64}  NOT IN THE AUDIT LOG$", said.stdout, re.MULTILINE)
    assert re.search(r"^Revocation incident 1  [0-9a-f]{64}  as in the audit log$", said.stdout, re.MULTILINE)
    assert "not sealed: the seal is that of others" in said.stderr
    # It is served all the same, for its owners.
    with place.serve() as served:
        async with place.sides(served) as (stranger, owner):
            assert await is_told(owner)
            assert not await place.ready()
            assert (await refused(stranger.BeginLaunch, begin(site))).reason is Reason.DOCUMENTS_NOT_SEALED
            place.write("DELETE FROM document WHERE name='mine'")
            place.write("UPDATE mark SET value=value-1 WHERE name='revision'")
            await turns(place.ready)
            assert not await is_told(owner)
            assert (await refused(stranger.BeginLaunch, begin(site))).reason is Reason.CALLER_NOT_ALLOWED
            async with site.channel(served.address) as channel:
                assert (await ask(site.stub(channel).ReleaseSecret, release(kept, measured(site, kept)))).payload
    said = place.command()
    assert (said.returncode, said.stderr) == (0, "")


async def test_what_an_operator_has_looked_at_is_sealed_and_nothing_else(place: Place) -> None:
    site = place.site
    with place.serve() as served:
        async with place.sides(served) as (_, owner):
            await apply(owner, revocation())
            await apply(owner, grant())
    place.write("DELETE FROM document WHERE kind='Revocation'")
    looked = place.command()
    assert re.search(r"^Revocation incident 1  [0-9a-f]{64}  MISSING", looked.stdout, re.MULTILINE)
    digest = re.search(r"--seal ([0-9a-f]{64})$", looked.stderr, re.MULTILINE)
    assert digest is not None
    place.insert(MINE)
    other = place.command("--seal", digest[1])
    assert other.returncode == 1
    assert "are not those that were shown" in other.stderr
    assert place.command().returncode == 1
    place.write("DELETE FROM document WHERE name='mine'")
    place.write("UPDATE mark SET value=value-1 WHERE name='revision'")
    sealed = place.command("--seal", digest[1])
    assert sealed.returncode == 0
    assert re.fullmatch(r"sev-verifier: sealed: revision [0-9]+, 1 documents", sealed.stdout.splitlines()[-1])
    assert place.command("--seal", digest[1]).returncode == 0  # there is nothing to do
    with place.serve() as served:
        async with place.sides(served) as (stranger, owner):
            assert (await ask(stranger.BeginLaunch, begin(site))).session
            records = await call(owner.ListAuditRecords, pb.ListAuditRecordsRequest(), timeout=20, mutating=False)
            assert [each.event for each in records.records].count("documents.sealed") == 1
            await apply(owner, revocation("another"))


async def test_an_open_launch_that_somebody_gives_more_time_or_another_grant_is_not_released(place: Place) -> None:
    site = place.site
    with place.serve() as served:
        async with place.sides(served) as (stranger, owner):
            await apply(owner, grant())
            begun = await ask(stranger.BeginLaunch, begin(site))
            here = f"WHERE launch_id='{begun.launch.launch_id}'"
            request = release(begun, measured(site, begun))
            for change, undo in (
                ("expire_time=expire_time+1", "expire_time=expire_time-1"),
                ("grant_name=NULL", "grant_name='fleet'"),
                ("policy=policy+1", "policy=policy-1"),
            ):
                place.write(f"UPDATE launch SET {change} {here}")  # noqa: S608 -- ours
                error = await refused(stranger.ReleaseSecret, request)
                assert error.reason is Reason.LAUNCH_ALTERED
                place.write(f"UPDATE launch SET {undo} {here}")  # noqa: S608 -- ours
            assert (await ask(stranger.ReleaseSecret, request)).payload
    assert (site.folder / "log").read_text().count('"launch.altered"') == 3


@pytest.mark.parametrize("place", ["postgres"], indirect=True)
async def test_replicas_that_apply_in_turn_reload_and_restart_go_on_with_documents_that_are_sealed(
    place: Place,
) -> None:
    site = place.site
    with place.serve() as first:
        with place.serve("h2.sock") as second:
            async with place.sides(first) as (_, one), place.sides(second) as (stub, two):
                for number, owner in enumerate((one, two, one, two)):
                    await apply(owner, grant("fleet", str(number + 1)))
                    assert [len((await listed(each)).documents) for each in (one, two)] == [number + 1] * 2
                    for served in (first, second):
                        served.process.send_signal(signal.SIGHUP)
                begun = await ask(stub.BeginLaunch, begin(site))
        with place.serve("h2.sock") as second:
            async with place.sides(second) as (stub, two):
                assert (await ask(stub.ReleaseSecret, release(begun, measured(site, begun)))).payload
                await ask(
                    two.DeleteDocument,
                    pb.DeleteDocumentRequest(request_id=str(uuid4()), kind=pb.DOCUMENT_KIND_GRANT, name="fleet"),
                )
                assert await place.ready("h2.sock")
        async with place.sides(first) as (stub, _):
            assert (await refused(stub.BeginLaunch, begin(site))).reason is Reason.CALLER_NOT_ALLOWED
            assert await place.ready()
    said = place.command()
    assert (said.returncode, said.stdout.splitlines()[-1][:22]) == (0, "sev-verifier: sealed: ")


async def not_(question: Awaitable[bool]) -> bool:
    return not await question
