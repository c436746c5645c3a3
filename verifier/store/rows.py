"""The rows that go into a store and come out of it, and the transactions that change it.

States are text that `verifier.launches.state` gives a meaning to; what a grant still allows is decided by a function
that comes with the transaction; sealed blobs are bytes that only `verifier.keys` can open.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from typing import Protocol
from uuid import UUID

from common.audit.chain import Head, Link, record_fields


@dataclass(frozen=True, kw_only=True)
class RequestKey:
    """A request id in the scope that it is unique in: one caller, one method."""

    caller: str
    method: str
    request_id: UUID


@dataclass(frozen=True, kw_only=True)
class RequestRow:
    """A request that changed something.

    Attributes:
        key: who asked, what, under which id.
        content: SHA-256 of what was asked, 32 bytes.
        launch_id: the launch that it changed.
    """

    key: RequestKey
    content: bytes
    launch_id: UUID


@dataclass(frozen=True, kw_only=True)
class AuditRow:
    """One audit record.

    Attributes:
        audit_id: its id, which refusals carry.
        time: when it was written.
        event: what happened, for example `launch.released`.
        launch_id: the launch, where there is one.
        caller: who asked, as a SPIFFE id; None for what the verifier does by itself.
        reason: the reason's name, where the event is a refusal.
        body: everything else, as a JSON object, without secrets.
    """

    audit_id: UUID
    time: datetime
    event: str
    launch_id: UUID | None
    caller: str | None
    reason: str | None
    body: str

    @property
    def members(self) -> dict[str, str | int | None]:
        """The record as the log's chain hashes it, and as it is stored: in the order of the columns."""
        return record_fields(
            audit_id=self.audit_id,
            time=self.time,
            event=self.event,
            launch_id=self.launch_id,
            caller=self.caller,
            reason=self.reason,
            body=self.body,
        )


@dataclass(frozen=True, kw_only=True)
class ChainedRecord:
    """An audit record in its place in the log (`common.audit.chain`).

    Attributes:
        number: from 1, without gaps.
        hash: over the hash before it and the record, 32 bytes.
        record: the record.
    """

    number: int
    hash: bytes
    record: AuditRow

    @property
    def link(self) -> Link:
        """The record as the chain is verified by it."""
        return Link(number=self.number, hash=self.hash, fields=self.record.members)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A signed statement of the log's head.

    Attributes:
        number: of the record that was the last one.
        token: compact JWS.
    """

    number: int
    token: str


@dataclass(frozen=True, kw_only=True)
class SealedKeys:
    """TEK and TIK of an open launch, as `verifier.keys` sealed them."""

    key_id: bytes
    tek: bytes = field(repr=False)
    tik: bytes = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Packet:
    """What was released: ciphertext for one guest, and the words that go with it.

    Attributes:
        header: 52 bytes.
        payload: a multiple of 16 bytes.
        receipt: the receipt, a JSON object.
    """

    header: bytes = field(repr=False)
    payload: bytes = field(repr=False)
    receipt: str


@dataclass(frozen=True, kw_only=True)
class LaunchRow:
    """One launch, as it is stored.

    Attributes:
        launch_id: a random UUID.
        caller: the only caller that sees it, as a SPIFFE id.
        state: a value of `verifier.launches.state.State`.
        reason: why it ended early, a reason's name.
        terms_id: SHA-256 of the terms that were frozen for it.
        platform_id: SHA-256 of the verified chain (PDH, PEK, OCA, CEK) that it is bound to.
        keys: TEK and TIK, sealed; None unless the launch is open.
        end_time: when it reached a final state.
        measurement: the measurement blob that decided, 48 bytes.
        digest: the launch digest that it proved, 32 bytes; None unless the launch is released.
        packet: what was released; None before, and again a day after.
        audit_id: the audit record of how it ended.
        grant: name of the grant that it spends; None for none.
        chip_id: lower-case hex, where the host gave one; for revocations.
        oca: fingerprint of the platform's owner certificate, lower-case hex.
        firmware: the firmware's version when it ended: proven for a released launch, the host's word for a refused one.
    """

    launch_id: UUID
    caller: str
    state: str
    reason: str | None = None
    workload: str
    workload_version: str
    terms_id: bytes
    platform_id: bytes
    generation: str
    fingerprint: str
    policy: int
    godh: bytes = field(repr=False)
    session: bytes = field(repr=False)
    pdh_fingerprint: bytes
    keys: SealedKeys | None
    create_time: datetime
    expire_time: datetime
    end_time: datetime | None = None
    measurement: bytes | None = None
    digest: bytes | None = None
    packet: Packet | None = None
    audit_id: UUID | None = None
    grant: str | None = None
    chip_id: str | None = None
    oca: str
    firmware: tuple[int, int, int] | None = None


@dataclass(frozen=True, kw_only=True)
class LedgerRow:
    """How far a grant is spent. A new grant's is all zero.

    Attributes:
        open: launches between begin and their end.
        released: launches that were released.
        refused: launches that were refused.
        rate_time: what `verifier.documents.rate` keeps the rate by, microseconds since 1970.
    """

    open: int = 0
    released: int = 0
    refused: int = 0
    rate_time: int = 0


@dataclass(frozen=True, kw_only=True)
class Known:
    """What a store knows at the moment at which something is to be decided.

    Attributes:
        time: the latest time that any transaction carried; None in a new store.
        revision: of the documents.
        request: what was kept under the key of the request that is to be decided; None where it is new.
        launch: the launch that it is about; None for none.
        pdh_oldest: the oldest firmware that the launch's PDH was used under; None for one that was never sighted.
        ledger: of the grant that was asked for; all zero for a new one, and where none was.
    """

    time: datetime | None
    revision: int
    request: RequestRow | None
    launch: LaunchRow | None = None
    pdh_oldest: tuple[int, int, int] | None = None
    ledger: LedgerRow = LedgerRow()


@dataclass(frozen=True, kw_only=True)
class Spending:
    """What a transaction does to a grant's ledger, which no other one changes meanwhile.

    Attributes:
        grant: the grant's name.
        change: the ledger as it becomes; raises a `SevattestError` where it must not, and then nothing is changed.
    """

    grant: str
    change: Callable[[LedgerRow], LedgerRow]


@dataclass(frozen=True, kw_only=True)
class PdhSighting:
    """A PDH and the firmware that a measurement proved it was used under.

    Attributes:
        pdh_fingerprint: 32 bytes.
        firmware: API major, API minor, build.
    """

    pdh_fingerprint: bytes
    firmware: tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Opening:
    """A new launch with all that comes into being with it.

    Attributes:
        launch: the launch.
        terms: what was frozen for it; stored once for all launches that share it.
        chain: the verified chain, 8336 bytes; stored once for all launches on that platform.
        request: the request that opens it.
        audit: the record of it.
        open_cap: how many open launches its caller may have, this one included.
        revision: of the documents that it was judged by.
        spending: the grant that it spends; None for none.
    """

    launch: LaunchRow
    terms: bytes
    chain: bytes
    request: RequestRow
    audit: AuditRow
    open_cap: int
    revision: int
    spending: Spending | None = None


@dataclass(frozen=True, kw_only=True)
class Move:
    """The end of a launch: a compare-and-set, the erasure of its keys and the audit record, in one transaction.

    Attributes:
        launch_id: the launch.
        expected: the state that it must be in.
        to: the state that it gets.
        time: now; becomes the launch's end.
        in_time: the launch must not have expired at `time`.
        overdue: the launch must have expired at `time`.
        reason: a reason's name, where the end is a refusal or the caller's claim.
        measurement: the measurement blob that decided.
        digest: the launch digest that it proved.
        packet: what is released.
        generated: a generated secret, sealed, for the owner to find again.
        request: the request that asked for it; None for what the verifier does by itself.
        audit: the record of it.
        revision: of the documents that it was judged by; None where it was judged by none.
        spending: what it does to the ledger of the launch's grant; None where it spends none.
        firmware: what becomes the row's.
        sighting: keeps the oldest firmware that a PDH was used under; None for no sighting.
    """

    launch_id: UUID
    expected: str
    to: str
    time: datetime
    in_time: bool = False
    overdue: bool = False
    reason: str | None = None
    measurement: bytes | None = None
    digest: bytes | None = None
    packet: Packet | None = None
    generated: bytes | None = field(default=None, repr=False)
    request: RequestRow | None = None
    audit: AuditRow
    revision: int | None = None
    spending: Spending | None = None
    firmware: tuple[int, int, int] | None = None
    sighting: PdhSighting | None = None


class Outcome(Enum):
    """What became of a transaction that others may race for."""

    DONE = "done"
    LOST = "lost"  # the launch was not in the expected state, or its time was not as expected
    REQUEST_TAKEN = "request taken"  # the request id is on file already
    CAP_REACHED = "cap reached"
    DOCUMENTS_CHANGED = "documents changed"  # they are of another revision than the one that was judged by
    CONFLICT = "conflict"  # a document of this kind, name and version has other content
    UNCHANGED = "unchanged"  # the document is on file as it is


@dataclass(frozen=True, kw_only=True)
class AdminRequest:
    """A request of the owner's that changed something.

    Attributes:
        key: who asked, what, under which id.
        content: SHA-256 of what was asked, 32 bytes.
        answer: what was answered, as a JSON object, to answer it again.
    """

    key: RequestKey
    content: bytes
    answer: str


@dataclass(frozen=True, kw_only=True)
class DocumentRow:
    """One version of one document that the owner applied.

    Attributes:
        kind: `Workload`, `Grant`, `Platform` or `Revocation`.
        name: its name.
        version: its version.
        text: as it was applied.
        is_json: whether the text is JSON and not YAML.
        apply_time: when.
    """

    kind: str
    name: str
    version: str
    text: bytes
    is_json: bool
    apply_time: datetime


@dataclass(frozen=True, kw_only=True)
class DocumentSet:
    """All documents that owners applied, at one moment, and what they were sealed by.

    Attributes:
        revision: of the documents.
        rows: all versions of all documents that were not deleted.
        change: the last record of a change of documents; `GENESIS` before the first.
        tag: what the set was sealed by, 32 bytes; None where it never was.
    """

    revision: int
    rows: tuple[DocumentRow, ...]
    change: Head
    tag: bytes | None


class DocumentSeal(Protocol):
    """Tells a set of documents that was sealed from any other; comes with each transaction that changes documents."""

    def require(self, found: DocumentSet) -> None:
        """Return if the set is as it was sealed.

        Raises:
            Unavailable: it is not (DOCUMENTS_NOT_SEALED), and then nothing is changed.
        """
        ...

    def tag(self, made: DocumentSet) -> bytes:
        """What a set is sealed by, 32 bytes, whatever tag it has."""
        ...

    def next_revision(self, changed: DocumentSet) -> int:
        """The revision of a set that was changed, and still has the one of before."""
        ...


@dataclass(frozen=True, kw_only=True)
class StoredSecret:
    """One version of a secret.

    Attributes:
        name: its name.
        version: from 1.
        sealed: as `verifier.keys` sealed it, bound to name and version.
        size: bytes of the secret itself.
        create_time: when it was stored.
    """

    name: str
    version: int
    sealed: bytes = field(repr=False)
    size: int
    create_time: datetime


@dataclass(frozen=True, kw_only=True)
class SealedBlob:
    """A sealed blob wherever the store has one, for re-wrapping.

    Attributes:
        place: `launch`, launch id, `tek`, `tik` or `generated`; or `secret`, name, version; or `identity`, name.
        sealed: the blob.
    """

    place: tuple[str, ...]
    sealed: bytes = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class LaunchFilter:
    """Which launches are listed; None allows any."""

    workload: str | None = None
    state: str | None = None
    caller: str | None = None
    grant: str | None = None
