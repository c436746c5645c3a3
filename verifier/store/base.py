"""What the verifier asks of a store.

A store keeps launches, the requests that made them move, what was frozen for them, how far grants are spent, the
owner's documents and secrets, and the audit log. It judges nothing. Each method is one transaction, durable when it
returns. Every failure of the store itself is `Unavailable(STORE_UNAVAILABLE)`: the transaction was kept as a whole or
not at all, and not at all unless the disk or the link failed in the very commit. Whoever repeats the request finds out.

Several processes may share a store (replicas over PostgreSQL). So a move is a compare-and-set that says what it
expects, and never a read followed by a write; and what was judged by the owner's documents says by which revision of
them: a transaction that comes after the documents changed is not carried out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Protocol
from uuid import UUID

from verifier.store.rows import (
    AdminRequest,
    AuditRow,
    ChainedRecord,
    Checkpoint,
    DocumentRow,
    DocumentSeal,
    DocumentSet,
    Known,
    LaunchFilter,
    LaunchRow,
    LedgerRow,
    Move,
    Opening,
    Outcome,
    RequestKey,
    RequestRow,
    SealedBlob,
    Spending,
    StoredSecret,
)


class Store(Protocol):
    """Launches, requests, frozen terms and audit records, durable and atomic."""

    async def last_time(self) -> datetime | None:
        """The latest time that any transaction carried; None in a new store."""
        ...

    async def known(self, key: RequestKey, launch_id: UUID | None = None, *, grant: str | None = None) -> Known:
        """All that a decision begins with, in one look.

        Args:
            key: of the request that is to be decided.
            launch_id: the launch that it is about. It is seen as it was when the request was looked for, or later.
            grant: the grant whose ledger it may be about, seen at the same moment as the request.
        """
        ...

    async def request(self, key: RequestKey) -> RequestRow | None:
        """The request that was kept under `key`."""
        ...

    async def launch(self, launch_id: UUID) -> LaunchRow | None:
        """One launch."""
        ...

    async def generated(self, launch_id: UUID) -> bytes | None:
        """The generated secrets of one launch, sealed; None where it has none."""
        ...

    async def terms(self, terms_id: bytes) -> bytes:
        """The terms that were frozen under this id."""
        ...

    async def chain(self, platform_id: bytes) -> bytes:
        """The verified chain of a platform, 8336 bytes."""
        ...

    async def open_launch(self, opening: Opening) -> Outcome:
        """Write a new launch down, and spend its grant.

        Returns:
            `DONE`, `REQUEST_TAKEN`, `CAP_REACHED` or `DOCUMENTS_CHANGED`; only the first changes anything.

        Raises:
            SevattestError: what the spending raises; nothing is changed.
        """
        ...

    async def move(self, move: Move) -> Outcome:
        """End a launch, and settle with its grant.

        Returns:
            `DONE`, `LOST`, `REQUEST_TAKEN` or `DOCUMENTS_CHANGED`; only the first changes anything.
        """
        ...

    async def record(self, audit: AuditRow, spending: Spending | None = None) -> None:
        """Write an audit record that belongs to no move, and settle with a grant where the record says so."""
        ...

    async def overdue(self, time: datetime, state: str, limit: int, *, grant: str | None = None) -> Sequence[UUID]:
        """Launches in `state` whose expiry is not after `time`, oldest first; of one grant where it is given."""
        ...

    async def count_open(self) -> int:
        """How many launches are open, those among them whose time ran out and that nobody has looked at since."""
        ...

    async def launches(
        self, which: LaunchFilter, *, before: UUID | None, limit: int, until: UUID | None = None
    ) -> Sequence[LaunchRow]:
        """Launches, newest first; a page after the launch `before`, up to and with the launch `until`."""
        ...

    async def launch_behind(self, before: UUID | None, count: int) -> UUID | None:
        """The launch that is number `count` after the launch `before`, newest first; None where there are fewer.

        Args:
            before: a launch; None counts from the newest.
            count: 1 or more.
        """
        ...

    async def ledger(self, grant: str, *, at: datetime | None = None) -> LedgerRow:
        """How far a grant is spent.

        Args:
            grant: its name.
            at: open launches whose expiry is not after it are left out: begin ends them before it is short of room.
        """
        ...

    async def sighted(self, pdh_fingerprint: bytes) -> tuple[int, int, int] | None:
        """The oldest firmware that a PDH was used under; None for one that was never sighted."""
        ...

    # The owner's documents, secrets and keys.

    async def revision(self) -> int:
        """Of the documents; grows with every change of them, and of what `revise` is for. 0 in a new store."""
        ...

    async def revise(self, seal: DocumentSeal) -> None:
        """Give the documents another revision: something beside the store changed by which launches are judged, too."""
        ...

    async def documents(self) -> DocumentSet:
        """All versions of all documents that were not deleted, as they stand at one moment."""
        ...

    async def seal_documents(self, reviewed: DocumentSet, seal: DocumentSeal, audit: AuditRow) -> Outcome:
        """Seal documents that are not, as somebody has seen them; they get another revision.

        Args:
            reviewed: what was seen, its tag included.
            seal: the seal.
            audit: the record of it, `documents.sealed`.

        Returns:
            `DONE`, or `DOCUMENTS_CHANGED` where they are not what was seen.
        """
        ...

    async def admin_request(self, key: RequestKey) -> AdminRequest | None:
        """The owner's request that was kept under `key`."""
        ...

    # Who changes documents brings the seal: what they were before must be sealed (DOCUMENTS_NOT_SEALED is raised where
    # it is not), and what they become is sealed in the same transaction. `revise` and `delete_secret` do it, too.

    async def apply_document(
        self,
        document: DocumentRow,
        request: AdminRequest,
        audit: AuditRow,
        seal: DocumentSeal,
        revision: int | None = None,
    ) -> Outcome:
        """Keep a version of a document.

        Args:
            document: the document.
            request: the request for it.
            audit: the record of it, `document.applied`.
            seal: the seal.
            revision: of the documents that it was checked beside; None where it was checked beside none.

        Returns:
            `DONE`, `UNCHANGED` (request kept, nothing else), `CONFLICT`, `REQUEST_TAKEN` or `DOCUMENTS_CHANGED`.
        """
        ...

    async def delete_document(
        self,
        kind: str,
        name: str,
        request: AdminRequest,
        audit: AuditRow,
        seal: DocumentSeal,
        *,
        revision: int | None = None,
    ) -> Outcome:
        """Remove all versions of a document.

        Args:
            kind: its kind.
            name: its name.
            request: the request for it.
            audit: the record of it, `document.deleted`.
            seal: the seal.
            revision: that the documents were looked at with; None for any.

        Returns:
            `DONE`, `LOST` (there is none), `DOCUMENTS_CHANGED` or `REQUEST_TAKEN`.
        """
        ...

    async def put_secret(
        self, name: str, seal: Callable[[int], bytes], size: int, request: AdminRequest, audit: AuditRow
    ) -> tuple[Outcome, int]:
        """Keep a new version of a secret.

        Args:
            name: its name.
            seal: the sealed blob for the version that it gets.
            size: bytes of the secret.
            request: the request; its answer gets the member `version`.
            audit: the record of it; its body gets the member `version`.

        Returns:
            `DONE` and the version, counted from 1 and never used twice for a name, or `REQUEST_TAKEN` and 0.
        """
        ...

    async def secret(self, name: str, version: int | None) -> StoredSecret | None:
        """One version of a secret, or the newest."""
        ...

    async def secrets(self, *, after: str, limit: int) -> Sequence[StoredSecret]:
        """The newest version of each secret, by name; a page after the name `after`."""
        ...

    async def delete_secret(
        self, name: str, request: AdminRequest, audit: AuditRow, seal: DocumentSeal, revision: int | None = None
    ) -> tuple[Outcome, int]:
        """Erase all versions of a secret; the documents get another revision, as with `revise`.

        Args:
            name: its name.
            request: the request for it; its answer, and the record, get a member `versions`.
            audit: the record of it.
            seal: the documents' seal.
            revision: that the documents were looked at with; None for any.

        Returns:
            `DONE`, `LOST` (there is none), `DOCUMENTS_CHANGED` or `REQUEST_TAKEN`; and how many versions there were.
        """
        ...

    async def identity(self, name: str) -> bytes | None:
        """A sealed key of the verifier's own, which all replicas share."""
        ...

    async def keep_identity(self, name: str, sealed: bytes) -> bytes:
        """Keep a sealed key of the verifier's own, unless there is one; the one that is kept."""
        ...

    async def sealed_under_others(self, key_id: bytes, limit: int) -> Sequence[SealedBlob]:
        """Sealed blobs under other keys than `key_id`."""
        ...

    async def reseal(self, place: tuple[str, ...], old: bytes, new: bytes) -> bool:
        """Put another blob in place of `old`, if it is still there; whether it was."""
        ...

    # The audit log.

    async def records(self, launch_id: UUID | None, *, after: int, limit: int) -> Sequence[ChainedRecord]:
        """Audit records, oldest first, of one launch or all; a page after the number `after`."""
        ...

    async def head(self) -> tuple[int, bytes, datetime | None]:
        """Number and hash of the last audit record, and the latest time of all.

        In a new store 0, 32 zero bytes and None.
        """
        ...

    async def keep_checkpoint(self, checkpoint: Checkpoint) -> bool:
        """Keep a checkpoint, unless there is one of its number; whether it was kept."""
        ...

    async def checkpoints(self, *, after: int, limit: int) -> Sequence[Checkpoint]:
        """Checkpoints, oldest first; a page after the number `after`."""
        ...

    # The rest.

    async def measured_before(self, measurement: bytes, besides: UUID) -> UUID | None:
        """The first other launch that this very measurement blob decided."""
        ...

    async def sealing_keys(self) -> frozenset[bytes]:
        """Ids of the keys under which anything is sealed now."""
        ...

    async def confirm(self, launch_id: UUID, audit_id: UUID, revision: int) -> Outcome:
        """See a release once more, in a transaction whose commit is as durable as the release's own should be.

        What was read of it may be on one server's disk alone, where a standby did not confirm it; or be from a server
        whose place another one has taken.

        Args:
            launch_id: the launch.
            audit_id: of the release's record.
            revision: the documents', by which it was judged.

        Returns:
            `DONE`; `LOST` where there is no such release; `DOCUMENTS_CHANGED`.
        """
        ...

    async def erase_packets(self, before: datetime) -> int:
        """Erase the packets of launches that ended before a time; how many. Many are several transactions."""
        ...

    async def flush_erased(self) -> None:
        """Make sure that what was erased is gone from the files too."""
        ...

    async def check(self) -> None:
        """Return if the store can be written.

        Raises:
            Unavailable: it cannot.
        """
        ...

    async def close(self) -> None:
        """Let go of the store. Nothing else may be called afterwards."""
        ...
