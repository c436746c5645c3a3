"""Every method, as every caller: who gets through, and how everybody else is turned away."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID
from google.rpc.error_details_pb2 import ErrorInfo  # type: ignore[import-untyped]  # ships no types
from google.rpc.status_pb2 import Status  # type: ignore[import-untyped]  # ships no types

from common.errors import Reason
from common.rpc.authz import METHODS
from common.rpc.identity import CLIENTS, Role
from common.rpc.server import Server
from common.rpc.tls import ServerTls
from tests.support.pki import EVIL_CLIENTS, Pair, Pki, raw_channel
from tests.support.recording_log import RecordingLog
from tests.support.rpc import Method, add_everything, methods

# Written a second time, by hand, from the comments in proto/: the table under test must not be its own witness.
EXPECTED = {
    "sevattest.v1.HostAgentService": {
        "orchestrator": "ExportChain GetPlatform StartLaunch GetMeasurement InjectSecret ResumeGuest AbortLaunch "
        "GetLaunch ListLaunches WatchLaunches GetAttestationReport",
    },
    "sevattest.v1.VerifierService": {
        "orchestrator": "BeginLaunch ReleaseSecret AbandonLaunch GetLaunch VerifyReport",
    },
    "sevattest.v1.VerifierAdminService": {
        "owner": "ApplyDocument GetDocument ListDocuments DeleteDocument GetGrantStatus ListRevocationImpact PutSecret "
        "ListSecrets DeleteSecret GetLaunch ListLaunches ListAuditRecords ListCheckpoints GetSigningKeys Simulate",
    },
    "grpc.health.v1.Health": {"orchestrator": "Check List Watch", "owner": "Check List Watch"},
}


def _may_call(method: str) -> set[str]:
    _, service, name = method.split("/")
    return {role for role, names in EXPECTED[service].items() if name in names.split()}


@dataclass(frozen=True, kw_only=True)
class Listener:
    """One way to serve: settings, who may come in, and the CA that a client believes."""

    tls: ServerTls
    caller: Role
    server_ca: Path


def _agent(pki: Pki) -> Listener:
    return Listener(tls=pki.server_tls(Role.AGENT), caller=Role.ORCHESTRATOR, server_ca=pki.datacenter_ca)


def _launches(pki: Pki) -> Listener:
    return Listener(tls=pki.server_tls(Role.VERIFIER), caller=Role.ORCHESTRATOR, server_ca=pki.owner_ca)


def _admin(pki: Pki) -> Listener:
    return Listener(tls=pki.admin_tls(), caller=Role.OWNER, server_ca=pki.owner_ca)


LISTENERS: dict[str, Callable[[Pki], Listener]] = {"agent": _agent, "launches": _launches, "admin": _admin}


@asynccontextmanager
async def _serving(tls: ServerTls, served: list[str]) -> AsyncIterator[str]:
    server = Server(listen="127.0.0.1:0", tls=tls, log=RecordingLog())
    add_everything(server, served)
    address = await server.start()
    try:
        yield address
    finally:
        await server.stop(0)


async def _outcome(method: Method, channel: grpc.aio.Channel) -> tuple[str, str]:
    """The status of one call and the reason that came with it."""
    # Health's messages are empty, ours too: what counts is whether the servicer is reached.
    call = method.stub(channel)(method.request(), timeout=20)
    try:
        if method.streams:
            async for _ in call:
                break
            call.cancel()
        else:
            await call
    except grpc.aio.AioRpcError as error:
        return error.code().name, _reason(error)
    return "OK", ""


def _reason(error: grpc.aio.AioRpcError) -> str:
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            info = ErrorInfo()
            for packed in Status.FromString(value).details:
                assert packed.Unpack(info)
            return str(info.reason)
    return ""


async def _all_outcomes(listener: Listener, pair: Pair | None, served: list[str]) -> dict[str, tuple[str, str]]:
    async with _serving(listener.tls, served) as address, raw_channel(address, listener.server_ca, pair) as channel:
        return {method.path: await _outcome(method, channel) for method in methods()}


def test_every_method_has_an_expectation_and_a_row() -> None:
    paths = {method.path for method in methods()}
    expected = {
        f"/{service}/{name}"
        for service, roles in EXPECTED.items()
        for names in roles.values()
        for name in names.split()
    }
    assert paths == expected == set(METHODS)


@pytest.mark.parametrize("name", LISTENERS)
async def test_the_due_role_reaches_its_methods_and_no_others(pki: Pki, name: str) -> None:
    listener, served = LISTENERS[name](pki), list[str]()
    outcomes = await _all_outcomes(listener, pki.issue(listener.caller), served)
    for method, outcome in outcomes.items():
        allowed = listener.caller in _may_call(method)
        assert outcome == (("OK", "") if allowed else ("PERMISSION_DENIED", "ROLE_NOT_ALLOWED")), method
    assert set(served) == {m for m in outcomes if listener.caller in _may_call(m) and "grpc.health" not in m}


@pytest.mark.parametrize("role", list(Role))
@pytest.mark.parametrize("name", LISTENERS)
async def test_no_other_role_from_the_right_authority_may_call_any_method(pki: Pki, name: str, role: Role) -> None:
    listener, served = LISTENERS[name](pki), list[str]()
    site = "owner" if listener.caller is Role.OWNER else "datacenter"
    pair = pki.forge(
        role,
        domain=listener.tls.trust_domain,
        authority=pki.authority(site),
        usages=[ExtendedKeyUsageOID.CLIENT_AUTH],
    )
    outcomes = await _all_outcomes(listener, pair, served)
    if role is listener.caller:
        # The accepted twin: made in the very same way.
        assert "OK" in {status for status, _ in outcomes.values()}
    else:
        assert set(outcomes.values()) == {("PERMISSION_DENIED", "ROLE_NOT_ALLOWED")}
        assert served == []


def _other_site(pki: Pki, listener: Listener) -> Pair:
    other = Role.ORCHESTRATOR if listener.caller is Role.OWNER else Role.OWNER
    return pki.issue(other)


def _servers_own(pki: Pki, listener: Listener) -> Pair:
    return pki.issue(Role.VERIFIER if listener.caller is Role.OWNER else Role.AGENT)


# Whom TLS itself turns away; the client sees a closed connection and nothing else.
NOT_LET_IN: dict[str, Callable[[Pki, Listener], Pair | None]] = {
    "no certificate": lambda _pki, _listener: None,
    "another CA": lambda pki, listener: pki.forge(listener.caller, authority=pki.stranger()),
    "the other site's CA": _other_site,
    "a CA with the right name and another key": lambda pki, listener: pki.forge(
        listener.caller,
        authority=pki.stranger(common_name=_name_of(pki, "owner" if listener.caller is Role.OWNER else "datacenter")),
    ),
    "a server's certificate of the right CA": _servers_own,
    "expired": lambda pki, listener: pki.forge(listener.caller, starts=timedelta(hours=-2), ends=timedelta(hours=-1)),
    "not yet valid": lambda pki, listener: pki.forge(
        listener.caller, starts=timedelta(hours=1), ends=timedelta(hours=2)
    ),
    "another trust domain under the right CA": lambda pki, listener: pki.forge(
        listener.caller, domain="elsewhere.example"
    ),
}


def _name_of(pki: Pki, site: str) -> str:
    return str(pki.authority(site).certificate.subject.rfc4514_string()).removeprefix("CN=")


@pytest.mark.parametrize("name", LISTENERS)
@pytest.mark.parametrize("credential", NOT_LET_IN)
async def test_a_wrong_certificate_gets_no_connection_for_any_method(pki: Pki, name: str, credential: str) -> None:
    listener, served = LISTENERS[name](pki), list[str]()
    outcomes = await _all_outcomes(listener, NOT_LET_IN[credential](pki, listener), served)
    assert set(outcomes.values()) == {("UNAVAILABLE", "")}
    assert served == []


@pytest.mark.parametrize("name", LISTENERS)
@pytest.mark.parametrize("twin", EVIL_CLIENTS)
async def test_an_evil_twin_of_the_due_certificate_is_no_identity_on_any_method(pki: Pki, name: str, twin: str) -> None:
    listener, served = LISTENERS[name](pki), list[str]()
    outcomes = await _all_outcomes(listener, EVIL_CLIENTS[twin](pki, listener.caller), served)
    assert set(outcomes.values()) == {("UNAUTHENTICATED", "UNAUTHENTICATED")}
    assert served == []


@pytest.mark.parametrize("role", sorted(CLIENTS))
async def test_another_trust_domain_is_no_identity_even_under_an_authority_without_constraints(
    pki: Pki, role: Role
) -> None:
    stranger = pki.stranger()
    bundle = pki.write_authority(stranger)
    tls = pki.server_tls(Role.VERIFIER, client_ca=bundle, callers=frozenset({Role.ORCHESTRATOR}))
    listener, served = Listener(tls=tls, caller=Role.ORCHESTRATOR, server_ca=pki.owner_ca), list[str]()
    good = pki.forge(Role.ORCHESTRATOR, domain="datacenter.example", authority=stranger)
    assert (await _all_outcomes(listener, good, []))["/sevattest.v1.VerifierService/BeginLaunch"] == ("OK", "")
    foreign = pki.forge(role, domain="elsewhere.example", authority=stranger)
    outcomes = await _all_outcomes(listener, foreign, served)
    assert set(outcomes.values()) == {("UNAUTHENTICATED", "UNAUTHENTICATED")}
    assert served == []


@pytest.mark.parametrize("name", LISTENERS)
async def test_an_unknown_method_is_unimplemented_for_callers_and_nothing_for_others(pki: Pki, name: str) -> None:
    listener = LISTENERS[name](pki)
    wrong = Role.OWNER if listener.caller is Role.ORCHESTRATOR else Role.ORCHESTRATOR
    domain = listener.tls.trust_domain
    site = "owner" if listener.caller is Role.OWNER else "datacenter"
    outsider = pki.forge(wrong, domain=domain, authority=pki.authority(site))
    async with _serving(listener.tls, []) as address:
        for pair, expected in (
            (pki.issue(listener.caller), ("UNIMPLEMENTED", "")),
            (outsider, ("PERMISSION_DENIED", Reason.ROLE_NOT_ALLOWED.value)),
            (EVIL_CLIENTS["two URIs"](pki, listener.caller), ("UNAUTHENTICATED", Reason.UNAUTHENTICATED.value)),
        ):
            async with raw_channel(address, listener.server_ca, pair) as channel:
                for path in (
                    "/sevattest.v1.VerifierService/Nothing",
                    "/grpc.reflection.v1.ServerReflection/X",
                    "/unknown",
                ):
                    method: Any = channel.unary_unary(path)
                    with pytest.raises(grpc.aio.AioRpcError) as caught:
                        await method(b"", timeout=10)
                    assert (caught.value.code().name, _reason(caught.value)) == expected, path
