"""Both services' metrics, read over HTTP from real processes: the figures add up, and who may not read does not."""

from __future__ import annotations

import asyncio
import json
import shutil
import ssl
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from uuid import uuid4

import grpc
import pytest

from common.errors import PlatformFailed, Reason, WrongState
from common.rpc.authz import METHODS
from common.rpc.client import open_channel
from common.rpc.identity import Role
from host_agent import metrics as agent_metrics
from host_agent.devices import DEFAULT_PATH
from host_agent.launches.state import LaunchState
from sevattest.v1 import reason_pb2, verifier_service_pb2
from tests.integration.test_verifier_service import ask, begin, measured, refused, release
from tests.support.agent_site import Owner, Site
from tests.support.documents import STRANGER, grant, workload, write_document
from tests.support.eventually import until
from tests.support.metrics import Page, client_context, scrape, silent, where
from tests.support.spellings import leaks
from tests.support.verifier_process import NotServing, ServingVerifier, VerifierSite
from verifier import metrics as verifier_metrics

pytestmark = pytest.mark.slow

METRICS = '[metrics]\nlisten = "127.0.0.1:0"\n[limits]\nsweep_interval = 1\n[audit]\ncheckpoint_records = 1\n'
RECORDS, REFUSALS = "sevattest_audit_records_total", "sevattest_audit_refusals_total"
CALLS, ERRORS = "sevattest_rpc_seconds_count", "sevattest_rpc_errors_total"
VERIFIER = "/sevattest.v1.VerifierService"


@pytest.fixture
def folder() -> Iterator[Path]:
    # Not tmp_path: a unix socket's path has at most 107 bytes.
    path = Path(tempfile.mkdtemp(prefix="sevattest-v-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


def logged(log: Path, event: str) -> list[dict[str, Any]]:
    """The lines of an event."""
    whole, _, _ = log.read_text().rpartition("\n")  # the last line may be half written
    lines = [json.loads(line) for line in whole.splitlines() if line.startswith("{")]
    return [line for line in lines if line["event"] == event]


def calls_in(log: Path) -> Counter[tuple[str, str]]:
    """How many calls the log tells of, by method and outcome."""
    return Counter((line["method"], line["outcome"]) for line in logged(log, "rpc"))


def calls_on(page: Page) -> Counter[tuple[str, str]]:
    """How many the page tells of."""
    pairs = [(method, code) for method in page.values("method") for code in page.values("code")]
    return Counter({pair: int(page.of(CALLS, method=pair[0], code=pair[1])) for pair in pairs}) + Counter()


async def invent(channel: grpc.aio.Channel, count: int) -> None:
    """Call methods that nobody has ever heard of."""
    for number in range(count):
        method: Any = channel.unary_unary(f"{VERIFIER}/Invented{number}")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await method(b"", timeout=20)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_verifiers_figures_add_up(folder: Path) -> None:
    site = VerifierSite.make(folder, extra=METRICS, owners=True)
    write_document(folder / "documents", workload("brief", lifetime="10s"), "brief.yaml")
    log = folder / "log"
    with site.serve() as serving:
        at = where(log)
        async with site.channel(serving.address) as channel, site.channel(serving.address, name="stranger") as other:
            stub = site.stub(channel)
            expiring = await ask(stub.BeginLaunch, begin(site, workload="brief"))
            begun = await ask(stub.BeginLaunch, begin(site))
            await ask(stub.ReleaseSecret, release(begun, measured(site, begun)))
            wrong = await ask(stub.BeginLaunch, begin(site))
            await refused(stub.ReleaseSecret, release(wrong, measured(site, wrong, bytes(32))))
            gone = await ask(stub.BeginLaunch, begin(site))
            await ask(
                stub.AbandonLaunch,
                verifier_service_pb2.AbandonLaunchRequest(
                    request_id=str(uuid4()), launch_id=gone.launch.launch_id, reason=reason_pb2.REASON_GUEST_GONE
                ),
            )
            still = await ask(stub.BeginLaunch, begin(site))
            await refused(site.stub(other).BeginLaunch, begin(site))
            await refused(stub.ReleaseSecret, release(begun, bytes(48), launch_id=str(uuid4())))
            await invent(channel, 5)
        await until(lambda: logged(log, "launch.expired"))
        page = await settled(at, records=10)
    events = {
        "launch.begun": 5,
        "launch.begin_refused": 1,
        "launch.released": 1,
        "launch.refused": 1,
        "launch.abandoned": 1,
        "launch.expired": 1,
    }
    assert {event: page.of(RECORDS, event=event) for event in events} == events
    assert page.of(RECORDS) == sum(events.values())
    assert page.of(REFUSALS, event="launch.refused", reason="MEASUREMENT_REFUSED") == 1
    assert page.of(REFUSALS, event="launch.begin_refused", reason="CALLER_NOT_ALLOWED") == 1
    assert page.of(REFUSALS) == 2
    assert page.of("sevattest_open_launches") == 1
    # Calls: what the page tells is what the log tells.
    assert calls_on(page) == calls_in(log)
    assert page.of(ERRORS, method=f"{VERIFIER}/ReleaseSecret", reason="MEASUREMENT_REFUSED") == 1
    assert page.of(ERRORS, method=f"{VERIFIER}/ReleaseSecret", reason="NOT_FOUND") == 1
    assert page.of(ERRORS) == sum("reason" in line for line in logged(log, "rpc"))
    assert page.of("sevattest_rpc_under_way") == 0
    # What a peer invents does not grow the page.
    assert page.of(CALLS, method="unknown", code="UNIMPLEMENTED") == 5
    assert page.values("method") <= {*METHODS, "unknown"}
    # State.
    assert page.of("sevattest_audit_number") == page.of("sevattest_audit_signed_number") == sum(events.values())
    ready = {(each["callers"], each["cause"]): value for each, value in page.samples("sevattest_ready")}
    causes = ("starting", "certificate", "store", "clock", "keys", "audit", "documents")
    assert ready == {(callers, cause): 1 for callers in ("orchestrator", "owner") for cause in causes}
    ends = [line["certificate_ends"] for line in logged(log, "rpc.listening")]
    assert len(ends) == len(page.samples("sevattest_certificate_not_after_seconds")) == 2
    # Names: those of the module, and no other; and nothing of anybody.
    assert page.families() == {each.name: each.kind for each in verifier_metrics.METRICS}
    chain = site.platform.chain
    for launch in (expiring, begun, wrong, gone, still):
        assert launch.launch.launch_id not in page.text
        assert launch.launch.platform.fingerprint not in page.text
    for word in ("web", "brief", "cluster", "stranger", "spiffe", "127.0.0.1", chain.cek.fingerprint.hex(), "chip"):
        assert word not in page.text, word


async def settled(at: str, *, records: int) -> Page:
    """The page once the sweep has seen so many records and signed them, and the store was looked at since."""
    while True:
        page = await scrape(at)
        if page.of("sevattest_audit_signed_number") >= records and page.of("sevattest_open_launches") == 1:
            return page


async def test_a_launch_without_authority_is_counted_with_its_reason(folder: Path) -> None:
    site = VerifierSite.make(folder, extra=METRICS, content=workload(callers=[]))
    write_document(folder / "documents", grant(at_once=1), "grant.yaml")
    with site.serve() as serving:
        name = STRANGER.rpartition("/")[2]
        async with site.channel(serving.address, name=name) as channel, site.channel(serving.address) as other:
            stub = site.stub(channel)
            await ask(stub.BeginLaunch, begin(site))
            busy = await refused(stub.BeginLaunch, begin(site))
            none = await refused(site.stub(other).BeginLaunch, begin(site))
        async with asyncio.timeout(30):
            # A call is counted when its answer is on the way.
            while (page := await scrape(where(folder / "log"))).of(ERRORS) < 2:
                pass
    assert (busy.reason, none.reason) == ("GRANT_BUSY", "GRANT_REQUIRED")
    method = f"{VERIFIER}/BeginLaunch"
    assert page.of(ERRORS, method=method, reason="GRANT_BUSY") == 1
    assert page.of(ERRORS, method=method, reason="GRANT_REQUIRED") == 1
    # A refusal that passes by itself has no record.
    assert page.of(REFUSALS, reason="GRANT_REQUIRED") == page.of(REFUSALS) == 1


async def test_without_metrics_the_library_is_not_even_loaded(folder: Path) -> None:
    environ = {"PYTHONPROFILEIMPORTTIME": "1"}
    site = VerifierSite.make(folder)
    log = folder / "log"
    with site.serve(environ=environ) as serving:
        await one_launch(site, serving)
    assert "verifier.metrics" in log.read_text()
    assert "prometheus_client" not in log.read_text()
    assert logged(log, "metrics.listening") == []
    site.config.write_text(f"{site.config.read_text()}\n{METRICS}")
    with site.serve(environ=environ):
        pass
    assert "prometheus_client" in log.read_text()


async def one_launch(site: VerifierSite, serving: ServingVerifier) -> None:
    async with site.channel(serving.address) as channel:
        stub = site.stub(channel)
        begun = await ask(stub.BeginLaunch, begin(site))
        await ask(stub.ReleaseSecret, release(begun, measured(site, begun)))


async def test_connections_that_say_nothing_keep_nobody_from_being_served(folder: Path) -> None:
    site = VerifierSite.make(folder, extra=METRICS)
    with site.serve() as serving, ExitStack() as stack:
        for _ in range(100):  # fewer than the kernel lets wait
            silent(where(folder / "log"), stack)
        await one_launch(site, serving)


def test_on_another_address_without_tls_no_verifier_starts(folder: Path) -> None:
    site = VerifierSite.make(folder, extra='[metrics]\nlisten = "0.0.0.0:0"\n', init=False)
    with pytest.raises(NotServing, match=r"metrics: listen: 0\.0\.0\.0:0 is not an address of this machine alone"):
        site.serve()


async def test_with_tls_a_verifier_shows_them_to_the_monitoring_alone(folder: Path) -> None:
    site = VerifierSite.make(folder)
    pair = site.pki.issue(Role.VERIFIER, "metrics", ip=["127.0.0.1"])
    site.config.write_text(
        f'{site.config.read_text()}\n[metrics]\nlisten = "127.0.0.1:0"\ncert = "{pair.cert}"\nkey = "{pair.key}"\n'
        f'client_ca = "{site.pki.owner_ca}"\n'
    )
    with site.serve() as serving:
        at = where(folder / "log")
        await one_launch(site, serving)
        reader = client_context(site.pki.owner_ca, site.pki.issue(Role.OWNER, "prometheus"))
        assert (await scrape(at, reader)).of(RECORDS, event="launch.released") == 1
        for other in (None, site.pki.issue(Role.ORCHESTRATOR, "prometheus")):
            with pytest.raises((ssl.SSLError, ConnectionError)):
                await scrape(at, client_context(site.pki.owner_ca, other))


# The agent.


async def test_an_agents_figures_add_up(site: Site) -> None:
    site.tables = '[metrics]\nlisten = "127.0.0.1:0"\n'
    log = site.root / "sev-host-agent.log"
    async with site.caller(site.start()) as caller:
        at = where(log)
        owner = Owner(pdh=await caller.pdh())
        launch = await caller.whole(owner, site.shape(owner.policy))
        second = Owner(pdh=owner.pdh)
        with pytest.raises(WrongState) as caught:
            await caller.start(second)
        assert caught.value.reason is Reason.GUEST_BUSY
        running = await scrape(at)
        await caller.abort(owner)
        page = await scrape(at)
    states = {state: running.of("sevattest_guest_launches", state=state) for state in LaunchState}
    assert states == {state: int(state is LaunchState.RESUMED) for state in LaunchState}
    assert (running.of("sevattest_guest_machines"), page.of("sevattest_guest_machines")) == (1, 0)
    assert page.of("sevattest_guest_launches", state="STOPPED") == page.of("sevattest_guest_launches") == 1
    moves = "sevattest_guest_launch_moves_total"
    assert page.of(moves, **{"from": "INJECTING", "to": "INJECTED"}) == 1
    assert page.of(moves) == 8
    assert page.of("sevattest_guest_launch_failures_total") == page.of("sevattest_device_errors_total") == 0
    assert calls_on(page) == calls_in(log)
    assert page.of(ERRORS, method="/sevattest.v1.HostAgentService/StartLaunch", reason="GUEST_BUSY") == 1
    assert page.of("sevattest_ready", callers="orchestrator", cause="device") == 1
    declared = {each.name: each.kind for each in agent_metrics.METRICS}
    assert declared.items() >= page.families().items()
    for word in (launch.launch_id, "web", "alice", "spiffe", owner.pdh.fingerprint.hex()):
        assert word not in page.text, word
    keys = {"secret": owner.secret, "TEK": owner.keys.tek, "TIK": owner.keys.tik}
    assert leaks(keys, {"metrics": f"{running.text}{page.text}".encode()}) == []


async def test_what_a_caller_invents_does_not_grow_an_agents_page(site: Site) -> None:
    site.tables = '[metrics]\nlisten = "127.0.0.1:0"\n'
    address = site.start().wait_ready()
    tls = site.pki.client_tls(Role.ORCHESTRATOR, "alice", server=Role.AGENT)
    async with open_channel(address, tls) as channel:
        await invent(channel, 3)
    page = await scrape(where(site.root / "sev-host-agent.log"))
    assert page.values("method") == {"unknown"}
    assert page.of(CALLS) == page.of(CALLS, code="UNIMPLEMENTED") == 3


@pytest.mark.skipif(Path(DEFAULT_PATH).exists(), reason="this machine has a SEV device")
async def test_a_device_that_is_not_there_is_counted_and_shown(site: Site) -> None:
    site.tables = '[metrics]\nlisten = "127.0.0.1:0"\n'
    site.use_dev_sev()
    site.start().wait_ready()
    at = where(site.root / "sev-host-agent.log")
    async with asyncio.timeout(30):
        while not (page := await scrape(at)).shows("sevattest_device_errors_total"):
            pass
    ((labels, _),) = page.samples("sevattest_device_errors_total")
    assert labels == {"reason": "PLATFORM_UNAVAILABLE", "status": ""}
    assert page.of("sevattest_ready", cause="device") == 0


def test_on_another_address_without_tls_no_agent_starts(site: Site) -> None:
    site.tables = '[metrics]\nlisten = "[::]:0"\n'
    with pytest.raises(PlatformFailed, match=r"metrics: listen: \[::\]:0 is not an address of this machine alone"):
        site.start().wait_ready()
