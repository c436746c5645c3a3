"""Pages, cut to what an answer can carry, and their tokens: where the next page starts, good for one listing only.

A token is base64url of a version, eight bytes that name the listing (its method and filters) and the cursor. It holds
nothing that its owner may not know and is not signed: a forged one that is well-formed starts a page elsewhere in a
listing that the owner may read anyway.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar
from uuid import UUID

from common.errors import InvalidInput, Reason
from common.ids import canonical_uuid

_T = TypeVar("_T")
# Bytes of UTF-8 in the texts of one page. Beside them an item is names, ids and times, at most some 1200 bytes, and a
# page has at most 500 items (common.wire.PAGE_MAX): less than common.rpc.MAX_ADMIN_MESSAGE together.
PAGE_BYTES = 256 * 1024
_VERSION = b"\x01"
_SCOPE_SIZE = 8
# The longest cursor is a name and a version, 128 and 64 characters; a token of our own is far below.
_TOKEN_MAX = 1024
# Names, versions, ids and numbers, and a line's end between two of them: whatever a token holds, a store can look for.
_CURSOR = re.compile(r"[A-Za-z0-9._+\n-]+")


@dataclass(frozen=True, kw_only=True)
class Page(Generic[_T]):
    """One page of a listing.

    Attributes:
        items: in the listing's order.
        next_token: where the next page starts; empty on the last.
    """

    items: Sequence[_T]
    next_token: str = ""


@dataclass(frozen=True, kw_only=True)
class PageRequest:
    """Which page is wanted.

    Attributes:
        size: how many items at the most, at least 1.
        token: from an earlier answer; empty for the first page.
    """

    size: int
    token: str = ""


def fitting(items: Iterable[_T], texts: Callable[[_T], Iterable[str]]) -> list[_T]:
    """As many of the items as one answer can carry, at least one where there is one; no more of them are made.

    Args:
        items: in the listing's order.
        texts: those of an item that may be long.
    """
    page: list[_T] = []
    size = 0
    for item in items:
        size += sum(len(each.encode()) for each in texts(item))
        if page and size > PAGE_BYTES:
            break
        page.append(item)
    return page


class Listing:
    """One listing: a method with its filters."""

    def __init__(self, method: str, *filters: str | None) -> None:
        """Name it; whatever selects items belongs into `filters`."""
        state = hashlib.sha256(method.encode())
        for each in filters:
            state.update(b"\0" if each is None else b"\1" + len(each.encode()).to_bytes(4, "big") + each.encode())
        self._scope = state.digest()[:_SCOPE_SIZE]

    def token(self, cursor: str) -> str:
        """The token for the page after `cursor`."""
        return base64.urlsafe_b64encode(_VERSION + self._scope + cursor.encode()).decode()

    def cursor(self, token: str) -> str:
        """The cursor in a token; empty for an empty token.

        Raises:
            InvalidInput: it is no token of this listing.
        """
        if not token:
            return ""
        try:
            raw = base64.b64decode(token.encode("ascii"), altchars=b"-_", validate=True)
            text = raw[1 + _SCOPE_SIZE :].decode()
        except (UnicodeError, binascii.Error):
            raise unusable_token() from None
        # One token has one spelling, and belongs to one listing.
        if len(token) > _TOKEN_MAX or raw[: 1 + _SCOPE_SIZE] != _VERSION + self._scope or not _CURSOR.fullmatch(text):
            raise unusable_token()
        if self.token(text) != token:
            raise unusable_token()
        return text

    def number(self, token: str) -> int:
        """The cursor in a token of a listing that counts; 0 for an empty token.

        Raises:
            InvalidInput: it is no token of this listing.
        """
        text = self.cursor(token)
        # Stores count in 63 bits, which is 19 digits.
        if text and not (text.isascii() and text.isdecimal() and len(text) < 19):
            raise unusable_token()
        return int(text or 0)

    def uuid(self, token: str) -> UUID | None:
        """The cursor in a token of a listing of launches; None for an empty token.

        Raises:
            InvalidInput: it is no token of this listing.
        """
        text = self.cursor(token)
        if not text:
            return None
        value = canonical_uuid(text)
        if value is None:
            raise unusable_token()
        return value


def unusable_token() -> InvalidInput:
    """The error for a token that this listing never gave."""
    return InvalidInput(Reason.INVALID_ARGUMENT, "page_token: is not one that this listing gave", field="page_token")
