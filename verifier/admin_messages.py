"""The owner's messages: from fields that were checked to values, and from values back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from types import MappingProxyType
from typing import Protocol

from google.protobuf.timestamp_pb2 import Timestamp

from common import wire
from common.errors import InvalidInput, Reason, SevattestError
from common.rpc.identity import Role, parse_spiffe_id
from common.sev.abi import CHAIN_SIZE
from sevattest.v1 import verifier_admin_service_pb2 as pb
from sevattest.v1 import verifier_service_pb2
from verifier.admin.cases import Judgement, Supposed
from verifier.admin.filed import Filed, Kind
from verifier.admin.launches import OwnedLaunch
from verifier.admin.paging import PageRequest
from verifier.admin.records import ShownRecord
from verifier.documents.text import TEXT_MAX
from verifier.launches.state import State
from verifier.service import STATES, launch_message
from verifier.store.rows import LaunchFilter, StoredSecret

_DIGEST_SIZE = 32
# Of a document's warnings; one that cannot be read may have thousands of problems.
_WARNINGS_MAX, _WARNING_LENGTH = 100, 1000
# More documents than this in one simulation are a whole site's, which is what the folder is for.
SUPPOSED_MAX = 16

_KINDS: Mapping[int, Kind] = MappingProxyType(
    {
        pb.DOCUMENT_KIND_WORKLOAD: Kind.WORKLOAD,
        pb.DOCUMENT_KIND_GRANT: Kind.GRANT,
        pb.DOCUMENT_KIND_PLATFORM: Kind.PLATFORM,
        pb.DOCUMENT_KIND_REVOCATION: Kind.REVOCATION,
    }
)
_KIND_NUMBERS = {kind: pb.DocumentKind.Value(f"DOCUMENT_KIND_{kind.upper()}") for kind in _KINDS.values()}
_STATES: Mapping[int, State] = MappingProxyType({number: state for state, number in STATES.items()})


class Paged(Protocol):
    """A request for a page."""

    @property
    def page_size(self) -> int:
        """How many at the most; 0 leaves it open."""
        ...

    @property
    def page_token(self) -> str:
        """From an earlier answer."""
        ...


def _invalid(field: str, message: str) -> InvalidInput:
    return InvalidInput(Reason.INVALID_ARGUMENT, f"{field}: {message}", field=field)


def page(request: Paged) -> PageRequest:
    """Which page is wanted. Whether the token is one of the listing's is the listing's to say.

    Raises:
        InvalidInput: the page is too large.
    """
    return PageRequest(size=wire.page_size(request.page_size), token=request.page_token)


def kind(number: int) -> Kind:
    """A kind of document.

    Raises:
        InvalidInput: it is none.
    """
    try:
        return _KINDS[number]
    except KeyError:
        raise _invalid("kind", "must be a kind of document") from None


def text(field: str, value: str) -> bytes:
    """A document's text; whether it is a document is for the library to say.

    Raises:
        InvalidInput: there is none, or it is too long.
    """
    return wire.at_most(field, value.encode(), TEXT_MAX)


def orchestrator(field: str, value: str) -> str:
    """A caller: the SPIFFE id of an orchestrator.

    Raises:
        InvalidInput: it is none.
    """
    try:
        if parse_spiffe_id(value).role is Role.ORCHESTRATOR:
            return value
    except SevattestError:
        pass
    raise _invalid(field, "must be spiffe://TRUST-DOMAIN/orchestrator/NAME")


def launch_filter(request: pb.VerifierAdminServiceListLaunchesRequest) -> LaunchFilter:
    """Which launches are wanted.

    Raises:
        InvalidInput: a name, the caller or the state is none.
    """
    state: State | None = None
    if request.state != verifier_service_pb2.LAUNCH_STATE_UNSPECIFIED:
        state = _STATES.get(request.state)
        if state is None:
            raise _invalid("state", "must be a launch's state")
    return LaunchFilter(
        workload=wire.name("workload", request.workload) if request.workload else None,
        state=None if state is None else state.value,
        caller=orchestrator("caller", request.caller) if request.caller else None,
        grant=wire.name("grant", request.grant) if request.grant else None,
    )


def supposed(message: pb.SupposedLaunch) -> Supposed:
    """A launch that nobody began.

    Raises:
        InvalidInput: a field is malformed.
    """
    return Supposed(
        workload=wire.name("supposed.workload", message.workload),
        caller=orchestrator("supposed.caller", message.caller),
        grant=wire.name("supposed.grant", message.grant) if message.grant else None,
        chain=wire.exactly("supposed.chain", message.chain, CHAIN_SIZE),
        digest=wire.exactly("supposed.digest", message.digest, _DIGEST_SIZE) if message.digest else None,
    )


def supposed_texts(values: Iterable[str]) -> tuple[bytes, ...]:
    """Documents to judge by.

    Raises:
        InvalidInput: there are too many, or one is empty or too long.
    """
    texts = tuple(text(f"documents[{index}]", value) for index, value in enumerate(values))
    if len(texts) > SUPPOSED_MAX:
        raise _invalid("documents", f"must be at most {SUPPOSED_MAX}")
    return texts


def document_message(document: Filed) -> pb.Document:
    """One version of a document."""
    return pb.Document(
        kind=_KIND_NUMBERS[document.kind],
        name=document.name,
        version=document.version,
        json=document.json,
        apply_time=_time(document.apply_time),
        sha256=document.sha256,
        file=document.file,
        warnings=[each[:_WARNING_LENGTH] for each in document.warnings[:_WARNINGS_MAX]],
        newer_version=document.newer,
    )


def owned_launch_message(launch: OwnedLaunch) -> pb.OwnedLaunch:
    """One launch, as its owner sees it."""
    return pb.OwnedLaunch(
        launch=launch_message(launch.launch),
        caller=launch.caller,
        findings=[pb.Finding(rule=each.rule, message=each.message) for each in launch.findings],
        grant=launch.grant or "",
        firmware=None if launch.firmware is None else wire.firmware_version_to_proto(launch.firmware),
        audit_id="" if launch.audit_id is None else str(launch.audit_id),
        explanation=launch.explanation or "",
        chip=launch.chip,
    )


def secret_message(secret: StoredSecret) -> pb.StoredSecret:
    """One stored secret, without its value."""
    return pb.StoredSecret(
        name=secret.name, version=secret.version, size=secret.size, create_time=_time(secret.create_time)
    )


def record_message(record: ShownRecord) -> pb.AuditRecord:
    """One audit record."""
    return pb.AuditRecord(
        audit_id=str(record.audit_id),
        time=_time(record.time),
        event=record.event,
        reason=wire.reason_to_proto(record.reason),
        json=record.json,
        number=record.number,
        hash=record.hash,
    )


def judgement_message(judgement: Judgement) -> pb.SimulateResponse:
    """What became of a simulation."""
    return pb.SimulateResponse(
        accepted=judgement.accepted,
        findings=[pb.Finding(rule=each.rule, message=each.message) for each in judgement.findings],
        workload_version=judgement.workload_version or "",
        grant=judgement.grant or "",
    )


def _time(time: datetime | None) -> Timestamp | None:
    return None if time is None else wire.timestamp(time)
