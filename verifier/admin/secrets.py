"""Secrets that the owner puts into the store: in, never out. What there is of them to see is a name, a version, a size.

The value is sealed before the store has it, to its name and to the version that the store gives it. It is in no record,
no answer and no message. A request is known again by a digest of name and value; that digest is kept in the clear, and
a passphrase could be guessed by it, so it is keyed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from common.errors import NotFound, Reason
from verifier.admin.paging import Listing, Page, PageRequest
from verifier.admin.requests import AdminMethod, Asked, Journal, KeptRequests
from verifier.keys.base import SealingKey
from verifier.launches.launch import content_hash
from verifier.launches.records import AuditEvent
from verifier.secrets.put import secret_to_put
from verifier.store.rows import AdminRequest, AuditRow, DocumentSeal, Outcome, StoredSecret

_LISTING = Listing("ListSecrets")


class SecretStore(KeptRequests, Protocol):
    """What is asked of a store here."""

    async def put_secret(
        self, name: str, seal: Callable[[int], bytes], size: int, request: AdminRequest, audit: AuditRow
    ) -> tuple[Outcome, int]:
        """Keep a new version of a secret."""
        ...

    async def secrets(self, *, after: str, limit: int) -> Sequence[StoredSecret]:
        """The newest version of each secret, by name."""
        ...

    async def delete_secret(self, name: str, request: AdminRequest, audit: AuditRow, seal: DocumentSeal) -> Outcome:
        """Erase all versions of a secret."""
        ...


class SecretDesk:
    """Takes secrets in, lists their names, erases them."""

    def __init__(
        self,
        *,
        store: SecretStore,
        journal: Journal,
        sealing: SealingKey,
        keyed: Callable[[str], str],
        documents: DocumentSeal,
    ) -> None:
        """Take the means.

        Args:
            store: where they are kept.
            journal: of the owner's requests.
            sealing: seals them.
            keyed: a keyed digest of a text, which all replicas have the same key for.
            documents: the seal on the documents, which get another revision when a secret is erased.
        """
        self._store = store
        self._journal = journal
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

    async def delete(self, asked: Asked, name: str) -> None:
        """Erase a secret with all its versions.

        Raises:
            NotFound: there is none of this name; nothing was changed.
            InvalidInput: the request id was used with other content; nothing was changed.
            Unavailable: the store has no answer.
        """
        draft = self._journal.draft(asked, AdminMethod.DELETE_SECRET, name.encode())
        if await self._journal.answered(draft) is not None:
            return
        audit = self._journal.row(AuditEvent.SECRET_DELETED, asked, await self._journal.now(), name=name)
        outcome = await self._store.delete_secret(name, draft.answering(), audit, self._documents)
        if outcome is Outcome.LOST:
            raise NotFound(Reason.NOT_FOUND, f"there is no secret {name}")
        if outcome is not Outcome.DONE:
            await self._journal.answered_meanwhile(draft)
            return
        self._journal.stored(audit)
