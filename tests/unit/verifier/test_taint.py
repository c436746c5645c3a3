"""No value from a caller changes a decision except to refuse: every field of every request, found by its descriptor.

Each scalar or bytes field is flipped, emptied, cut, doubled, set to its limits and to another launch's value. The
result is a refusal or exactly what the untouched request gets; the launch that it touches stays releasable to its own
guest, unless a well-formed measurement decided it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

from common.errors import Reason, SevattestError
from common.rpc.identity import ActingAs, parse_spiffe_id
from emulator import channel as psp
from sevattest.v1 import platform_pb2, verifier_service_pb2
from tests.support.chains import make_platform
from tests.support.desk import Desk, desk
from tests.support.documents import CALLER, grant
from tests.support.documents import workload as document
from tests.support.taint import cases
from verifier.service import VerifierServicer


def begin_request(d: Desk, **fields: Any) -> verifier_service_pb2.BeginLaunchRequest:
    return verifier_service_pb2.BeginLaunchRequest(
        request_id=fields.get("request_id", str(uuid4())),
        platform=platform_pb2.PlatformEvidence(chain=d.platform.chain.to_bytes(), chip_id=d.platform.chip_id),
        workload="web",
    )


def release_request(launch_id: str, blob: bytes) -> verifier_service_pb2.ReleaseSecretRequest:
    return verifier_service_pb2.ReleaseSecretRequest(
        request_id=str(uuid4()),
        launch_id=launch_id,
        measurement=blob,
        firmware=platform_pb2.FirmwareVersion(api_major=1, api_minor=55, build=24),
    )


def servicer(d: Desk) -> Any:
    return VerifierServicer(d.broker, d.releaser, d.reports)


async def outcome(method: Any, request: Any) -> Any:
    """The answer, or the error that refused."""
    with ActingAs(parse_spiffe_id(CALLER)):
        try:
            return await method(request, None)
        except SevattestError as error:
            return error


async def begun_and_measured(d: Desk) -> tuple[Any, bytes]:
    begun = await outcome(servicer(d).BeginLaunch, begin_request(d))
    keys = psp.open_channel(pdh_key=d.platform.keys.pdh, godh=begun.godh, session=begun.session, policy=begun.policy)
    nonce = uuid4().bytes
    digest = (await d.digests())[0]
    return begun, psp.measure(keys.tik, (1, 55), 24, begun.policy, digest, nonce) + nonce


async def test_a_changed_release_of_a_released_launch_is_refused_or_the_same_packet(tmp_path: Path) -> None:
    async with desk(tmp_path, open_cap=100_000) as d:
        serve = servicer(d)
        begun, blob = await begun_and_measured(d)
        other, other_blob = await begun_and_measured(d)
        request = release_request(begun.launch.launch_id, blob)
        truth = await outcome(serve.ReleaseSecret, request)
        assert truth.payload
        others = {"launch_id": other.launch.launch_id, "measurement": other_blob}
        count = 0
        for case in cases(request, others):
            got = await outcome(serve.ReleaseSecret, case.request)
            assert isinstance(got, SevattestError) or got == truth, case
            count += 1
        assert count > 80
        # And the other launch, which some of them named with this one's measurement, was spent by none but its own.
        state = await d.broker.get(CALLER, UUID(other.launch.launch_id))
        assert state.state in {"open", "refused"}


async def test_a_changed_release_of_an_open_launch_releases_to_nobody_else(tmp_path: Path) -> None:
    async with desk(tmp_path, open_cap=100_000) as d:
        serve = servicer(d)
        _, other_blob = await begun_and_measured(d)
        begun, blob = await begun_and_measured(d)
        request = release_request(begun.launch.launch_id, blob)
        accepted = 0
        for case in cases(request, {"measurement": other_blob}):
            got = await outcome(serve.ReleaseSecret, case.request)
            if isinstance(got, SevattestError):
                well_formed = got.reason in {Reason.MEASUREMENT_REFUSED, Reason.FIRMWARE_TOO_OLD}
                if well_formed:
                    # The launch was decided by it: the next case gets a new one.
                    begun, blob = await begun_and_measured(d)
                    request = release_request(begun.launch.launch_id, blob)
                continue
            accepted += 1
            assert case.path == "request_id", case
        assert accepted == 0  # every changed request_id here is malformed
        assert (await outcome(serve.ReleaseSecret, request)).payload


async def test_a_changed_begin_is_refused_or_bound_to_the_same_platform_and_policy(tmp_path: Path) -> None:
    # The stranger's chain is as genuine as the host's: it is the workload's list of chips that tells them apart.
    platform, stranger = make_platform(), make_platform()
    chips = [platform.chain.cek.fingerprint.hex()]
    content = document(platforms={"generations": ["emulated"], "chips": chips})
    async with desk(tmp_path, content=content, platform=platform, open_cap=100_000) as d:
        serve = servicer(d)
        request = begin_request(d)
        truth = await outcome(serve.BeginLaunch, request)
        others = {"platform.chain": stranger.chain.to_bytes(), "platform.chip_id": stranger.chip_id}
        count = 0
        for case in cases(request, others):
            same_id = await outcome(serve.BeginLaunch, case.request)
            assert isinstance(same_id, SevattestError) or same_id == truth, case
            case.request.request_id = str(uuid4())
            fresh = await outcome(serve.BeginLaunch, case.request)
            if not isinstance(fresh, SevattestError):
                # What was accepted is a launch of its own, for the same platform and under the same policy.
                assert case.path in {"request_id", "platform.chip_id"}, case
                assert fresh.policy == truth.policy
                assert fresh.pdh_fingerprint == truth.pdh_fingerprint
                assert fresh.launch.workload == "web"
                psp.open_channel(
                    pdh_key=d.platform.keys.pdh, godh=fresh.godh, session=fresh.session, policy=fresh.policy
                )
            count += 1
        assert count > 80


async def test_a_changed_grant_is_refused_or_the_callers_own_is_spent(tmp_path: Path) -> None:
    contents = [document(callers=[]), grant("mine", callers=[CALLER], at_once=100), grant("theirs")]
    async with desk(tmp_path, content=contents) as d:
        serve = servicer(d)
        request = begin_request(d)
        request.grant = "mine"
        truth = await outcome(serve.BeginLaunch, request)
        assert truth.session
        count = 0
        for case in cases(request, {"grant": "theirs"}):
            if case.path != "grant":
                continue
            case.request.request_id = str(uuid4())
            got = await outcome(serve.BeginLaunch, case.request)
            count += 1
            if case.how == "absent":
                row = await d.store.launch(UUID(got.launch.launch_id))
                assert row is not None
                assert row.grant == "mine"
                continue
            assert isinstance(got, SevattestError), case
            assert got.reason in {Reason.NOT_FOUND, Reason.INVALID_ARGUMENT}, case
        assert count > 8
        assert (await d.store.ledger("mine")).open == 2
        assert (await d.store.ledger("theirs")).open == 0


async def test_a_changed_abandon_get_or_report_touches_no_other_launch(tmp_path: Path) -> None:
    async with desk(tmp_path, open_cap=100_000) as d:
        serve = servicer(d)
        begun, blob = await begun_and_measured(d)
        launch_id = begun.launch.launch_id
        requests = [
            (serve.AbandonLaunch, verifier_service_pb2.AbandonLaunchRequest(launch_id=launch_id)),
            (serve.GetLaunch, verifier_service_pb2.VerifierServiceGetLaunchRequest(launch_id=launch_id)),
            (
                serve.VerifyReport,
                verifier_service_pb2.VerifyReportRequest(launch_id=launch_id, nonce=bytes(16), report=bytes(208)),
            ),
        ]
        for method, request in requests:
            for case in cases(request, {}):
                got = await outcome(method, case.request)
                assert isinstance(got, SevattestError) or got.launch.launch_id == launch_id, case
        assert (await outcome(serve.ReleaseSecret, release_request(launch_id, blob))).payload


def test_every_request_of_the_service_is_covered() -> None:
    service = verifier_service_pb2.DESCRIPTOR.services_by_name["VerifierService"]
    assert {method.name for method in service.methods} == {
        "BeginLaunch",
        "ReleaseSecret",
        "AbandonLaunch",
        "GetLaunch",
        "VerifyReport",
    }
