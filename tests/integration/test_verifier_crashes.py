"""kill -9 at every step of begin and release: a launch is released once, or never, and a repeat finds out which.

Over both stores, and with a grant whose ledger must be right after every crash; over SQLite also without one.
"""

from __future__ import annotations

import shutil
import signal
import sqlite3
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest

from common.errors import OutcomeUnknown, Reason, SevattestError
from sevattest.v1 import platform_pb2, verifier_service_pb2
from tests.integration.test_verifier_service import ask, begin, measured, release
from tests.support.chains import fresh_ca, make_platform
from tests.support.documents import grant, workload, write_document
from tests.support.postgres import Server
from tests.support.verifier_forks import Fork, Forks
from tests.support.verifier_process import VerifierSite
from verifier.store.rows import LedgerRow
from verifier.store.sqlite_file import FILE_NAME, connect_reader

pytestmark = pytest.mark.slow

# What is on file when the process is gone: whether the step's transaction was committed.
BEGIN_STEPS = {
    "begin:judged": False,
    "begin:keys-made": False,
    "open:before-commit": False,
    "open:after-commit": True,
    "begin:stored": True,
}
RELEASE_STEPS = {
    "release:judged": False,
    "release:packet-built": False,
    "move:before-commit": False,
    "move:after-commit": True,
    "release:stored": True,
}
REFUSE_STEPS = {"release:judged": False, "move:before-commit": False, "move:after-commit": True}
ABANDON_STEPS = {"abandon:judged": False, "move:before-commit": False, "move:after-commit": True}
EXPIRE_STEPS = {"move:before-commit": False, "move:after-commit": True}
RECORD_STEPS = {"record:before-commit": False, "record:after-commit": True}

GRANT = "spring"
CALLER = "spiffe://datacenter.example/orchestrator/cluster"
# Beyond the lifetime of a launch.
LATER_S = 700.0


@dataclass(kw_only=True)
class Place:
    """An owner's site, over one of the stores.

    Attributes:
        site: the site.
        forks: what starts its verifiers.
        dsn: of the database; None for SQLite.
        grant: whether launches spend one.
        ahead: seconds that its clocks are ahead of ours by now.
    """

    site: VerifierSite
    forks: Forks
    dsn: str | None
    grant: bool
    ahead: float = 0.0

    def serve(self, die_at: str | None = None) -> Fork:
        """A verifier."""
        return self.forks.serve(self.site, die_at=die_at, ahead=self.ahead)

    @asynccontextmanager
    async def reached(self, die_at: str | None = None) -> AsyncIterator[tuple[Fork, Any]]:
        """A verifier, and what its callers ask it by."""
        with self.serve(die_at) as fork:
            async with self.site.channel(fork.address) as channel:
                yield fork, self.site.stub(channel)

    def begin(self, **changes: Any) -> Any:
        """A request to begin."""
        return begin(self.site, **({"grant": GRANT} if self.grant else {}) | changes)

    def rows(self, sql: str) -> list[tuple[Any, ...]]:
        """What the store holds, asked beside the verifier or after it."""
        if self.dsn is None:
            with closing(connect_reader(self.site.folder / "state" / FILE_NAME)) as reader:
                return reader.execute(sql).fetchall()
        with psycopg.connect(self.dsn, autocommit=True, options="-c search_path=sevattest") as connection:
            return connection.execute(sql.encode()).fetchall()

    def ledger(self) -> LedgerRow:
        """The grant's; all zero without one."""
        found = self.rows(f"SELECT open, released, refused FROM ledger WHERE grant_name='{GRANT}'")  # noqa: S608 -- a constant
        return LedgerRow(**dict(zip(("open", "released", "refused"), found[0], strict=True))) if found else LedgerRow()

    def events(self) -> Counter[str]:
        """How often each event is on record."""
        return Counter(event for (event,) in self.rows("SELECT event FROM audit"))


@dataclass(kw_only=True)
class Before:
    """What was on file before a test, and what came to it."""

    place: Place
    ledger: LedgerRow
    events: Counter[str]

    def came(self, *, still_open: int = 0, **events: int) -> None:
        """Exactly these events were recorded, and the ledger moved by as much; without a grant no ledger moved."""
        now, was = self.place.ledger(), self.ledger
        moved = (now.open - was.open, now.released - was.released, now.refused - was.refused)
        due = (still_open, events.get("released", 0), events.get("refused", 0))
        assert moved == (due if self.place.grant else (0, 0, 0))
        recorded = Counter({f"launch.{name}": count for name, count in events.items() if count})
        assert self.place.events() - self.events == recorded


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    made = Forks()
    yield made
    made.close()


@pytest.fixture(scope="module", params=["sqlite", "postgres", "sqlite, without a grant"])
def place(request: pytest.FixtureRequest, forks: Forks) -> Iterator[Place]:
    dsn, database, server = None, f"crashes_{uuid4().hex}", None
    if request.param == "postgres":
        server = request.getfixturevalue("postgres_server")
        assert isinstance(server, Server)
        server.sql(f"CREATE DATABASE {database}")
        dsn = server.dsn.replace("dbname=postgres", f"dbname={database}")
    granted = "without" not in request.param
    folder = Path(tempfile.mkdtemp(prefix="sevattest-c-"))
    site = VerifierSite.make(folder, content=workload(callers=None if granted else [CALLER]), dsn=dsn)
    if granted:
        spring = grant(GRANT, callers=[CALLER], launches=1000, at_once=3)
        write_document(folder / "documents", spring, "grant.yaml")
    made = Place(site=site, forks=forks, dsn=dsn, grant=granted)
    with made.serve():
        pass
    yield made
    shutil.rmtree(folder, ignore_errors=True)
    if server is not None:
        server.sql(f"DROP DATABASE {database} WITH (FORCE)")


@pytest.fixture
def before(place: Place) -> Before:
    return Before(place=place, ledger=place.ledger(), events=place.events())


async def refused(method: Any, request: Any) -> Reason:
    with pytest.raises(SevattestError) as caught:
        await ask(method, request)
    return caught.value.reason


async def killed(dying: Fork, method: Any, request: Any) -> None:
    """The request kills the verifier, and its caller cannot know what became of it."""
    with pytest.raises(OutcomeUnknown):
        await ask(method, request)
    assert await dying.wait_dead() == -signal.SIGKILL


@pytest.mark.parametrize("step", BEGIN_STEPS)
async def test_a_begin_that_was_killed_is_one_launch_after_its_repeat(place: Place, before: Before, step: str) -> None:
    site, request = place.site, place.begin()
    async with place.reached(step) as (dying, stub):
        await killed(dying, stub.BeginLaunch, request)
    before.came(still_open=BEGIN_STEPS[step], begun=BEGIN_STEPS[step])
    async with place.reached() as (_, stub):
        begun = await ask(stub.BeginLaunch, request)
        before.came(still_open=1, begun=1)
        assert (await ask(stub.ReleaseSecret, release(begun, measured(site, begun)))).payload
    before.came(released=1, begun=1)


@pytest.mark.parametrize("step", RELEASE_STEPS)
async def test_a_release_that_was_killed_is_one_packet_after_its_repeat(
    place: Place, before: Before, step: str
) -> None:
    site, done = place.site, RELEASE_STEPS[step]
    async with place.reached(step) as (dying, stub):
        begun = await ask(stub.BeginLaunch, place.begin())
        request = release(begun, measured(site, begun))
        await killed(dying, stub.ReleaseSecret, request)
    before.came(still_open=not done, released=done, begun=1)
    shown_at = verifier_service_pb2.VerifierServiceGetLaunchRequest(launch_id=begun.launch.launch_id)
    async with place.reached() as (_, stub):
        shown = await ask(stub.GetLaunch, shown_at)
        assert (shown.launch.state == verifier_service_pb2.LAUNCH_STATE_RELEASED) is done
        first = await ask(stub.ReleaseSecret, request)
        assert await ask(stub.ReleaseSecret, request) == first
        second_start = release(begun, measured(site, begun))
        assert await refused(stub.ReleaseSecret, second_start) is Reason.ALREADY_RELEASED
    before.came(released=1, begun=1)


@pytest.mark.parametrize("step", REFUSE_STEPS)
async def test_a_refusal_that_was_killed_releases_nothing_after_its_repeat(
    place: Place, before: Before, step: str
) -> None:
    site, done = place.site, REFUSE_STEPS[step]
    async with place.reached(step) as (dying, stub):
        begun = await ask(stub.BeginLaunch, place.begin())
        # Of a guest that was started without the session, which is explained before all else.
        request = release(begun, measured(site, begun, tik=bytes(16)))
        await killed(dying, stub.ReleaseSecret, request)
    before.came(still_open=not done, refused=done, begun=1)
    async with place.reached() as (_, stub):
        assert await refused(stub.ReleaseSecret, request) is Reason.MEASUREMENT_REFUSED
        good = release(begun, measured(site, begun))
        assert await refused(stub.ReleaseSecret, good) is Reason.LAUNCH_REFUSED
    before.came(refused=1, begun=1)


@pytest.mark.parametrize("step", ABANDON_STEPS)
async def test_giving_up_that_was_killed_returns_one_reservation_after_its_repeat(
    place: Place, before: Before, step: str
) -> None:
    site, done = place.site, ABANDON_STEPS[step]
    async with place.reached(step) as (dying, stub):
        begun = await ask(stub.BeginLaunch, place.begin())
        request = verifier_service_pb2.AbandonLaunchRequest(request_id=str(uuid4()), launch_id=begun.launch.launch_id)
        await killed(dying, stub.AbandonLaunch, request)
    before.came(still_open=not done, abandoned=done, begun=1)
    async with place.reached() as (_, stub):
        shown = await ask(stub.AbandonLaunch, request)
        assert shown.launch.state == verifier_service_pb2.LAUNCH_STATE_ABANDONED
        good = release(begun, measured(site, begun))
        assert await refused(stub.ReleaseSecret, good) is Reason.LAUNCH_ABANDONED
    before.came(abandoned=1, begun=1)


@pytest.mark.parametrize("step", EXPIRE_STEPS)
async def test_expiry_that_was_killed_returns_one_reservation_at_the_next_start(
    place: Place, before: Before, step: str
) -> None:
    site, done = place.site, EXPIRE_STEPS[step]
    async with place.reached() as (_, stub):
        begun = await ask(stub.BeginLaunch, place.begin())
    before.came(still_open=1, begun=1)
    place.ahead += LATER_S
    with place.serve(step) as dying:
        assert await dying.wait_dead() == -signal.SIGKILL
    before.came(still_open=not done, expired=done, begun=1)
    async with place.reached() as (_, stub):
        late = release(begun, measured(site, begun))
        assert await refused(stub.ReleaseSecret, late) is Reason.LAUNCH_EXPIRED
    before.came(expired=1, begun=1)


@pytest.mark.parametrize("step", RECORD_STEPS)
async def test_a_refused_begin_that_was_killed_is_refused_after_its_repeat(
    place: Place, before: Before, step: str
) -> None:
    done = RECORD_STEPS[step]
    forged = make_platform(ca=fresh_ca()).chain.to_bytes()
    request = place.begin(platform=platform_pb2.PlatformEvidence(chain=forged))
    async with place.reached(step) as (dying, stub):
        await killed(dying, stub.BeginLaunch, request)
    before.came(begin_refused=done)
    async with place.reached() as (_, stub):
        assert await refused(stub.BeginLaunch, request) is Reason.UNTRUSTED_ROOT
    before.came(begin_refused=1 + done)


async def test_what_a_killed_process_left_unsaid_spends_no_more_than_the_grant_has(
    place: Place, before: Before
) -> None:
    """Three launches at once: killed at the commit of each, and only without a grant there is a fourth."""
    site, requests = place.site, [place.begin() for _ in range(3)]
    for request in requests:
        async with place.reached("open:after-commit") as (dying, stub):
            await killed(dying, stub.BeginLaunch, request)
    async with place.reached() as (_, stub):
        fourth = place.begin()
        if place.grant:
            assert await refused(stub.BeginLaunch, fourth) is Reason.GRANT_BUSY
        else:
            requests.append(fourth)
        for request in requests:
            begun = await ask(stub.BeginLaunch, request)
            await ask(stub.ReleaseSecret, release(begun, measured(site, begun)))
    before.came(released=len(requests), begun=len(requests))


def test_the_store_is_asked_as_it_is(place: Place) -> None:
    """What reads the store beside the verifier sees no rows that are not there."""
    with pytest.raises((sqlite3.Error, psycopg.Error)):
        place.rows("SELECT 1 FROM nowhere")
