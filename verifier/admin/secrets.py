"""Secrets that the owner puts into the store: in, never out. What there is of them to see is a name, a version, a size.

The value is sealed before the store has it, to its name and to the version that the store gives it. It is in no record,
no answer and no message. A request is known again by a digest of name and value; that digest is kept in the clear, and
a passphrase could be guessed by it, so it is keyed.

What is erased is gone for good, and with a disk's key all that is on the disk. So a secret that a workload on file
names is erased only where the owner says that it is to be all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from common.errors import NotFound, Reason, Unavailable, WrongState
from verifier.admin.documents import ATTEMPTS
from verifier.admin.filed import Kind
from verifier.admin.paging import Listing, Page, PageRequest
from verifier.admin.requests import AdminMethod, Asked, Journal, KeptRequests
from verifier.documents.sources import StoredSource
from verifier.documents.workload import Workload
from verifier.keys.base import SealingKey
from verifier.launches.launch import content_hash
from verifier.launches.records import AuditEvent
from verifier.library.documents import Documents, Entry
from verifier.library.validate import DocumentLibrary
from verifier.secrets.put import secret_to_put
from verifier.store.rows import AdminRequest, AuditRow, DocumentSeal, Outcome, StoredSecret

# Workloads that a refusal names, so that it fits into a status; and that a record lists, so that it fits into a page.
_NAMED_MAX = 3
LISTED_MAX = 1000

_LISTING = Listing("ListSecrets")


class SecretStore(KeptRequests, Protocol):
    """What is asked of a store here."""

    async def put_secret(
        self, name: str, seal: Callable[[int], bytes], size: int, request: AdminRequest, audit: AuditRow
    ) -> tuple[Outcome, int]:
        """Keep a new version of a secret."""
        ...

    async def secret(self, name: str, version: int | None) -> StoredSecret | None:
        """One version of a secret, or the newest."""
        ...

    async def secrets(self, *, after: str, limit: int) -> Sequence[StoredSecret]:
        """The newest version of each secret, by name."""
        ...

    async def delete_secret(
        self, name: str, request: AdminRequest, audit: AuditRow, seal: DocumentSeal, revision: int | None = None
    ) -> tuple[Outcome, int]:
        """Erase all versions of a secret."""
        ...


class SecretDesk:
    """Takes secrets in, lists their names, erases them."""

    def __init__(
        self,
        *,
        store: SecretStore,
        journal: Journal,
        library: DocumentLibrary,
        sealing: SealingKey,
        keyed: Callable[[str], str],
        documents: DocumentSeal,
    ) -> None:
        """Take the means.

        Args:
            store: where they are kept.
            journal: of the owner's requests.
            library: knows which workloads name a secret.
            sealing: seals them.
            keyed: a keyed digest of a text, which all replicas have the same key for.
            documents: the seal on the documents, which get another revision when a secret is erased.
        """
        self._store = store
        self._journal = journal
        self._library = library
        self._sealing = sealing
        self._keyed = keyed
        self._documents = documents

    async def put(self, asked: Asked, name: str, value: bytes) -> int:
        """Keep a new version of a secret; its version, from 1.

        Args:
            asked: who, under which id.
            name: its name.
            value: 1 to `verifier.secrets.put.SECRET_MAX` bytes.

        Raises:
            InvalidInput: the name, the value's size, or the request id was used with other content; nothing was
                changed.
            Unavailable: the store or the sealing key has no answer; nothing was changed, unless the store failed in
                its very commit.
        """
        seal = secret_to_put(name, value, self._sealing)
        digest = self._keyed(f"{AdminMethod.PUT_SECRET}:{content_hash(name.encode(), value).hex()}")
        draft = self._journal.draft(asked, AdminMethod.PUT_SECRET, digest.encode())
        if (earlier := await self._journal.answered(draft)) is not None:
            return int(earlier["version"])
        audit = self._journal.row(AuditEvent.SECRET_PUT, asked, await self._journal.now(), name=name, size=len(value))
        outcome, version = await self._store.put_secret(name, seal, len(value), draft.answering(), audit)
        if outcome is not Outcome.DONE:
            return int((await self._journal.answered_meanwhile(draft))["version"])
        self._journal.stored(audit)
        return version

    async def list(self, page: PageRequest) -> Page[StoredSecret]:
        """The newest version of each secret, by name.

        Raises:
            InvalidInput: the page token is none of this listing.
            Unavailable: the store has no answer.
        """
        found = await self._store.secrets(after=_LISTING.cursor(page.token), limit=page.size + 1)
        items = found[: page.size]
        return Page(items=items, next_token=_LISTING.token(items[-1].name) if len(found) > page.size else "")

    async def delete(self, asked: Asked, name: str, *, allow_used: bool = False) -> int:
        """Erase a secret with all its versions; how many there were.

        Args:
            asked: who, under which id.
            name: its name.
            allow_used: erase it though a workload names it.

        Raises:
            NotFound: there is none of this name; nothing was changed.
            WrongState: a version of a workload on file names it, or cannot be read and may name it
                (DOCUMENT_CONFLICT); nothing was changed.
            InvalidInput: the request id was used with other content; nothing was changed.
            Unavailable: the store has no answer.
        """
        # What does not say so has the content of requests that could not say it.
        said = (b"allow_used",) if allow_used else ()
        draft = self._journal.draft(asked, AdminMethod.DELETE_SECRET, name.encode(), *said)
        if (earlier := await self._journal.answered(draft)) is not None:
            return int(earlier["versions"])
        for _ in range(ATTEMPTS):
            documents = await self._library.current()
            used_by = _users(documents, name)
            if used_by and not allow_used and await self._store.secret(name, None) is not None:
                raise _in_use(name, used_by)
            listed = {"used_by": used_by[:LISTED_MAX]} if used_by else {}
            audit = self._journal.row(AuditEvent.SECRET_DELETED, asked, await self._journal.now(), name=name, **listed)
            outcome, versions = await self._store.delete_secret(
                name, draft.answering(), audit, self._documents, documents.revision
            )
            if outcome is Outcome.DOCUMENTS_CHANGED:  # perhaps a workload that names it
                continue
            if outcome is Outcome.LOST:
                raise NotFound(Reason.NOT_FOUND, f"there is no secret {name}")
            if outcome is not Outcome.DONE:
                return int((await self._journal.answered_meanwhile(draft))["versions"])
            self._journal.stored(audit)
            return versions
        raise Unavailable(Reason.STORE_UNAVAILABLE, "documents change faster than a secret is erased: repeat")


def _users(documents: Documents, secret: str) -> list[str]:
    """The workloads that name a secret, each with the newest of its versions that does."""
    found: dict[str, str] = {}
    for entry in documents.entries:
        if entry.kind == Kind.WORKLOAD and _may_name(entry, secret):
            found.setdefault(entry.name, entry.version)
    return [f"{name} {version}" for name, version in found.items()]


def _may_name(entry: Entry, secret: str) -> bool:
    workload = entry.document
    if not isinstance(workload, Workload):
        return True
    return any(isinstance(each.source, StoredSource) and each.source.name == secret for each in workload.secrets)


def _in_use(name: str, used_by: Sequence[str]) -> WrongState:
    more = len(used_by) - _NAMED_MAX
    named = ", ".join(used_by[:_NAMED_MAX]) + (f" and {more} more" if more > 0 else "")
    return WrongState(
        Reason.DOCUMENT_CONFLICT, f"secret {name} is named by workloads on file: {named}; nothing was erased"
    )
