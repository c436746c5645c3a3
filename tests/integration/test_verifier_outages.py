"""What a verifier depends on goes away under it and comes back: refused with a reason, nothing lost, no restart needed.

Each test is one story: a launch is open, something breaks, begin and release are refused and the health socket says not
ready; it is mended, and by itself the verifier is ready, releases that very launch once and begins new ones.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from common.errors import Reason, SevattestError, Unavailable
from common.rpc.client import call
from common.rpc.health import probe
from common.telemetry.log import configure
from sevattest.v1 import verifier_service_pb2
from tests.integration.test_verifier_service import begin, measured, release
from tests.support.postgres import Server, start_server
from tests.support.postgres_relay import hasten, relay_to
from tests.support.private_disk import PrivateDisk, private_disk
from tests.support.rpc import SettableClock
from tests.support.softhsm import MISSING, SoftToken, make_token, softhsm_module
from tests.support.verifier_process import NotServing, ServingVerifier, VerifierSite
from verifier.app import App, Surroundings, real_surroundings

pytestmark = pytest.mark.slow

LIMITS = "[limits]\nsweep_interval = 1\n"
DISK_SIZE = 2 << 20
WITHIN_S = 40.0


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="sevattest-o-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


class Story:
    """A verifier with one open launch, whose dependencies a test breaks and mends."""

    def __init__(self, site: VerifierSite, stub: Any) -> None:
        self.site = site
        self.stub = stub
        self.begun: Any = None
        self.request: Any = None

    async def open(self) -> None:
        """Begin the launch, and measure it."""
        await self.is_ready()
        self.begun = await self.ask("BeginLaunch", begin(self.site))
        self.request = release(self.begun, measured(self.site, self.begun))

    async def ask(self, method: str, request: Any) -> Any:
        return await call(getattr(self.stub, method), request, timeout=20, mutating=True)

    async def refused(self, method: str, request: Any) -> SevattestError:
        with pytest.raises(SevattestError) as caught:
            await self.ask(method, request)
        return caught.value

    async def refuses(self, reason: Reason, words: str = "") -> None:
        """Begin and release are both refused for this reason, which the caller reads, and it says not ready."""
        for method, request in (("BeginLaunch", begin(self.site)), ("ReleaseSecret", self.request)):
            error = await self.refused(method, request)
            assert error.reason is reason, error
            assert words in error.message, error
            assert str(self.site.folder) not in error.message
        await self.is_ready(wanted=False)

    async def is_ready(self, *, wanted: bool = True, meanwhile: Callable[[], object] = lambda: None) -> None:
        """Return when the health socket says so."""
        async with asyncio.timeout(WITHIN_S):
            while await self._said() is not wanted:
                await asyncio.to_thread(meanwhile)
                await asyncio.sleep(0.05)

    async def _said(self) -> bool | None:
        """What the health socket says; None where it is too busy to."""
        with suppress(Unavailable):
            return await probe(self.site.folder / "h.sock")
        return None

    async def goes_on(self) -> None:
        """It is ready by itself, and nothing was lost: the launch that was open is released, once."""
        await self.is_ready()
        first = await self.ask("ReleaseSecret", self.request)
        assert first.payload
        assert await self.ask("ReleaseSecret", self.request) == first
        again = release(self.begun, measured(self.site, self.begun))
        assert (await self.refused("ReleaseSecret", again)).reason is Reason.ALREADY_RELEASED
        assert (await self.ask("BeginLaunch", begin(self.site))).godh

    async def is_open(self) -> None:
        """The launch is open, for whoever can still read."""
        shown = verifier_service_pb2.VerifierServiceGetLaunchRequest(launch_id=self.begun.launch.launch_id)
        state = (await self.ask("GetLaunch", shown)).launch.state
        assert state == verifier_service_pb2.LAUNCH_STATE_OPEN


@asynccontextmanager
async def told(site: VerifierSite, address: str) -> AsyncIterator[Story]:
    """The story of a serving verifier, with its launch open."""
    async with site.channel(address) as channel:
        story = Story(site, site.stub(channel))
        await story.open()
        yield story


# Disks.


def on_disk(site: VerifierSite, disk: PrivateDisk, **more: Any) -> ServingVerifier:
    """A verifier with its store on the disk, where only it sees it."""
    environ = {"SEVATTEST_STATE_DIR": str(disk.folder / "state")}
    words = [*disk.enter, sys.executable, "-m", "verifier.cli", "init", "--config", str(site.config)]
    # Refused where there is one already, and where nothing can be written.
    subprocess.run(words, env=os.environ | environ, capture_output=True, check=False)
    return site.serve(environ=environ, under=disk.enter, **more)


async def test_a_disk_that_is_full_and_then_read_only_loses_nothing(folder: Path) -> None:
    site = VerifierSite.make(folder, extra=LIMITS)
    with private_disk(folder / "disk", DISK_SIZE) as disk, on_disk(site, disk) as serving:
        async with told(site, serving.address) as story:
            # What the store frees while it tidies up is taken again, as on a disk that others fill.
            await story.is_ready(wanted=False, meanwhile=disk.fill)
            disk.fill()
            await story.refuses(Reason.STORE_UNAVAILABLE, "disk is full")
            disk.protect(disk.folder / "state")
            disk.make_room()
            await story.refuses(Reason.STORE_UNAVAILABLE, "readonly")
            await story.is_open()
            disk.unprotect(disk.folder / "state")
            await story.goes_on()


async def test_a_disk_that_is_full_serves_again_when_there_is_room(folder: Path) -> None:
    site = VerifierSite.make(folder, extra=LIMITS)
    with private_disk(folder / "disk", DISK_SIZE) as disk, on_disk(site, disk) as serving:
        async with told(site, serving.address) as story:
            await story.is_ready(wanted=False, meanwhile=disk.fill)
            disk.make_room()
            await story.goes_on()


async def test_a_verifier_on_a_read_only_disk_does_not_start_and_loses_nothing(folder: Path) -> None:
    site = VerifierSite.make(folder, extra=LIMITS)
    with private_disk(folder / "disk", DISK_SIZE) as disk:
        with on_disk(site, disk) as serving:
            async with told(site, serving.address) as story:
                begun, request = story.begun, story.request
        disk.protect(disk.folder / "state")
        with pytest.raises(NotServing, match=r"the store cannot .*[Rr]ead-only file system"):
            on_disk(site, disk)
        disk.unprotect(disk.folder / "state")
        with on_disk(site, disk) as serving:
            async with site.channel(serving.address) as channel:
                story = Story(site, site.stub(channel))
                story.begun, story.request = begun, request
                await story.goes_on()


# PostgreSQL.


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    yield from start_server()


@pytest.fixture
def database(server: Server) -> Iterator[str]:
    """The DSN of a database of the test's own, in a server that the tests of this module stop and start."""
    name = f"outage_{os.urandom(8).hex()}"
    server.sql(f"CREATE DATABASE {name}")
    yield server.dsn.replace("dbname=postgres", f"dbname={name}")
    server.sql(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.mark.parametrize("how", [signal.SIGQUIT, signal.SIGINT], ids=["as in a crash", "in peace"])
async def test_a_database_that_is_stopped_and_started_again_loses_nothing(
    folder: Path, server: Server, database: str, how: signal.Signals
) -> None:
    site = VerifierSite.make(folder, extra=LIMITS, dsn=database)
    with site.serve() as serving:
        async with told(site, serving.address) as story:
            await asyncio.to_thread(server.stop, how)
            try:
                await story.refuses(Reason.STORE_UNAVAILABLE, "the store cannot")
            finally:
                await asyncio.to_thread(server.start)
            await story.goes_on()


@pytest.mark.parametrize("reach", ["the sessions that are open", "new sessions, as after a failover"])
async def test_a_database_that_becomes_read_only_loses_nothing(
    folder: Path, server: Server, database: str, reach: str
) -> None:
    site = VerifierSite.make(folder, extra=LIMITS, dsn=database)
    name = database.partition("dbname=")[2].split()[0]

    def read_only(value: str) -> None:
        setting = f"SET default_transaction_read_only={value}"
        server.sql("SET default_transaction_read_only=off", f"ALTER DATABASE {name} {setting}")
        if "new" in reach:
            server.sql(f"SELECT count(pg_terminate_backend(pid, 10000)) FROM pg_stat_activity WHERE datname='{name}'")  # noqa: S608 -- the test's
        else:
            server.sql("SET default_transaction_read_only=off", f"ALTER SYSTEM {setting}")
            server.sql("SELECT pg_reload_conf()")

    with site.serve() as serving:
        async with told(site, serving.address) as story:
            read_only("on")
            await story.is_ready(wanted=False)
            await story.refuses(Reason.STORE_UNAVAILABLE, "the store cannot")
            read_only("off")
            await story.goes_on()


async def test_a_database_that_takes_sessions_and_answers_nothing_loses_nothing(
    folder: Path, server: Server, database: str
) -> None:
    socket = folder / "pg"
    socket.mkdir()
    reached = database.replace(str(server.folder), str(socket))
    site = VerifierSite.make(folder, extra=LIMITS, dsn=reached, init=False)
    async with relay_to(server.folder, socket) as relay:
        await asyncio.to_thread(site.init)
        app = App(site.config, configure("sev-verifier"), real_surroundings())
        try:
            async with told(site, (await app.start()).launches) as story:
                with pytest.MonkeyPatch.context() as patience:
                    relay.on_still = lambda: hasten(patience, app._store)
                    relay.stand_still()
                    await story.is_ready(wanted=False)
                    await story.refuses(Reason.STORE_UNAVAILABLE, "the server does not answer")
                    assert relay.cancels == 0
                relay.still = False
                await story.goes_on()
        finally:
            await app.stop()


# The clock.


def ahead() -> SettableClock:
    """A clock that can be set back without coming before the day on which the certificates were made."""
    return SettableClock(datetime.now(UTC) + timedelta(hours=2))


async def test_a_clock_that_is_set_back_an_hour_decides_nothing_until_it_is_right(folder: Path) -> None:
    site, clock = VerifierSite.make(folder, extra=LIMITS), ahead()
    world = Surroundings(environ={}, clock=clock, random=os.urandom)
    app = App(site.config, configure("sev-verifier"), world)
    try:
        async with told(site, (await app.start()).launches) as story:
            clock.advance(timedelta(hours=-1))
            await story.refuses(Reason.CLOCK_SKEW)
            await story.is_open()
            clock.advance(timedelta(hours=1))
            await story.goes_on()
    finally:
        await app.stop()


async def test_a_clock_that_is_a_little_behind_decides_as_if_no_time_had_passed(folder: Path) -> None:
    site, clock = VerifierSite.make(folder, extra=LIMITS), ahead()
    world = Surroundings(environ={}, clock=clock, random=os.urandom)
    app = App(site.config, configure("sev-verifier"), world)
    try:
        async with told(site, (await app.start()).launches) as story:
            clock.advance(timedelta(minutes=-9))
            await story.goes_on()
    finally:
        await app.stop()


# Keys.


@pytest.fixture
def token(folder: Path) -> SoftToken:
    module = softhsm_module()
    if module is None:
        pytest.skip(MISSING)
    return make_token(folder / "token", module, keep=1.0)


def site_with(token: SoftToken, folder: Path) -> VerifierSite:
    """A site whose key file only the token opens."""
    settings = token.settings
    table = f"""\
[pkcs11]
module = "{settings.module}"
token = "{settings.token}"
key = "{settings.key}"
pin_file = "{settings.pin_file}"
keep = {settings.keep}
"""
    site = VerifierSite.make(folder, extra=LIMITS + table)
    (folder / "kek.bin").unlink()
    made = run("keygen", str(folder / "kek.bin"), "--config", str(site.config), "--make-key", **token.environment)
    assert made.returncode == 0, made.stderr
    return site


async def test_a_token_that_is_pulled_stops_launches_until_it_is_back(folder: Path, token: SoftToken) -> None:
    site = await asyncio.to_thread(site_with, token, folder)
    with site.serve(environ=token.environment) as serving:
        async with told(site, serving.address) as story:
            token.pull()
            await story.is_ready(wanted=False)
            await story.refuses(Reason.KEY_UNAVAILABLE)
            await story.is_open()
            token.put_back()
            await story.goes_on()


def test_a_refused_pin_ends_a_start_with_a_code_that_nothing_else_has(folder: Path, token: SoftToken) -> None:
    site = site_with(token, folder)
    config = ("--config", str(site.config))
    token.pull()
    away = run("serve", *config, **token.environment)
    assert (away.returncode, away.stderr.splitlines()[-1]) == (3, "sev-verifier: the key token owner is not there")
    token.put_back()
    token.write_pin("another")
    for words in (("serve",), ("generated", "--launch", str(uuid4())), ("keygen", str(folder / "more.bin"))):
        refused = run(*words, *config, **token.environment)
        assert (refused.returncode, refused.stdout) == (5, "")
        assert refused.stderr.splitlines()[-1] == "sev-verifier: the key token owner refuses the PIN"


def run(*words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "verifier.cli", *words]
    return subprocess.run(
        command, env=os.environ | environ, capture_output=True, text=True, check=False, timeout=WITHIN_S
    )


async def logged(site: VerifierSite, event: str) -> dict[str, Any]:
    """The first log line of this event."""
    async with asyncio.timeout(WITHIN_S):
        while True:
            whole, _, _ = (site.folder / "log").read_text().rpartition("\n")  # the last line may be half written
            lines = [json.loads(line) for line in whole.splitlines() if line[:1] == "{"]
            found = [line for line in lines if line["event"] == event]
            if found:
                return dict(found[0])
            await asyncio.sleep(0.02)


def swap(path: Path) -> Callable[[], None]:
    """Put another key in place of the key file's; what puts it back."""
    good = path.read_bytes()
    path.write_bytes(os.urandom(32))

    def put_back() -> None:
        path.write_bytes(good)

    return put_back


async def test_a_key_file_that_is_swapped_while_serving_is_not_taken(folder: Path) -> None:
    site = VerifierSite.make(folder, extra=LIMITS)
    with site.serve() as serving:
        async with told(site, serving.address) as story:
            put_back = swap(folder / "kek.bin")
            serving.process.send_signal(signal.SIGHUP)
            refused = await logged(site, "keys.refused")
            assert "sealed under another key" in json.dumps(refused)
            await story.goes_on()
            put_back()
            serving.process.send_signal(signal.SIGHUP)
            await logged(site, "verifier.reloaded")


async def test_a_key_file_that_was_swapped_does_not_start_and_loses_nothing(folder: Path) -> None:
    site = VerifierSite.make(folder, extra=LIMITS)
    with site.serve() as serving:
        async with told(site, serving.address) as story:
            begun, request = story.begun, story.request
    put_back = swap(folder / "kek.bin")
    with pytest.raises(NotServing, match="sealed under another key"):
        site.serve()
    put_back()
    with site.serve() as serving:
        async with site.channel(serving.address) as channel:
            story = Story(site, site.stub(channel))
            story.begun, story.request = begun, request
            await story.goes_on()
