"""Every RPC over real mutual TLS: fields checked one by one, answers as messages, launches their caller's only."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import grpc
import pytest

from common.errors import (
    InvalidInput,
    NotFound,
    PlatformFailed,
    Reason,
    Refused,
    SevattestError,
    Unavailable,
    WrongState,
)
from common.rpc.client import call, open_channel
from common.rpc.identity import Role
from common.rpc.server import Server
from common.rpc.tls import ClientTls, ServerTls
from common.sev.abi import CHAIN_SIZE, Algo, PlatformState, Usage
from common.sev.certs.sev import SevCertificate, encode
from host_agent.devices import PlatformStatus
from host_agent.service import HostAgentService, add_HostAgentServiceServicer_to_server
from sevattest.v1 import host_agent_service_pb2 as pb
from sevattest.v1.host_agent_service_pb2_grpc import HostAgentServiceStub
from sevattest.v1.reason_pb2 import REASON_GUEST_GONE, REASON_UNSPECIFIED
from tests.support.agent import HEADER, PAYLOAD, POLICY, Rig, dh_certificate, pid_of, rig
from tests.support.eventually import until
from tests.support.pki import DATACENTER_DOMAIN, Pki

GODH = dh_certificate().raw
SESSION = bytes(range(128))
ANY_ID = "3f2b8c1e-5a7d-4e09-9c46-d81f0a2b7c53"


@dataclass
class Caller:
    """An orchestrator with a channel to the agent."""

    stub: Any

    async def __call__(self, method: str, request: Any, *, mutating: bool = True) -> Any:
        return await call(getattr(self.stub, method), request, timeout=30, mutating=mutating)

    async def start(self, agent: Rig, **changes: Any) -> pb.GuestLaunch:
        launch: pb.GuestLaunch = (await self("StartLaunch", start(agent, **changes))).launch
        return launch


def start(agent: Rig, **changes: Any) -> pb.StartLaunchRequest:
    fields: dict[str, Any] = {
        "request_id": str(uuid4()),
        "launch_id": str(uuid4()),
        "guest": "web",
        "policy": POLICY,
        "godh": GODH,
        "session": SESSION,
        "pdh_fingerprint": agent.device.pdh.fingerprint,
    }
    return pb.StartLaunchRequest(**{**fields, **changes})


@dataclass
class Served:
    """An agent that is being served, and two callers."""

    agent: Rig
    alice: Caller
    bob: Caller


@pytest.fixture
async def served(tmp_path: Path, pki: Pki) -> AsyncIterator[Served]:
    async with (
        rig(tmp_path) as agent,
        _listening(agent, pki) as address,
        _caller(address, pki, "alice") as alice,
        _caller(address, pki, "bob") as bob,
    ):
        yield Served(agent=agent, alice=alice, bob=bob)


@asynccontextmanager
async def _listening(agent: Rig, pki: Pki) -> AsyncIterator[str]:
    pair = pki.issue(Role.AGENT, ip=["127.0.0.1"])
    server = Server(
        listen="127.0.0.1:0",
        tls=ServerTls(
            cert=pair.cert, key=pair.key, client_ca=pki.datacenter_ca, trust_domain=DATACENTER_DOMAIN, role=Role.AGENT
        ),
        log=agent.log,
    )
    server.add(add_HostAgentServiceServicer_to_server, HostAgentService(runner=agent.runner, device=agent.device))
    address = await server.start()
    try:
        yield address
    finally:
        await server.stop(0)


@asynccontextmanager
async def _caller(address: str, pki: Pki, name: str) -> AsyncIterator[Caller]:
    pair = pki.issue(Role.ORCHESTRATOR, name)
    tls = ClientTls(cert=pair.cert, key=pair.key, server_ca=pki.datacenter_ca)
    async with open_channel(address, tls) as channel:
        yield Caller(stub=HostAgentServiceStub(channel))


def ids(launch: pb.GuestLaunch) -> dict[str, str]:
    return {"request_id": str(uuid4()), "launch_id": launch.launch_id}


async def test_what_the_device_does_not_tell_of_the_platform_is_left_out(served: Served) -> None:
    unknown = PlatformStatus(
        firmware=None, state=PlatformState.INIT, externally_owned=None, es_enabled=None, guest_count=None
    )

    async def status() -> PlatformStatus:
        return unknown

    served.agent.device.status = status  # type: ignore[method-assign]
    platform = await served.alice("GetPlatform", pb.GetPlatformRequest())
    assert {field.name for field, _ in platform.ListFields()} == {"state", "pdh_fingerprint"}


async def test_one_launch_from_the_first_call_to_the_last(served: Served) -> None:
    alice, agent = served.alice, served.agent
    exported = await alice("ExportChain", pb.ExportChainRequest())
    assert len(exported.platform.chain) == CHAIN_SIZE
    assert len(exported.platform.chip_id) == 64
    platform = await alice("GetPlatform", pb.GetPlatformRequest())
    assert (platform.firmware.api_major, platform.firmware.api_minor, platform.firmware.build) == (1, 55, 24)
    assert platform.state == pb.GetPlatformResponse.STATE_WORKING
    assert (platform.externally_owned, platform.es_enabled, platform.guest_count) == (False, True, 1)
    assert platform.pdh_fingerprint == SevCertificate.parse(exported.platform.chain[:2084]).fingerprint

    launch = await alice.start(agent)
    assert launch.state == pb.GUEST_LAUNCH_STATE_PAUSED
    assert (launch.guest, launch.policy, launch.reason) == ("web", POLICY, REASON_UNSPECIFIED)
    assert launch.create_time.ToDatetime() <= launch.update_time.ToDatetime()
    measured = await alice("GetMeasurement", pb.GetMeasurementRequest(launch_id=launch.launch_id))
    assert measured.measurement == bytes(range(48))
    assert (measured.firmware.api_major, measured.firmware.api_minor, measured.firmware.build) == (1, 55, 24)
    assert measured.launch.state == pb.GUEST_LAUNCH_STATE_MEASURED
    injected = await alice("InjectSecret", pb.InjectSecretRequest(**ids(launch), header=HEADER, payload=PAYLOAD))
    assert injected.launch.state == pb.GUEST_LAUNCH_STATE_INJECTED
    resumed = await alice("ResumeGuest", pb.ResumeGuestRequest(**ids(launch)))
    assert resumed.launch.state == pb.GUEST_LAUNCH_STATE_RESUMED
    report = await alice(
        "GetAttestationReport", pb.GetAttestationReportRequest(launch_id=launch.launch_id, nonce=bytes(16))
    )
    assert len(report.report) == 208
    got = await alice("GetLaunch", pb.HostAgentServiceGetLaunchRequest(launch_id=launch.launch_id))
    assert got.launch == resumed.launch
    ended = await alice("AbortLaunch", pb.AbortLaunchRequest(**ids(launch)))
    assert ended.launch.state == pb.GUEST_LAUNCH_STATE_STOPPED


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("request_id", ""),
        ("request_id", "not a uuid"),
        ("launch_id", ""),
        ("launch_id", "../../etc/passwd"),
        ("launch_id", ANY_ID.upper()),
        ("launch_id", ANY_ID.replace("-", "")),
        ("guest", ""),
        ("guest", "../web"),
        ("policy", 1 << 6),
        ("policy", 0x8000),
        ("godh", b""),
        ("godh", GODH[:-1]),
        ("godh", GODH + b"\0"),
        ("godh", bytes(2084)),
        ("session", b""),
        ("session", bytes(127)),
        ("session", bytes(129)),
        ("session", bytes(128)),
        ("pdh_fingerprint", b""),
        ("pdh_fingerprint", bytes(31)),
    ],
)
async def test_a_start_with_a_field_of_another_form_is_refused_by_the_fields_name(
    served: Served, field: str, value: object
) -> None:
    with pytest.raises(InvalidInput) as refusal:
        await served.alice.start(served.agent, **{field: value})
    assert refusal.value.reason is Reason.INVALID_ARGUMENT
    assert refusal.value.fields["field"] == field
    assert not served.agent.script.started


async def test_a_certificate_that_is_not_for_diffie_hellman_is_refused(served: Served) -> None:
    key = SevCertificate.parse(GODH).public_key
    pek = encode(usage=Usage.PEK, algo=Algo.ECDSA_SHA256, public_key=key)
    with pytest.raises(InvalidInput, match="usage PDH") as refusal:
        await served.alice.start(served.agent, godh=pek.raw)
    assert refusal.value.fields["field"] == "godh"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("header", b""),
        ("header", bytes(51)),
        ("header", bytes(53)),
        ("payload", b""),
        ("payload", bytes(15)),
        ("payload", bytes(17)),
        ("payload", bytes(0x4010)),
        ("launch_id", "x"),
        ("request_id", "x"),
    ],
)
async def test_a_packet_of_another_form_is_refused_before_the_machine_hears_of_it(
    served: Served, field: str, value: object
) -> None:
    launch = await served.alice.start(served.agent)
    await served.alice("GetMeasurement", pb.GetMeasurementRequest(launch_id=launch.launch_id))
    heard = len(served.agent.script.journal)
    fields: dict[str, Any] = {**ids(launch), "header": HEADER, "payload": PAYLOAD, field: value}
    with pytest.raises(InvalidInput) as refusal:
        await served.alice("InjectSecret", pb.InjectSecretRequest(**fields))
    assert refusal.value.fields["field"] == field
    assert len(served.agent.script.journal) == heard


async def test_a_packet_for_the_firmwares_whole_area_fits_into_a_message(served: Served) -> None:
    launch = await served.alice.start(served.agent)
    await served.alice("GetMeasurement", pb.GetMeasurementRequest(launch_id=launch.launch_id))
    with pytest.raises(WrongState) as refusal:
        await served.alice("InjectSecret", pb.InjectSecretRequest(**ids(launch), header=HEADER, payload=bytes(0x4000)))
    assert refusal.value.reason is Reason.SECRET_TOO_LARGE


async def test_another_orchestrator_sees_nothing_of_a_launch(served: Served) -> None:
    launch = await served.alice.start(served.agent)
    one = {"launch_id": launch.launch_id}
    for method, request in (
        ("GetLaunch", pb.HostAgentServiceGetLaunchRequest(**one)),
        ("GetMeasurement", pb.GetMeasurementRequest(**one)),
        ("GetAttestationReport", pb.GetAttestationReportRequest(**one, nonce=bytes(16))),
        ("InjectSecret", pb.InjectSecretRequest(**ids(launch), header=HEADER, payload=PAYLOAD)),
        ("ResumeGuest", pb.ResumeGuestRequest(**ids(launch))),
        ("AbortLaunch", pb.AbortLaunchRequest(**ids(launch))),
        ("StartLaunch", start(served.agent, launch_id=launch.launch_id)),
    ):
        with pytest.raises(NotFound) as refusal:
            await served.bob(method, request)
        unknown = await _refusal(served.bob, method, request, launch.launch_id)
        if unknown is not None:
            assert refusal.value.message == unknown.message
    assert not (await served.bob("ListLaunches", pb.ListLaunchesRequest())).launches
    assert served.agent.runner.launches("spiffe://datacenter.example/orchestrator/alice")[0].state == "PAUSED"


async def _refusal(caller: Caller, method: str, request: Any, launch_id: str) -> SevattestError | None:
    """What the same call says for a launch that there never was; None for the one that would make it."""
    if method == "StartLaunch":
        return None
    request.launch_id = str(uuid4())
    with pytest.raises(NotFound) as refusal:
        await caller(method, request)
    assert launch_id not in refusal.value.message
    return refusal.value


async def test_the_request_ids_of_two_callers_are_two(served: Served) -> None:
    request_id = str(uuid4())
    await served.alice.start(served.agent, request_id=request_id)
    assert (await served.bob.start(served.agent, request_id=request_id, guest="db")).guest == "db"


async def test_launches_are_listed_in_pages_newest_first(served: Served) -> None:
    started = [(await served.alice.start(served.agent, guest=guest)).launch_id for guest in ("web", "db", "cache")]
    seen: list[str] = []
    token = ""
    while True:
        page = await served.alice("ListLaunches", pb.ListLaunchesRequest(page_size=2, page_token=token))
        assert len(page.launches) <= 2
        seen += [launch.launch_id for launch in page.launches]
        token = page.next_page_token
        if not token:
            break
    assert set(seen) == set(started)
    assert len(seen) == 3
    whole = await served.alice("ListLaunches", pb.ListLaunchesRequest())
    assert [launch.launch_id for launch in whole.launches] == seen


@pytest.mark.parametrize("token", ["x", "1-", f"-1-{ANY_ID}", f"1-{ANY_ID}x", "9" * 19 + f"-{ANY_ID}"])
async def test_a_page_token_from_nowhere_is_refused(served: Served, token: str) -> None:
    with pytest.raises(InvalidInput) as refusal:
        await served.alice("ListLaunches", pb.ListLaunchesRequest(page_token=token))
    assert refusal.value.fields["field"] == "page_token"


async def test_a_page_is_at_most_500_launches(served: Served) -> None:
    with pytest.raises(InvalidInput):
        await served.alice("ListLaunches", pb.ListLaunchesRequest(page_size=501))


async def test_a_watcher_sees_what_is_and_what_changes_until_its_deadline(served: Served) -> None:
    launch = await served.alice.start(served.agent)
    await served.bob.start(served.agent, guest="db")
    stream = served.alice.stub.WatchLaunches(pb.WatchLaunchesRequest(), timeout=30)
    states = [(await stream.read()).launch]
    await served.alice("GetMeasurement", pb.GetMeasurementRequest(launch_id=launch.launch_id))
    states.append((await stream.read()).launch)
    [mine] = served.agent.runner.launches("spiffe://datacenter.example/orchestrator/alice")
    os.kill(pid_of(mine), signal.SIGKILL)
    states.append((await stream.read()).launch)
    assert {state.launch_id for state in states} == {launch.launch_id}
    assert [state.state for state in states] == [
        pb.GUEST_LAUNCH_STATE_PAUSED,
        pb.GUEST_LAUNCH_STATE_MEASURED,
        pb.GUEST_LAUNCH_STATE_FAILED,
    ]
    assert states[-1].reason == REASON_GUEST_GONE
    stream.cancel()


async def test_a_watch_ends_with_its_deadline(served: Served) -> None:
    stream = served.alice.stub.WatchLaunches(pb.WatchLaunchesRequest(), timeout=0.2)
    with pytest.raises(grpc.aio.AioRpcError) as ended:
        await stream.read()
    assert ended.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_the_devices_errors_reach_the_caller_as_they_are(served: Served) -> None:
    for error in (
        Unavailable(Reason.PLATFORM_UNAVAILABLE, "busy"),
        PlatformFailed(Reason.FIRMWARE_FAILED, "no", fw_error="23"),
        Refused(Reason.FIRMWARE_BAD_MEASUREMENT, "no", fw_error="11"),
    ):
        served.agent.device.errors.append(error)
        with pytest.raises(type(error)) as failure:
            await served.alice("GetPlatform", pb.GetPlatformRequest(), mutating=False)
        assert (failure.value.reason, failure.value.fields) == (error.reason, error.fields)


async def test_an_injection_that_has_begun_ends_although_its_caller_has_gone(served: Served) -> None:
    agent = served.agent
    launch = await served.alice.start(agent)
    await served.alice("GetMeasurement", pb.GetMeasurementRequest(launch_id=launch.launch_id))
    go = agent.folder / "go"
    agent.script.set(on={"sev-inject-launch-secret": [{"do": "wait", "file": str(go)}]})
    injecting = asyncio.create_task(
        served.alice("InjectSecret", pb.InjectSecretRequest(**ids(launch), header=HEADER, payload=PAYLOAD))
    )
    await until(lambda: agent.script.commands("sev-inject-launch-secret"))
    injecting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await injecting
    assert "inject: done" not in agent.passed
    go.touch()
    await until(lambda: "inject: done" in agent.passed)
    got = await served.alice("GetLaunch", pb.HostAgentServiceGetLaunchRequest(launch_id=launch.launch_id))
    assert got.launch.state == pb.GUEST_LAUNCH_STATE_INJECTED


async def test_what_is_injected_stands_in_no_log(served: Served) -> None:
    launch = await served.alice.start(served.agent)
    await served.alice("GetMeasurement", pb.GetMeasurementRequest(launch_id=launch.launch_id))
    await served.alice("InjectSecret", pb.InjectSecretRequest(**ids(launch), header=HEADER, payload=PAYLOAD))
    logged = repr(served.agent.log.events)
    assert PAYLOAD.hex() not in logged
    assert repr(PAYLOAD)[2:20] not in logged
