"""The owner's calls to their verifier over gRPC (`VerifierAdminService`).

A call that changes something and whose outcome is lost is repeated with the same request id, which the verifier answers
as it answered the first; whoever calls twice on purpose gets another id each time.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime
from typing import Any, Protocol, TypeVar
from uuid import UUID, uuid4

import grpc.aio
from google.protobuf.timestamp_pb2 import Timestamp

from common import wire
from common.errors import InvalidInput, OutcomeUnknown, PlatformFailed, Reason, SevattestError, Unavailable
from common.rpc import MAX_ADMIN_MESSAGE
from common.rpc.client import call, open_channel
from common.rpc.tls import ClientTls
from common.sev.measurement import FirmwareVersion
from orchestrator.drivers.admin_values import (
    Applied,
    AuditRecord,
    Document,
    Finding,
    GrantStatus,
    Judgement,
    LaunchQuery,
    OwnedLaunch,
    Secret,
    SupposedLaunch,
)
from orchestrator.drivers.base import SAYS_NOTHING
from sevattest.v1 import verifier_admin_service_pb2 as pb
from sevattest.v1 import verifier_service_pb2
from sevattest.v1.verifier_admin_service_pb2_grpc import VerifierAdminServiceStub

_PAGE = 200
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.25, 4.0
_LONGEST_CALL_S = 60.0  # the servers' own limit
_Answer = TypeVar("_Answer")


class _PagedAnswer(Protocol):
    next_page_token: str


_Page = TypeVar("_Page", bound=_PagedAnswer)


class VerifierAdmin:
    """A verifier, as its owner calls it."""

    def __init__(self, channel: grpc.aio.Channel, *, timeout: float, new_id: Callable[[], UUID] = uuid4) -> None:
        """Take a channel and the seconds that one call may take, its repeats included."""
        self._stub = VerifierAdminServiceStub(channel)
        self._timeout = timeout
        self._new_id = new_id

    # Documents.

    async def apply(self, text: str) -> Applied:
        """Keep a version of a document (`ApplyDocument`)."""
        request = pb.ApplyDocumentRequest(request_id=str(self._new_id()), text=text)
        answer = await self._change(self._stub.ApplyDocument, request)
        return Applied(document=_document(answer.document), changed=answer.changed)

    async def check(self, text: str) -> Applied:
        """What `apply` would do with a text; nothing is changed."""
        request = pb.ApplyDocumentRequest(request_id=str(self._new_id()), text=text, validate_only=True)
        answer = await self._ask(self._stub.ApplyDocument, request)
        return Applied(document=_document(answer.document), changed=answer.changed)

    async def document(self, kind: str, name: str, version: str = "") -> Document:
        """One version of a document, or the newest (`GetDocument`)."""
        request = pb.GetDocumentRequest(kind=_kind(kind), name=name, version=version)
        return _document((await self._ask(self._stub.GetDocument, request)).document)

    async def documents(self, kind: str) -> Sequence[Document]:
        """All versions of all documents of a kind, by name, the newest first (`ListDocuments`)."""
        request = pb.ListDocumentsRequest(kind=_kind(kind), page_size=_PAGE)
        pages = self._pages(self._stub.ListDocuments, request)
        return [_document(each) async for page in pages for each in page.documents]

    async def delete(self, kind: str, name: str) -> None:
        """Withdraw a document with all its versions (`DeleteDocument`)."""
        request = pb.DeleteDocumentRequest(request_id=str(self._new_id()), kind=_kind(kind), name=name)
        await self._change(self._stub.DeleteDocument, request)

    async def grant_status(self, name: str) -> GrantStatus:
        """How far a grant is spent (`GetGrantStatus`)."""
        answer = await self._ask(self._stub.GetGrantStatus, pb.GetGrantStatusRequest(name=name))
        return GrantStatus(
            document=_document(answer.document) if answer.HasField("document") else None,
            open=answer.open,
            released=answer.released,
            refused=answer.refused,
            reason=_reason(answer.reason),
        )

    async def impact(self, *, text: str = "", name: str = "") -> Sequence[OwnedLaunch]:
        """Launches that a revocation touches, newest first (`ListRevocationImpact`)."""
        request = pb.ListRevocationImpactRequest(text=text, name=name, page_size=_PAGE)
        pages = self._pages(self._stub.ListRevocationImpact, request)
        return [_launch(each) async for page in pages for each in page.launches]

    # Secrets.

    async def put_secret(self, name: str, value: bytes) -> int:
        """Keep a new version of a secret; its version (`PutSecret`)."""
        request = pb.PutSecretRequest(request_id=str(self._new_id()), name=name, value=value)
        return (await self._change(self._stub.PutSecret, request)).version

    async def secrets(self) -> Sequence[Secret]:
        """The newest version of each secret, by name (`ListSecrets`)."""
        pages = self._pages(self._stub.ListSecrets, pb.ListSecretsRequest(page_size=_PAGE))
        return [
            Secret(name=each.name, version=each.version, size=each.size, create_time=_time(each.create_time))
            async for page in pages
            for each in page.secrets
        ]

    async def delete_secret(self, name: str, *, allow_used: bool = False) -> int:
        """Erase a secret with all its versions; how many there were (`DeleteSecret`)."""
        request = pb.DeleteSecretRequest(request_id=str(self._new_id()), name=name, allow_used=allow_used)
        return (await self._change(self._stub.DeleteSecret, request)).versions

    # Launches.

    async def launch(self, launch_id: str) -> OwnedLaunch:
        """One launch (`GetLaunch`)."""
        request = pb.VerifierAdminServiceGetLaunchRequest(launch_id=launch_id)
        return _launch((await self._ask(self._stub.GetLaunch, request)).launch)

    async def launches(self, query: LaunchQuery, limit: int) -> Sequence[OwnedLaunch]:
        """The newest launches, `limit` at the most (`ListLaunches`)."""
        state = f"LAUNCH_STATE_{query.state.upper() or 'UNSPECIFIED'}"
        request = pb.VerifierAdminServiceListLaunchesRequest(
            workload=query.workload,
            state=verifier_service_pb2.LaunchState.Value(state),
            caller=query.caller,
            grant=query.grant,
            page_size=min(_PAGE, limit),
        )
        found: list[OwnedLaunch] = []
        async for page in self._pages(self._stub.ListLaunches, request):
            found += [_launch(each) for each in page.launches]
            if len(found) >= limit:
                break
        return found[:limit]

    async def simulate(
        self,
        *,
        launch_id: str = "",
        supposed: SupposedLaunch | None = None,
        texts: Sequence[str] = (),
        firmware: FirmwareVersion | None = None,
    ) -> Judgement:
        """Judge a past or a supposed launch (`Simulate`)."""
        request = pb.SimulateRequest(
            launch_id=launch_id,
            documents=texts,
            firmware=None if firmware is None else wire.firmware_version_to_proto(firmware),
            supposed=None if supposed is None else _supposed(supposed),
        )
        answer = await self._ask(self._stub.Simulate, request)
        return Judgement(
            accepted=answer.accepted,
            findings=_findings(answer.findings),
            workload_version=answer.workload_version or None,
            grant=answer.grant or None,
        )

    # Evidence.

    async def records(self, launch_id: str = "") -> AsyncIterator[AuditRecord]:
        """Audit records, oldest first, of one launch or all (`ListAuditRecords`)."""
        request = pb.ListAuditRecordsRequest(launch_id=launch_id, page_size=_PAGE)
        async for page in self._pages(self._stub.ListAuditRecords, request):
            for each in page.records:
                yield AuditRecord(
                    number=each.number,
                    hash=each.hash.hex(),
                    audit_id=each.audit_id,
                    time=_time(each.time),
                    event=each.event,
                    reason=_reason(each.reason),
                    json=each.json,
                )

    async def checkpoints(self) -> Sequence[str]:
        """All checkpoints, oldest first, each a compact JWS (`ListCheckpoints`)."""
        pages = self._pages(self._stub.ListCheckpoints, pb.ListCheckpointsRequest(page_size=_PAGE))
        return [each async for page in pages for each in page.checkpoints]

    async def jwks(self) -> str:
        """The public keys, the text of a JWK set (`GetSigningKeys`)."""
        jwks = (await self._ask(self._stub.GetSigningKeys, pb.GetSigningKeysRequest())).jwks
        with _understood():
            json.loads(jwks)
        return jwks

    # Calling.

    async def _ask(self, method: grpc.aio.UnaryUnaryMultiCallable[Any, _Answer], request: Any) -> _Answer:
        return await call(method, request, timeout=min(self._timeout, _LONGEST_CALL_S), mutating=False)

    async def _pages(self, method: grpc.aio.UnaryUnaryMultiCallable[Any, _Page], request: Any) -> AsyncIterator[_Page]:
        while True:
            page = await self._ask(method, request)
            yield page
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def _change(self, method: grpc.aio.UnaryUnaryMultiCallable[Any, _Answer], request: Any) -> _Answer:
        """Call until the outcome is known, or the time is over."""
        ends = time.monotonic() + self._timeout
        unknown: OutcomeUnknown | None = None
        wait = _FIRST_WAIT_S
        while True:
            left = ends - time.monotonic()
            if unknown is not None and left <= wait:
                raise unknown
            if unknown is not None:
                await asyncio.sleep(wait)
                wait = min(2 * wait, _LONGEST_WAIT_S)
            try:
                return await call(method, request, timeout=min(ends - time.monotonic(), _LONGEST_CALL_S), mutating=True)
            except OutcomeUnknown as error:
                unknown = error
            except Unavailable:
                # Not reached this time; what became of the first is still unknown.
                if unknown is None:
                    raise
            except SevattestError as error:
                if unknown is not None and error.reason in SAYS_NOTHING:
                    raise unknown from error
                raise


@asynccontextmanager
async def open_admin(target: str, tls: ClientTls, *, timeout: float) -> AsyncIterator[VerifierAdmin]:  # noqa: ASYNC109 -- for each call
    """A verifier's owner's listener at `HOST:PORT`, for calls of `timeout` seconds each."""
    async with open_channel(target, tls, message=MAX_ADMIN_MESSAGE) as channel:
        yield VerifierAdmin(channel, timeout=timeout)


def _kind(kind: str) -> pb.DocumentKind.ValueType:
    return pb.DocumentKind.Value(f"DOCUMENT_KIND_{kind.upper()}")


@contextmanager
def _understood() -> Iterator[None]:
    """Say of the verifier that its answer makes no sense, or is one of a later version.

    Raises:
        PlatformFailed: `INTERNAL`.
    """
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, InvalidInput) as error:
        raise PlatformFailed(Reason.INTERNAL, f"the verifier's answer cannot be used: {error}") from error


@_understood()
def _document(message: pb.Document) -> Document:
    if message.json:
        json.loads(message.json)["spec"].items()
    return Document(
        kind=pb.DocumentKind.Name(message.kind).removeprefix("DOCUMENT_KIND_").lower(),
        name=message.name,
        version=message.version,
        json=message.json,
        sha256=message.sha256,
        file=message.file,
        apply_time=_time(message.apply_time) if message.HasField("apply_time") else None,
        warnings=tuple(message.warnings),
        newer_version=message.newer_version,
    )


@_understood()
def _launch(message: pb.OwnedLaunch) -> OwnedLaunch:
    launch = message.launch
    firmware = wire.firmware_version(message) if message.HasField("firmware") else None
    return OwnedLaunch(
        launch_id=launch.launch_id,
        workload=launch.workload,
        workload_version=launch.workload_version,
        state=verifier_service_pb2.LaunchState.Name(launch.state).removeprefix("LAUNCH_STATE_").lower(),
        reason=_reason(launch.reason),
        caller=message.caller,
        grant=message.grant or None,
        generation=launch.platform.generation,
        fingerprint=launch.platform.fingerprint,
        chip=message.chip or None,
        firmware=None if firmware is None else str(firmware),
        create_time=_time(launch.create_time),
        expire_time=_time(launch.expire_time),
        end_time=_time(launch.end_time) if launch.HasField("end_time") else None,
        audit_id=message.audit_id or None,
        findings=_findings(message.findings),
        explanation=message.explanation or None,
    )


def _findings(messages: Any) -> tuple[Finding, ...]:
    return tuple(Finding(rule=each.rule, message=each.message) for each in messages)


def _supposed(launch: SupposedLaunch) -> pb.SupposedLaunch:
    return pb.SupposedLaunch(
        workload=launch.workload,
        caller=launch.caller,
        grant=launch.grant,
        chain=launch.chain,
        digest=launch.digest,
    )


def _reason(value: int) -> str | None:
    reason = wire.reason_from_proto(value)
    return None if reason is None else reason.value


@_understood()
def _time(message: Timestamp) -> datetime:
    return message.ToDatetime(tzinfo=UTC)
