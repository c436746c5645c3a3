"""`VerifierAdminService`: from the owner's messages to values, to the desks, and back. Nothing is decided here.

Every field of a request goes through `common.wire` or `verifier.admin_messages` first. The caller is the identity that
the gatekeeper established. What may change anything runs shielded, as in `verifier.service`.
"""

from __future__ import annotations

from typing import Any

import grpc

from common import wire
from common.errors import InvalidInput, Reason
from common.rpc import MAX_ADMIN_MESSAGE
from common.rpc.identity import caller
from common.rpc.server import Limits, Server
from common.rpc.steps import shielded
from sevattest.v1 import verifier_admin_service_pb2 as pb
from sevattest.v1 import verifier_admin_service_pb2_grpc
from verifier import admin_messages as messages
from verifier.admin.desks import Desks
from verifier.admin.requests import Asked

_Context = grpc.aio.ServicerContext[Any, Any]

# Of the owner's listener: documents travel there.
LIMITS = Limits(message=MAX_ADMIN_MESSAGE)


class AdminServicer(verifier_admin_service_pb2_grpc.VerifierAdminServiceServicer):
    """Serves the owner."""

    def __init__(self, desks: Desks) -> None:
        """Take those who do the work."""
        self._desks = desks

    # Documents.

    async def ApplyDocument(  # noqa: N802 -- the RPC's name
        self, request: pb.ApplyDocumentRequest, _context: _Context
    ) -> pb.ApplyDocumentResponse:
        """Keep a version of a document, or only check it."""
        asked, text = _asked(request.request_id), messages.text("text", request.text)
        desk = self._desks.documents
        applied = await (desk.check(text) if request.validate_only else shielded(desk.apply(asked, text)))
        return pb.ApplyDocumentResponse(document=messages.document_message(applied.document), changed=applied.changed)

    async def GetDocument(  # noqa: N802 -- the RPC's name
        self, request: pb.GetDocumentRequest, _context: _Context
    ) -> pb.GetDocumentResponse:
        """Read one document."""
        document = await self._desks.documents.get(
            messages.kind(request.kind), wire.name("name", request.name), request.version or None
        )
        return pb.GetDocumentResponse(document=messages.document_message(document))

    async def ListDocuments(  # noqa: N802 -- the RPC's name
        self, request: pb.ListDocumentsRequest, _context: _Context
    ) -> pb.ListDocumentsResponse:
        """List documents of one kind."""
        found = await self._desks.documents.list(messages.kind(request.kind), messages.page(request))
        return pb.ListDocumentsResponse(
            documents=[messages.document_message(each) for each in found.items], next_page_token=found.next_token
        )

    async def DeleteDocument(  # noqa: N802 -- the RPC's name
        self, request: pb.DeleteDocumentRequest, _context: _Context
    ) -> pb.DeleteDocumentResponse:
        """Withdraw a document."""
        kind, name = messages.kind(request.kind), wire.name("name", request.name)
        await shielded(self._desks.documents.delete(_asked(request.request_id), kind, name))
        return pb.DeleteDocumentResponse()

    async def GetGrantStatus(  # noqa: N802 -- the RPC's name
        self, request: pb.GetGrantStatusRequest, _context: _Context
    ) -> pb.GetGrantStatusResponse:
        """Say how far a grant is spent."""
        status = await self._desks.grants.status(wire.name("name", request.name))
        return pb.GetGrantStatusResponse(
            document=None if status.document is None else messages.document_message(status.document),
            open=status.spent.open,
            released=status.spent.released,
            refused=status.spent.refused,
            reason=wire.reason_to_proto(status.reason),
        )

    async def ListRevocationImpact(  # noqa: N802 -- the RPC's name
        self, request: pb.ListRevocationImpactRequest, _context: _Context
    ) -> pb.ListRevocationImpactResponse:
        """List the launches that a revocation touches."""
        found = await self._desks.impact.touched(
            text=messages.text("text", request.text) if request.text else b"",
            name=wire.name("name", request.name) if request.name else "",
            page=messages.page(request),
        )
        return pb.ListRevocationImpactResponse(
            launches=[messages.owned_launch_message(each) for each in found.items], next_page_token=found.next_token
        )

    # Secrets.

    async def PutSecret(  # noqa: N802 -- the RPC's name
        self, request: pb.PutSecretRequest, _context: _Context
    ) -> pb.PutSecretResponse:
        """Keep a new version of a secret."""
        asked, name = _asked(request.request_id), wire.name("name", request.name)
        return pb.PutSecretResponse(version=await shielded(self._desks.secrets.put(asked, name, request.value)))

    async def ListSecrets(  # noqa: N802 -- the RPC's name
        self, request: pb.ListSecretsRequest, _context: _Context
    ) -> pb.ListSecretsResponse:
        """List names and versions of secrets."""
        found = await self._desks.secrets.list(messages.page(request))
        return pb.ListSecretsResponse(
            secrets=[messages.secret_message(each) for each in found.items], next_page_token=found.next_token
        )

    async def DeleteSecret(  # noqa: N802 -- the RPC's name
        self, request: pb.DeleteSecretRequest, _context: _Context
    ) -> pb.DeleteSecretResponse:
        """Erase a secret."""
        asked, name = _asked(request.request_id), wire.name("name", request.name)
        erased = await shielded(self._desks.secrets.delete(asked, name, allow_used=request.allow_used))
        return pb.DeleteSecretResponse(versions=erased)

    # Launches.

    async def GetLaunch(  # noqa: N802 -- the RPC's name
        self, request: pb.VerifierAdminServiceGetLaunchRequest, _context: _Context
    ) -> pb.VerifierAdminServiceGetLaunchResponse:
        """Read one launch."""
        launch = await self._desks.launches.get(wire.launch_id(request.launch_id))
        return pb.VerifierAdminServiceGetLaunchResponse(launch=messages.owned_launch_message(launch))

    async def ListLaunches(  # noqa: N802 -- the RPC's name
        self, request: pb.VerifierAdminServiceListLaunchesRequest, _context: _Context
    ) -> pb.VerifierAdminServiceListLaunchesResponse:
        """List launches of all callers."""
        found = await self._desks.launches.list(messages.launch_filter(request), messages.page(request))
        return pb.VerifierAdminServiceListLaunchesResponse(
            launches=[messages.owned_launch_message(each) for each in found.items], next_page_token=found.next_token
        )

    async def Simulate(  # noqa: N802 -- the RPC's name
        self, request: pb.SimulateRequest, _context: _Context
    ) -> pb.SimulateResponse:
        """Judge a past or supposed launch."""
        if bool(request.launch_id) == request.HasField("supposed"):
            raise InvalidInput(Reason.INVALID_ARGUMENT, "launch_id: give either it or supposed", field="launch_id")
        firmware = wire.firmware_version(request) if request.HasField("firmware") else None
        texts = messages.supposed_texts(request.documents)
        desk = self._desks.simulate
        if request.launch_id:
            return messages.judgement_message(await desk.past(wire.launch_id(request.launch_id), texts, firmware))
        return messages.judgement_message(await desk.supposed(messages.supposed(request.supposed), texts, firmware))

    # Evidence.

    async def ListAuditRecords(  # noqa: N802 -- the RPC's name
        self, request: pb.ListAuditRecordsRequest, _context: _Context
    ) -> pb.ListAuditRecordsResponse:
        """List audit records."""
        launch_id = wire.launch_id(request.launch_id) if request.launch_id else None
        found = await self._desks.records.records(launch_id, messages.page(request))
        return pb.ListAuditRecordsResponse(
            records=[messages.record_message(each) for each in found.items], next_page_token=found.next_token
        )

    async def ListCheckpoints(  # noqa: N802 -- the RPC's name
        self, request: pb.ListCheckpointsRequest, _context: _Context
    ) -> pb.ListCheckpointsResponse:
        """List checkpoints of the audit log."""
        found = await self._desks.records.checkpoints(messages.page(request))
        return pb.ListCheckpointsResponse(checkpoints=found.items, next_page_token=found.next_token)

    async def GetSigningKeys(  # noqa: N802 -- the RPC's name
        self, _request: pb.GetSigningKeysRequest, _context: _Context
    ) -> pb.GetSigningKeysResponse:
        """Give the public keys."""
        return pb.GetSigningKeysResponse(jwks=self._desks.records.jwks())


def add_to(server: Server, servicer: AdminServicer) -> None:
    """Serve it on the owner's listener."""
    server.add(verifier_admin_service_pb2_grpc.add_VerifierAdminServiceServicer_to_server, servicer)


def _asked(request_id: str) -> Asked:
    return Asked(caller=caller().spiffe_id, request_id=wire.request_id(request_id))
