"""No field of an owner's request makes the verifier fail, whatever is in it, or changes what was only to be read.

Every request of the owner's service, found by its descriptor, with each field changed in every way: the answer is an
answer or a refusal of bad input; what reads changes nothing; and a launch under way stays releasable to its own guest.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import yaml

from common.errors import InvalidInput, NotFound, SevattestError, WrongState
from common.rpc.identity import ActingAs, parse_spiffe_id
from sevattest.v1 import platform_pb2
from sevattest.v1 import verifier_admin_service_pb2 as pb
from tests.support.desk import OWNER, Desk, desk
from tests.support.documents import CALLER, grant, revocation, workload
from tests.support.taint import cases
from verifier.admin.desks import owner_desks
from verifier.admin_service import AdminServicer

CHANGING = {"ApplyDocument", "DeleteDocument", "PutSecret", "DeleteSecret"}
FIRMWARE = platform_pb2.FirmwareVersion(api_major=1, api_minor=55, build=24)


def requests(launch_id: str, chain: bytes) -> Mapping[str, list[Any]]:
    """Good requests of every method."""
    supposed = pb.SupposedLaunch(workload="web", caller=CALLER, grant="fleet", chain=chain, digest=bytes(32))
    document = yaml.safe_dump(grant("fleet", "2"))
    shop = yaml.safe_dump(workload("shop"))
    return {
        "ApplyDocument": [
            pb.ApplyDocumentRequest(request_id=str(uuid4()), text=document),
            pb.ApplyDocumentRequest(request_id=str(uuid4()), text=shop, validate_only=True),
        ],
        "GetDocument": [pb.GetDocumentRequest(kind=pb.DOCUMENT_KIND_GRANT, name="fleet", version="1")],
        "ListDocuments": [pb.ListDocumentsRequest(kind=pb.DOCUMENT_KIND_GRANT, page_size=10)],
        "DeleteDocument": [
            pb.DeleteDocumentRequest(request_id=str(uuid4()), kind=pb.DOCUMENT_KIND_REVOCATION, name="old")
        ],
        "GetGrantStatus": [pb.GetGrantStatusRequest(name="fleet")],
        "ListRevocationImpact": [
            pb.ListRevocationImpactRequest(name="old", page_size=10),
            pb.ListRevocationImpactRequest(text=yaml.safe_dump(revocation("new"))),
        ],
        "PutSecret": [pb.PutSecretRequest(request_id=str(uuid4()), name="disk", value=b"a value")],
        "ListSecrets": [pb.ListSecretsRequest(page_size=10)],
        "DeleteSecret": [pb.DeleteSecretRequest(request_id=str(uuid4()), name="disk")],
        "GetLaunch": [pb.VerifierAdminServiceGetLaunchRequest(launch_id=launch_id)],
        "ListLaunches": [pb.VerifierAdminServiceListLaunchesRequest(workload="web", caller=CALLER, grant="fleet")],
        "Simulate": [
            pb.SimulateRequest(launch_id=launch_id, documents=[document], firmware=FIRMWARE),
            pb.SimulateRequest(supposed=supposed, documents=[document], firmware=FIRMWARE),
        ],
        "ListAuditRecords": [pb.ListAuditRecordsRequest(launch_id=launch_id, page_size=10)],
        "ListCheckpoints": [pb.ListCheckpointsRequest(page_size=10)],
        "GetSigningKeys": [pb.GetSigningKeysRequest()],
    }


async def outcome(method: Any, request: Any) -> Any:
    """The answer, or the error that refused."""
    with ActingAs(parse_spiffe_id(OWNER)):
        try:
            return await method(request, None)
        except SevattestError as error:
            return error


async def standing(d: Desk) -> tuple[Any, ...]:
    """What reading may not change."""
    return await d.store.revision(), await d.store.head(), await d.store.ledger("fleet")


METHODS = [method.name for method in pb.DESCRIPTOR.services_by_name["VerifierAdminService"].methods]


@pytest.mark.parametrize("name", METHODS)
async def test_a_changed_request_of_the_owner_is_answered_or_refused(tmp_path: Path, name: str) -> None:
    async with desk(tmp_path) as d:
        await d.apply(grant("fleet", callers=[CALLER]))
        await d.apply(revocation("old"))
        serve: Any = AdminServicer(owner_desks(d.dependencies, d.library))
        put = pb.PutSecretRequest(request_id=str(uuid4()), name="disk", value=b"first")
        assert (await outcome(serve.PutSecret, put)).version == 1
        begun = await d.begin(grant="fleet")
        blob = d.start(begun).measure((await d.digests())[0])
        for request in requests(str(begun.launch.launch_id), d.platform.chain.to_bytes())[name]:
            assert not isinstance(await outcome(getattr(serve, name), request), SevattestError)
            before = await standing(d)
            for case in cases(request, {}):
                if name in CHANGING and case.path != "request_id":
                    case.request.request_id = str(uuid4())
                got = await outcome(getattr(serve, name), case.request)
                if isinstance(got, SevattestError):
                    assert isinstance(got, InvalidInput | NotFound | WrongState), case
            assert name in CHANGING or await standing(d) == before
        assert (await d.release(begun.launch.launch_id, blob)).payload


def test_every_request_of_the_owners_service_is_covered() -> None:
    assert requests("", b"").keys() == set(METHODS)
