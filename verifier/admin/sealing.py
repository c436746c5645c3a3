"""What `sev-verifier documents` does: hold the applied documents against the audit log, and seal them anew, knowingly.

Every document that is applied or deleted has its record, with the SHA-256 of its text. So the log says what should be
there, as far as the log itself is what was written: its hashes are checked here, its signatures by `sevattest owner
audit verify`.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar
from uuid import uuid4

import msgspec

from common.audit.chain import GENESIS, broken, verify_chain
from common.clock import SystemClock
from common.errors import Reason, Refused, WrongState
from common.telemetry.log import Log
from verifier.launches.records import AuditEvent, Recorder
from verifier.launches.timekeeper import Timekeeper
from verifier.library.sealed import DocumentSeal, spelled, stands_twice
from verifier.store.base import Store
from verifier.store.rows import ChainedRecord, DocumentRow, DocumentSet, Outcome

_PAGE = 500  # records
# That a record of them is, so that it fits into a page of the log.
_DIFFERENCES_MAX = 1000
_PLAIN = re.compile(r"[A-Za-z0-9.+_-]+")

_Place = tuple[str, str, str]  # kind, name, version
_Body = TypeVar("_Body")


class _Deleted(msgspec.Struct):
    kind: str
    name: str


class _Applied(_Deleted):
    version: str
    sha256: str


class _Found(_Deleted):
    version: str
    sha256: str | None


class _Sealed(msgspec.Struct):
    documents: list[_Found]


@dataclass(frozen=True, kw_only=True)
class Review:
    """The applied documents, and what is to be said of them.

    Attributes:
        documents: as they are in the store.
        problem: why they are not as they were sealed; None where they are.
        logged: the SHA-256 of each document's text that should be there by the audit log, lower-case hex.
        log_problem: from which record on the log does not hold, and was not asked; None where its hashes hold.
    """

    documents: DocumentSet
    problem: str | None
    logged: Mapping[_Place, str]
    log_problem: str | None

    @property
    def digest(self) -> str:
        """Names exactly these documents, 64 lower-case hex digits."""
        return hashlib.sha256(spelled(self.documents)).hexdigest()

    @property
    def there(self) -> Mapping[_Place, str]:
        """The SHA-256 of each document's text, lower-case hex."""
        return {_place(row): _sha256(row) for row in self.documents.rows}

    @property
    def differences(self) -> Mapping[_Place, str | None]:
        """What is not as in the log, as it is; None for what is missing."""
        there, logged = self.there, self.logged
        return {
            place: there.get(place)
            for place in sorted(there.keys() | logged.keys())
            if there.get(place) != logged.get(place)
        }

    @property
    def lines(self) -> Iterator[str]:
        """A line for each document that is there or should be: which, the SHA-256 of its text, what the log says."""
        if stands_twice(self.documents):
            yield "A DOCUMENT STANDS TWICE under one version, and only one of both is shown: the table was made anew"
        there = self.there
        for place in sorted(there.keys() | self.logged.keys()):
            found, logged = there.get(place), self.logged.get(place)
            if found is None:
                remark = "MISSING, the audit log has it"
            elif logged is None:
                remark = "NOT IN THE AUDIT LOG"
            else:
                remark = "as in the audit log" if found == logged else f"CHANGED, the audit log has {_shown(logged)}"
            # Somebody may have written these: no terminal is told what to do by them.
            yield f"{' '.join(map(_shown, place))}  {_shown(found or logged or '')}  {remark}"


async def review(store: Store, seal: DocumentSeal) -> Review:
    """Look at what is in the store.

    Raises:
        Unavailable: the store has no answer.
    """
    documents = await store.documents()
    logged: dict[_Place, str] = {}
    log_problem, head, number = None, GENESIS, 0
    while page := await store.records(None, after=number, limit=_PAGE):
        number = page[-1].number
        try:
            head = verify_chain((each.link for each in page), head)
            for each in page:
                if each.record.event in _EVENTS:
                    _note(logged, each)
        except Refused as error:
            log_problem = error.message
            break
    return Review(documents=documents, problem=seal.problem(documents), logged=logged, log_problem=log_problem)


async def seal_reviewed(store: Store, seal: DocumentSeal, found: Review, digest: str, log: Log) -> None:
    """Seal documents that somebody has looked at, with a record of which.

    Args:
        store: where they are.
        seal: the seal.
        found: the documents as they are now.
        digest: of those that were looked at.
        log: the owner's.

    Raises:
        WrongState: these are not those, or more of them than a record takes are not as in the log
            (DOCUMENT_CONFLICT); nothing was sealed.
        Unavailable: the store has no answer.
    """
    if stands_twice(found.documents):
        raise WrongState(
            Reason.DOCUMENT_CONFLICT,
            "--seal: a document stands in the store twice under one version: take the rows that are not yours away",
        )
    differences = found.differences
    if len(differences) > _DIFFERENCES_MAX:
        raise WrongState(
            Reason.DOCUMENT_CONFLICT, f"--seal: more than {_DIFFERENCES_MAX} documents are not what the audit log says"
        )
    outcome = None
    if hmac.compare_digest(digest.encode(), found.digest.encode()):
        records = Recorder(log, uuid4)
        audit = records.row(
            AuditEvent.DOCUMENTS_SEALED,
            time=await Timekeeper(SystemClock(), store.last_time).now(),
            caller=None,
            problem=found.problem,
            documents=[
                {"kind": kind, "name": name, "version": version, "sha256": sha256}
                for (kind, name, version), sha256 in differences.items()
            ],
        )
        outcome = await store.seal_documents(found.documents, seal, audit)
        if outcome is Outcome.DONE:
            records.log(audit)
    if outcome is not Outcome.DONE:
        raise WrongState(
            Reason.DOCUMENT_CONFLICT, "--seal: the documents are not those that were shown with this digest: look again"
        )


def _note(logged: dict[_Place, str], chained: ChainedRecord) -> None:
    """Bring what should be there up to one record."""
    match chained.record.event:
        case AuditEvent.DOCUMENT_APPLIED:
            applied = _body(chained, _Applied)
            logged[applied.kind, applied.name, applied.version] = applied.sha256
        case AuditEvent.DOCUMENT_DELETED:
            deleted = _body(chained, _Deleted)
            for place in [each for each in logged if each[:2] == (deleted.kind, deleted.name)]:
                del logged[place]
        case _:
            for each in _body(chained, _Sealed).documents:
                if each.sha256 is None:
                    logged.pop((each.kind, each.name, each.version), None)
                else:
                    logged[each.kind, each.name, each.version] = each.sha256


def _body(chained: ChainedRecord, form: type[_Body]) -> _Body:
    try:
        return msgspec.json.decode(chained.record.body, type=form)
    except (ValueError, RecursionError):  # msgspec's own error is a ValueError
        raise broken(chained.number, "is none that a verifier writes") from None


_EVENTS = frozenset({AuditEvent.DOCUMENT_APPLIED, AuditEvent.DOCUMENT_DELETED, AuditEvent.DOCUMENTS_SEALED})


def _shown(text: str) -> str:
    return text if _PLAIN.fullmatch(text) else ascii(text)


def _place(row: DocumentRow) -> _Place:
    return row.kind, row.name, row.version


def _sha256(row: DocumentRow) -> str:
    return hashlib.sha256(row.text).hexdigest()
