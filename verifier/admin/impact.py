"""Which launches a revocation touches, or would have touched: asked before it is applied as well as after."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from dataclasses import replace

from common.errors import InvalidInput, NotFound, Reason
from verifier.admin.filed import read_text
from verifier.admin.launches import Found, LaunchStore, OwnedLaunch, owned, page_of_rows
from verifier.admin.paging import Listing, Page, PageRequest, fitting
from verifier.appraisal.revoked import impact
from verifier.documents.revocation import Revocation
from verifier.launches.platforms import DenyList
from verifier.library.validate import DocumentLibrary
from verifier.store.rows import LaunchFilter

# Launches that one page looks at, so that a revocation that touches nothing holds no call up.
LOOKED_AT = 500


class ImpactDesk:
    """Holds launches against a revocation."""

    def __init__(
        self, *, store: LaunchStore, library: DocumentLibrary, denied: DenyList, pseudonym: Callable[[str], str]
    ) -> None:
        """Take the means; `denied` knows chips behind ids, `pseudonym` makes a chip's fingerprint its pseudonym."""
        self._store = store
        self._denied = denied
        self._pseudonym = pseudonym
        self._library = library

    async def touched(self, *, text: bytes, name: str, page: PageRequest) -> Page[OwnedLaunch]:
        """Launches that a revocation touches, newest first; a page may be empty and not the last.

        Args:
            text: the document; empty where `name` says which one is meant.
            name: of one that is in force; empty where `text` is given.
            page: which page.

        Raises:
            InvalidInput: both or neither are given, the document is bad or no revocation, or the page token is none
                of this listing.
            NotFound: no revocation of this name is in force.
            Unavailable: the store has no answer.
        """
        if bool(text) == bool(name):
            raise InvalidInput(Reason.INVALID_ARGUMENT, "text: give either it or name", field="text")
        revocation = await self._revocation(text, name)
        # Not every host told its chip's id.
        revocation = replace(revocation, ceks=revocation.ceks | self._denied.fingerprints(revocation.chips))
        listing = Listing("ListRevocationImpact", name, hashlib.sha256(text).hexdigest())
        rows, last = await page_of_rows(self._store, LaunchFilter(), listing.uuid(page.token), LOOKED_AT)
        touched: list[OwnedLaunch] = []
        for row in rows:
            if (finding := impact(revocation, row)) is not None:
                found = [Found(rule=finding.rule, message=finding.message)]
                touched.append(owned(row, {}, found, chip=self._pseudonym(row.fingerprint)))
        items = fitting(touched[: page.size], lambda each: each.texts)
        if len(items) < len(touched):
            last = items[-1].launch.launch_id
        return Page(items=items, next_token="" if last is None else listing.token(str(last)))

    async def _revocation(self, text: bytes, name: str) -> Revocation:
        if not text:
            revocation = (await self._library.current()).revocations.get(name)
            if revocation is None:
                raise NotFound(Reason.NOT_FOUND, f"there is no Revocation {name}")
            return revocation
        document = (await asyncio.to_thread(read_text, text, self._library.folder)).document
        if not isinstance(document, Revocation):
            raise InvalidInput(Reason.INVALID_ARGUMENT, "text: is no Revocation", field="text")
        return document
