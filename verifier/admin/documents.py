"""Documents that the owner applies over the network: checked, kept, listed, withdrawn.

A document is taken in whole or not at all, and a version that is on file never changes: the same text again changes
nothing, another text under the same version is a conflict. What the owner keeps as files is shown here and changed
there: a name that a file has cannot be applied, and a file's document cannot be deleted.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from common.errors import NotFound, Reason, SevattestError, Unavailable, WrongState
from common.versions import version_order
from verifier.admin.filed import Filed, Kind, filed, read_text
from verifier.admin.paging import Listing, Page, PageRequest, fitting
from verifier.admin.requests import AdminMethod, Asked, Draft, Journal, KeptRequests
from verifier.documents.text import spelled_as_json
from verifier.launches.records import AuditEvent
from verifier.library.documents import Entry
from verifier.library.validate import DocumentLibrary, check_document
from verifier.library.warnings import overdue
from verifier.store.rows import AdminRequest, AuditRow, DocumentRow, DocumentSeal, Outcome, StoredSecret

# A document is checked again where others changed meanwhile; a pipeline may apply a whole folder at once.
ATTEMPTS = 100
# Versions that the record of a document's end lists, so that it is shorter than a page; each has a record of its own.
LISTED_MAX = 1000

# No name and no version has it.
_CURSOR_SEPARATOR = "\n"


@dataclass(frozen=True, kw_only=True)
class Applied:
    """What became of a text.

    Attributes:
        document: as it now stands, or would.
        changed: whether anything was changed, or would be. A text that was only checked, changes nothing and is not on
            file is in conflict with what is: its warnings say how.
    """

    document: Filed
    changed: bool


class DocumentStore(KeptRequests, Protocol):
    """What is asked of a store here."""

    async def apply_document(
        self,
        document: DocumentRow,
        request: AdminRequest,
        audit: AuditRow,
        seal: DocumentSeal,
        revision: int | None = None,
    ) -> Outcome:
        """Keep a version of a document."""
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
        """Remove all versions of a document."""
        ...

    async def secret(self, name: str, version: int | None) -> StoredSecret | None:
        """One version of a secret, or the newest."""
        ...


class DocumentDesk:
    """Takes documents in, shows them, takes them out."""

    def __init__(self, *, store: DocumentStore, journal: Journal, library: DocumentLibrary, seal: DocumentSeal) -> None:
        """Take the means."""
        self._store = store
        self._journal = journal
        self._library = library
        self._seal = seal

    # In and out.

    async def apply(self, asked: Asked, text: bytes) -> Applied:
        """Keep a version of a document.

        Args:
            asked: who, under which id.
            text: YAML, or JSON where its first character is `{`.

        Raises:
            InvalidInput: the document is bad, with everything that is wrong with it; or the request id was used with
                other content. Nothing was changed.
            WrongState: a file has a document of this kind and name, or this version is on file with another text
                (DOCUMENT_CONFLICT). Nothing was changed.
            Unavailable: the store has no answer.
        """
        draft = self._journal.draft(asked, AdminMethod.APPLY, text)
        if (earlier := await self._journal.answered(draft)) is not None:
            return await self._applied_before(text, changed=bool(earlier["changed"]))
        for _ in range(ATTEMPTS):
            document, revision = await self._checked(text)
            now = await self._journal.now()
            audit = self._journal.row(
                AuditEvent.DOCUMENT_APPLIED,
                asked,
                now,
                kind=document.kind.value,
                name=document.name,
                version=document.version,
                sha256=document.sha256,
            )
            row = DocumentRow(
                kind=document.kind.value,
                name=document.name,
                version=document.version,
                text=text,
                is_json=spelled_as_json(text),
                apply_time=now,
            )
            if (applied := await self._kept(document, row, revision, draft, audit)) is not None:
                return applied
        raise _changing()

    async def _kept(
        self, document: Filed, row: DocumentRow, revision: int, draft: Draft, audit: AuditRow
    ) -> Applied | None:
        """What became of a document that could be kept; None where others changed since it was checked."""
        same = await self._on_file(document)
        request = draft.answering(changed=same is None)
        outcome = await self._store.apply_document(row, request, audit, self._seal, revision)
        if outcome is Outcome.DOCUMENTS_CHANGED:
            return None
        if outcome is Outcome.CONFLICT:
            # Somebody applied another text under this version at the same time.
            raise _conflict(document, "with another text")
        if outcome is Outcome.REQUEST_TAKEN:
            answer = await self._journal.answered_meanwhile(draft)
            return await self._applied_before(row.text, changed=bool(answer["changed"]))
        if outcome is Outcome.DONE:
            self._journal.stored(audit)
            await self._look()
            return Applied(document=replace(document, apply_time=row.apply_time), changed=True)
        return Applied(document=same or document, changed=False)

    async def _applied_before(self, text: bytes, *, changed: bool) -> Applied:
        """The answer to a request that was carried out: the document may be withdrawn or its files gone by now."""
        document = await self._read(text)
        return Applied(document=await self._on_file(document) or document, changed=changed)

    async def check(self, text: bytes) -> Applied:
        """What `apply` would do with a text; nothing is changed.

        A conflict with what is on file is no error here, so that the document can be looked at: see `Applied.changed`.

        Raises:
            InvalidInput: the document is bad, with everything that is wrong with it.
            Unavailable: the store has no answer.
        """
        try:
            document, _ = await self._checked(text)
        except WrongState as error:
            document = await self._read(text)
            warned = replace(document, warnings=(error.message, *document.warnings))
            return Applied(document=warned, changed=False)
        same = await self._on_file(document)
        return Applied(document=same or document, changed=same is None)

    async def delete(self, asked: Asked, kind: Kind, name: str) -> None:
        """Remove all versions of a document.

        Raises:
            NotFound: there is none; nothing was changed.
            WrongState: it comes from a file (DOCUMENT_CONFLICT); nothing was changed.
            InvalidInput: the request id was used with other content; nothing was changed.
            Unavailable: the store has no answer.
        """
        draft = self._journal.draft(asked, AdminMethod.DELETE, kind.value.encode(), name.encode())
        if await self._journal.answered(draft) is not None:
            return
        for _ in range(ATTEMPTS):
            documents = await self._library.current()
            known = documents.versions(kind.value, name)
            if known and all(each.file for each in known):
                raise WrongState(
                    Reason.DOCUMENT_CONFLICT,
                    f"{kind} {name} comes from the file {known[0].file}: take the file away and reload the verifier",
                )
            audit = self._journal.row(
                AuditEvent.DOCUMENT_DELETED,
                asked,
                await self._journal.now(),
                kind=kind.value,
                name=name,
                versions=[{"version": each.version, "sha256": each.sha256} for each in known[:LISTED_MAX]],
            )
            outcome = await self._store.delete_document(
                kind.value, name, draft.answering(), audit, self._seal, revision=documents.revision
            )
            if outcome is Outcome.DOCUMENTS_CHANGED:  # the record would not name what came meanwhile
                continue
            if outcome is Outcome.LOST:
                raise _unknown(kind, name)
            if outcome is Outcome.DONE:
                self._journal.stored(audit)
                await self._look()
            else:
                await self._journal.answered_meanwhile(draft)
            return
        raise _changing()

    async def _look(self) -> None:
        """Look at the documents after a change of them: from here on this process believes in nothing older.

        And what has to be found out about them (chips that are known by their ids) is, now. They were changed whatever
        comes of that.
        """
        with contextlib.suppress(SevattestError):
            await self._library.look()

    # Reading.

    async def get(self, kind: Kind, name: str, version: str | None) -> Filed:
        """One version of a document, or the newest.

        Raises:
            NotFound: there is none.
            Unavailable: the store has no answer.
        """
        for each in await self._versions(kind, name):
            if version is None or version_order(version) == each.order:
                return each
        raise _unknown(kind, name if version is None else f"{name} {version}")

    async def list(self, kind: Kind, page: PageRequest) -> Page[Filed]:
        """All versions of all documents of a kind, by name, the newest first.

        Raises:
            InvalidInput: the page token is none of this listing.
            Unavailable: the store has no answer.
        """
        listing = Listing("ListDocuments", kind.value)
        cursor = listing.cursor(page.token)
        documents = await self._library.current()
        rest = sorted((each for each in documents.entries if each.kind == kind), key=_order, reverse=True)
        rest.sort(key=lambda each: each.name)
        if cursor:
            name, _, version = cursor.partition(_CURSOR_SEPARATOR)
            order = version_order(version)
            # A document that went away since leaves its place behind.
            rest = [each for each in rest if each.name > name or (each.name == name and _order(each) < order)]
        # In a thread: YAML is read again.
        items = await asyncio.to_thread(
            fitting,
            (filed(each, newer=documents.newer(each)) for each in rest[: page.size]),
            lambda each: (each.json, *each.warnings),
        )
        more = len(items) < len(rest)
        last = f"{items[-1].name}{_CURSOR_SEPARATOR}{items[-1].version}" if more else ""
        return Page(items=items, next_token=listing.token(last) if more else "")

    async def _checked(self, text: bytes) -> tuple[Filed, int]:
        """The document that a text spells, with all that can be said of it beside what is on file at a revision."""
        checked = await check_document(self._library, text, is_json=spelled_as_json(text), has_secret=self._has_secret)
        document = await asyncio.to_thread(filed, checked.entry, newer=checked.newer)
        warnings = checked.warnings
        if checked.entry.document is not None and not checked.newer:
            warnings += overdue(checked.entry.document, await self._journal.now())
        return replace(document, warnings=warnings), checked.revision

    async def _read(self, text: bytes) -> Filed:
        """The document that a text spells, whether or not it could be kept."""
        entry = await asyncio.to_thread(read_text, text, self._library.folder)
        return filed(entry, newer=(await self._library.current()).newer(entry))

    async def _has_secret(self, name: str, version: int | None) -> bool:
        return await self._store.secret(name, version) is not None

    async def _on_file(self, document: Filed) -> Filed | None:
        """The same text as it is on file, with the warnings of now; None where it is not."""
        for each in await self._versions(document.kind, document.name):
            if each.order == document.order and each.sha256 == document.sha256:
                return replace(each, warnings=document.warnings or each.warnings)
        return None

    async def _versions(self, kind: Kind, name: str) -> Sequence[Filed]:
        """All versions of one document, the newest first."""
        documents = await self._library.current()
        entries = documents.versions(kind.value, name)
        return await asyncio.to_thread(lambda: [filed(each, documents) for each in entries])


def _order(entry: Entry) -> tuple[tuple[int, int, str], ...]:
    return version_order(entry.version)


def _changing() -> Unavailable:
    return Unavailable(Reason.STORE_UNAVAILABLE, "documents change faster than one of them is checked: repeat")


def _conflict(document: Filed, how: str) -> WrongState:
    what = f"{document.kind} {document.name} {document.version}"
    return WrongState(Reason.DOCUMENT_CONFLICT, f"{what} is on file {how}")


def _unknown(kind: Kind, name: str) -> NotFound:
    return NotFound(Reason.NOT_FOUND, f"there is no {kind} {name}")
