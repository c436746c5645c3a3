"""The owner's listener of a real verifier over mutual TLS: who is let in, what is refused, and what is never said."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Iterator
from typing import Any
from uuid import uuid4

import grpc
import pytest
import yaml

from common.errors import InvalidInput, NotFound, Reason, SevattestError, WrongState
from common.rpc import MAX_ADMIN_MESSAGE
from common.rpc.client import call
from common.rpc.identity import Role
from sevattest.v1 import platform_pb2, reason_pb2, verifier_service_pb2
from sevattest.v1 import verifier_admin_service_pb2 as pb
from tests.support.documents import SECRET_GUID, STRANGER, grant, revocation, workload
from tests.support.owner_process import OwnersVerifier, owners_verifier
from tests.support.pki import Pair, raw_channel
from tests.support.spellings import shown_in

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def served() -> Iterator[OwnersVerifier]:
    with owners_verifier() as serving:
        yield serving


@pytest.fixture
async def stub(served: OwnersVerifier) -> AsyncIterator[Any]:
    async with served.owner() as channel:
        yield served.stub(channel)


@pytest.fixture
def name() -> str:
    """A name of the test's own: the verifier is shared."""
    return f"n-{uuid4().hex[:12]}"


async def ask(method: Any, request: Any) -> Any:
    return await call(method, request, timeout=20, mutating=True)


async def refused(method: Any, request: Any) -> SevattestError:
    with pytest.raises(SevattestError) as caught:
        await ask(method, request)
    return caught.value


def apply(content: Any, **changes: Any) -> pb.ApplyDocumentRequest:
    text = content if isinstance(content, str) else yaml.safe_dump(content)
    return pb.ApplyDocumentRequest(**{"request_id": str(uuid4()), "text": text} | changes)


def put(name: str, value: bytes, **changes: Any) -> pb.PutSecretRequest:
    return pb.PutSecretRequest(**{"request_id": str(uuid4()), "name": name, "value": value} | changes)


# Who is let in.


async def test_an_owner_is_served(stub: Any) -> None:
    assert json.loads((await ask(stub.GetSigningKeys, pb.GetSigningKeysRequest())).jwks)["keys"]


async def _turned_away(served: OwnersVerifier, address: str, pair: Pair | None, path: str) -> tuple[str, str]:
    async with raw_channel(address, served.site.pki.owner_ca, pair) as channel:
        method: Any = channel.unary_unary(path)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await method(b"", timeout=10)
        return caught.value.code().name, caught.value.details() or ""


KEYS = "/sevattest.v1.VerifierAdminService/GetSigningKeys"


async def test_an_orchestrators_certificate_is_none_at_the_owners_listener(served: OwnersVerifier) -> None:
    pair = served.site.pki.issue(Role.ORCHESTRATOR, "cluster")
    assert (await _turned_away(served, served.admin, pair, KEYS))[0] == "UNAVAILABLE"


async def test_an_owners_certificate_is_none_at_the_listener_for_launches(served: OwnersVerifier) -> None:
    pair = served.site.pki.issue(Role.OWNER, "alice")
    path = "/sevattest.v1.VerifierService/GetLaunch"
    assert (await _turned_away(served, served.launches, pair, path))[0] == "UNAVAILABLE"


async def test_an_owner_of_a_foreign_ca_is_not_let_in(served: OwnersVerifier) -> None:
    pki = served.site.pki
    for pair in (
        pki.forge(Role.OWNER, authority=pki.stranger()),
        pki.forge(Role.OWNER, authority=pki.authority("datacenter")),
        None,
    ):
        assert (await _turned_away(served, served.admin, pair, KEYS))[0] == "UNAVAILABLE"


async def test_an_orchestrator_that_the_owners_own_ca_issued_is_of_the_wrong_role(served: OwnersVerifier) -> None:
    pki = served.site.pki
    pair = pki.forge(Role.ORCHESTRATOR, domain="owner.example", authority=pki.authority("owner"))
    code, details = await _turned_away(served, served.admin, pair, KEYS)
    assert code == "PERMISSION_DENIED"
    assert "orchestrator" in details


async def test_the_owners_methods_are_not_served_to_orchestrators_at_their_own_listener(served: OwnersVerifier) -> None:
    pair = served.site.pki.issue(Role.ORCHESTRATOR, "cluster")
    assert (await _turned_away(served, served.launches, pair, KEYS))[0] in {"UNIMPLEMENTED", "PERMISSION_DENIED"}


# What is malformed.


async def test_a_malformed_field_is_named(stub: Any) -> None:
    cases: list[tuple[Any, Any, str]] = [
        (stub.ApplyDocument, apply(grant(), request_id=""), "request_id"),
        (stub.ApplyDocument, apply(""), "text"),
        (stub.ApplyDocument, apply("x" * (256 * 1024 + 1)), "text"),
        (stub.GetDocument, pb.GetDocumentRequest(name="x"), "kind"),
        (stub.GetDocument, pb.GetDocumentRequest(kind=9, name="x"), "kind"),  # type: ignore[arg-type]  # open enum
        (stub.GetDocument, pb.GetDocumentRequest(kind=pb.DOCUMENT_KIND_GRANT, name="../x"), "name"),
        (stub.ListDocuments, pb.ListDocumentsRequest(), "kind"),
        (stub.DeleteDocument, pb.DeleteDocumentRequest(request_id=str(uuid4()), name="x"), "kind"),
        (stub.GetGrantStatus, pb.GetGrantStatusRequest(), "name"),
        (stub.ListRevocationImpact, pb.ListRevocationImpactRequest(), "text"),
        (stub.PutSecret, put("", b"x"), "name"),
        (stub.PutSecret, put("x", b""), "value"),
        (stub.PutSecret, put("x", bytes(16385)), "value"),
        (stub.GetLaunch, pb.VerifierAdminServiceGetLaunchRequest(launch_id="x"), "launch_id"),
        (stub.ListLaunches, pb.VerifierAdminServiceListLaunchesRequest(caller="cluster"), "caller"),
        (stub.ListLaunches, pb.VerifierAdminServiceListLaunchesRequest(state=9), "state"),  # type: ignore[arg-type]
        (stub.ListAuditRecords, pb.ListAuditRecordsRequest(launch_id="x"), "launch_id"),
        (stub.Simulate, pb.SimulateRequest(), "launch_id"),
        (stub.Simulate, pb.SimulateRequest(launch_id=str(uuid4()), documents=["x"] * 17), "documents"),
        (stub.Simulate, pb.SimulateRequest(supposed=pb.SupposedLaunch(workload="web")), "supposed.caller"),
        (
            stub.Simulate,
            pb.SimulateRequest(supposed=pb.SupposedLaunch(workload="web", caller=STRANGER, chain=b"x")),
            "supposed.chain",
        ),
        (
            stub.Simulate,
            pb.SimulateRequest(launch_id=str(uuid4()), firmware=platform_pb2.FirmwareVersion(api_major=256)),
            "firmware.api_major",
        ),
    ]
    for method, request, field in cases:
        error = await refused(method, request)
        assert isinstance(error, InvalidInput), field
        assert error.fields["field"] == field


async def test_pages_have_bounds_and_tokens_are_the_listings_own(stub: Any, name: str) -> None:
    for each in ("a", "b"):
        await ask(stub.PutSecret, put(f"{name}-{each}", b"x"))
        await ask(stub.ApplyDocument, apply(revocation(f"{name}-{each}", ceks=["cd" * 32])))
    token = (await ask(stub.ListSecrets, pb.ListSecretsRequest(page_size=1))).next_page_token
    assert token
    listings: list[tuple[Any, Any]] = [
        (stub.ListSecrets, pb.ListSecretsRequest),
        (stub.ListLaunches, pb.VerifierAdminServiceListLaunchesRequest),
        (stub.ListAuditRecords, pb.ListAuditRecordsRequest),
        (stub.ListCheckpoints, pb.ListCheckpointsRequest),
        (stub.ListDocuments, lambda **more: pb.ListDocumentsRequest(kind=pb.DOCUMENT_KIND_REVOCATION, **more)),
        (stub.ListRevocationImpact, lambda **more: pb.ListRevocationImpactRequest(name=f"{name}-a", **more)),
    ]
    for method, request in listings:
        await ask(method, request(page_size=500))
        assert (await refused(method, request(page_size=501))).fields["field"] == "page_size"
        for bad in ("garbage", "é", "A" * 5000, token[:-8] + "AAAAAAAA"):
            assert (await refused(method, request(page_token=bad))).fields["field"] == "page_token"
        if method is not stub.ListSecrets:
            assert (await refused(method, request(page_token=token))).fields["field"] == "page_token"
    # The same token twice is the same page.
    pages = [await ask(stub.ListSecrets, pb.ListSecretsRequest(page_size=1, page_token=token)) for _ in range(2)]
    assert pages[0] == pages[1]


# What changes, and what does not.


async def documents(stub: Any, kind: Any) -> list[tuple[str, str]]:
    page = await ask(stub.ListDocuments, pb.ListDocumentsRequest(kind=kind, page_size=500))
    return [(each.name, each.version) for each in page.documents]


async def test_a_grant_lets_launches_begin_at_once_and_withdrawn_stops_their_release(
    served: OwnersVerifier, stub: Any, name: str
) -> None:
    caller = f"spiffe://datacenter.example/orchestrator/{name}"
    begin = verifier_service_pb2.BeginLaunchRequest(
        request_id=str(uuid4()),
        platform=platform_pb2.PlatformEvidence(chain=served.site.platform.chain.to_bytes()),
        workload="web",
    )
    async with served.site.channel(served.launches, name=name) as channel:
        orchestrator = served.site.stub(channel)
        assert (await refused(orchestrator.BeginLaunch, begin)).reason in {
            Reason.CALLER_NOT_ALLOWED,
            Reason.GRANT_REQUIRED,
        }
        await ask(stub.ApplyDocument, apply(grant(name, callers=[caller])))
        begun = await ask(orchestrator.BeginLaunch, begin)
        status = await ask(stub.GetGrantStatus, pb.GetGrantStatusRequest(name=name))
        assert (status.open, status.reason) == (1, reason_pb2.REASON_UNSPECIFIED)
        delete = pb.DeleteDocumentRequest(request_id=str(uuid4()), kind=pb.DOCUMENT_KIND_GRANT, name=name)
        await ask(stub.DeleteDocument, delete)
        release = verifier_service_pb2.ReleaseSecretRequest(
            request_id=str(uuid4()),
            launch_id=begun.launch.launch_id,
            measurement=bytes(48),
            firmware=platform_pb2.FirmwareVersion(api_major=1, api_minor=55, build=24),
        )
        assert (await refused(orchestrator.ReleaseSecret, release)).reason is Reason.GRANT_SUSPENDED
    get = pb.VerifierAdminServiceGetLaunchRequest(launch_id=begun.launch.launch_id)
    shown = (await ask(stub.GetLaunch, get)).launch
    assert (shown.caller, shown.grant) == (caller, name)
    assert [each.rule for each in shown.findings] == ["launch.grant", "launch.measurement"]
    mine = pb.VerifierAdminServiceListLaunchesRequest(grant=name)
    assert [each.launch.launch_id for each in (await ask(stub.ListLaunches, mine)).launches] == [begun.launch.launch_id]


async def test_a_bad_document_and_a_dry_run_change_nothing(stub: Any, name: str) -> None:
    before = await documents(stub, pb.DOCUMENT_KIND_GRANT)
    assert isinstance(await refused(stub.ApplyDocument, apply(grant(name, launches=0))), InvalidInput)
    assert isinstance(await refused(stub.ApplyDocument, apply("kind: Grant")), InvalidInput)
    checked = await ask(stub.ApplyDocument, apply(grant(name), validate_only=True))
    assert (checked.changed, checked.document.HasField("apply_time")) == (True, False)
    assert await documents(stub, pb.DOCUMENT_KIND_GRANT) == before
    await ask(stub.ApplyDocument, apply(grant(name)))
    assert await documents(stub, pb.DOCUMENT_KIND_GRANT) != before


async def test_a_repeat_is_answered_again_and_another_text_is_not(stub: Any, name: str) -> None:
    request = apply(grant(name))
    assert await ask(stub.ApplyDocument, request) == await ask(stub.ApplyDocument, request)
    error = await refused(stub.ApplyDocument, apply(grant(name, "2"), request_id=request.request_id))
    assert error.reason is Reason.REQUEST_ID_REUSED
    conflict = await refused(stub.ApplyDocument, apply(grant(name, launches=11)))
    assert isinstance(conflict, WrongState)
    assert conflict.reason is Reason.DOCUMENT_CONFLICT


async def test_deleting_what_is_not_there_is_not_found(stub: Any, name: str) -> None:
    delete = pb.DeleteDocumentRequest(request_id=str(uuid4()), kind=pb.DOCUMENT_KIND_GRANT, name=name)
    assert isinstance(await refused(stub.DeleteDocument, delete), NotFound)
    erase = pb.DeleteSecretRequest(request_id=str(uuid4()), name=name)
    assert isinstance(await refused(stub.DeleteSecret, erase), NotFound)
    await ask(stub.PutSecret, put(name, b"x"))
    await ask(stub.DeleteSecret, erase)
    assert await ask(stub.DeleteSecret, erase) == pb.DeleteSecretResponse(versions=1)


async def test_a_secret_in_use_is_erased_where_the_request_says_so(stub: Any, name: str) -> None:
    secret = {"guid": str(SECRET_GUID), "source": {"stored": name}}
    await ask(stub.PutSecret, put(name, b"x"))
    await ask(stub.ApplyDocument, apply(json.dumps(workload(name, secrets=[secret]))))
    erase = pb.DeleteSecretRequest(request_id=str(uuid4()), name=name)
    error = await refused(stub.DeleteSecret, erase)
    assert (type(error), error.reason) == (WrongState, Reason.DOCUMENT_CONFLICT)
    erase.allow_used = True
    assert await ask(stub.DeleteSecret, erase) == pb.DeleteSecretResponse(versions=1)


async def test_documents_larger_than_a_launchs_messages_travel(stub: Any, name: str) -> None:
    chips = [f"{n:064x}" for n in range(3500)]
    answer = await ask(stub.ApplyDocument, apply(json.dumps(revocation(name, ceks=chips))))
    assert len(json.loads(answer.document.json)["spec"]["ceks"]) == len(chips)
    with pytest.raises(grpc.aio.AioRpcError):
        await stub.ApplyDocument(apply("x" * MAX_ADMIN_MESSAGE), timeout=10)


# What is never said.


async def test_a_secrets_bytes_are_said_nowhere(served: OwnersVerifier, stub: Any, name: str) -> None:
    value = os.urandom(24)
    request = put(name, value)
    said = [repr(await ask(stub.PutSecret, request))]
    said.append(repr(await refused(stub.PutSecret, put(name, value, request_id="x"))))
    said.append((await refused(stub.PutSecret, put("", value))).message)
    said.append((await refused(stub.PutSecret, put("other", value, request_id=request.request_id))).message)
    said.append((await refused(stub.PutSecret, put(name, value * 1000))).message)
    said.append(repr(await ask(stub.ListSecrets, pb.ListSecretsRequest(page_size=500))))
    token = ""
    while True:
        page = await ask(stub.ListAuditRecords, pb.ListAuditRecordsRequest(page_size=500, page_token=token))
        said.append(repr(page))
        if not (token := page.next_page_token):
            break
    files = [path.read_bytes() for path in (served.site.folder / "state").iterdir() if path.is_file()]
    assert shown_in(value, *said, served.log, *files) == []
    # The same search finds what is there.
    assert shown_in(value, value.hex())
