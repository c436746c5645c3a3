"""The seal on the documents that owners applied: who writes to the database and has no key puts none in and none out.

All documents carry one tag. It is made of every version of each, of their revision, and of the last record of a change
of them in the audit log: an older set that is put back does not go with the log, unless the log is cut back, too. That
needs all verifiers down (each knows what it has seen), and shows by a checkpoint that was kept elsewhere.

A store that never had a document needs no tag. Any other that lacks one is not sealed: nothing in a database tells a
tag that was never made from one that was taken away.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Iterator

from common.audit.chain import GENESIS
from common.errors import Reason, Unavailable
from verifier.store.rows import DocumentRow, DocumentSet
from verifier.store.sql_rows import stamp

_STEP_SIZE = 3  # bytes: 2^63 revisions are half a million million of such steps
_WHAT_TO_DO = (
    "the applied documents are not as they were sealed: nothing is begun or released before the verifier's operator "
    "has looked (sev-verifier documents)"
)


class DocumentSeal:
    """Knows sets that were sealed from all others; see `verifier.store.rows.DocumentSeal`."""

    def __init__(self, tag: Callable[[bytes], bytes]) -> None:
        """Take what makes a tag of 32 bytes from the spelling of a set."""
        self._tag = tag

    def tag(self, made: DocumentSet) -> bytes:
        """What a set is sealed by."""
        return self._tag(spelled(made))

    def next_revision(self, changed: DocumentSet) -> int:
        """A larger one, by another step with each change.

        A server that took over without the last changes gives none of their revisions to others then: who has seen
        those knows that these are not what it knows.
        """
        return changed.revision + 1 + int.from_bytes(changed.change.hash[:_STEP_SIZE], "big")

    def require(self, found: DocumentSet) -> None:
        """Return if a set is as it was sealed.

        Raises:
            Unavailable: it is not (DOCUMENTS_NOT_SEALED).
        """
        if self.problem(found) is not None:
            raise not_sealed()

    def problem(self, found: DocumentSet) -> str | None:
        """What is wrong with a set, for the owner; None for one that is as it was sealed."""
        if stands_twice(found):
            return "a document stands in it twice: the table was made anew"
        if found.tag is None:
            never = not found.rows and found.change == GENESIS
            return None if never else "they carry no seal: it was taken away, or they are from before there was one"
        if not hmac.compare_digest(found.tag, self.tag(found)):
            return "the seal is that of others: a document, the revision, the audit log or the seal was written to"
        return None


def stands_twice(documents: DocumentSet) -> bool:
    """Whether two rows are the same version of one document, which no table of ours takes."""
    return len({(row.kind, row.name, row.version) for row in documents.rows}) < len(documents.rows)


def not_sealed() -> Unavailable:
    """The error for documents that are not as they were sealed. Callers read it, too: what is wrong is in the log."""
    return Unavailable(Reason.DOCUMENTS_NOT_SEALED, _WHAT_TO_DO)


def step_back(seen: DocumentSet, found: DocumentSet) -> str | None:
    """How a sealed set does not follow from one that was seen before it was read; None where it does."""
    if found.revision < seen.revision or found.change.number < seen.change.number:
        return f"they are older (revision {found.revision}) than what this process has seen (revision {seen.revision})"
    if (found.revision == seen.revision and found.tag != seen.tag) or (
        found.change.number == seen.change.number and found.change != seen.change
    ):
        return f"they are others than what this process has seen under revision {seen.revision}"
    return None


def spelled(documents: DocumentSet) -> bytes:
    """A set in the one way that is sealed, whatever its tag and in whatever order it was read.

    No two sets are spelled alike: every part has a fixed size or its size before it.
    """
    rows = sorted(documents.rows, key=lambda row: (row.kind, row.name, row.version))
    head = (
        b"sevattest documents 1",
        documents.revision.to_bytes(8, "big", signed=True),
        documents.change.number.to_bytes(8, "big", signed=True),
        documents.change.hash,
        len(rows).to_bytes(8, "big"),
    )
    return b"".join((*head, *(part for row in rows for part in _spelled(row))))


def _spelled(row: DocumentRow) -> Iterator[bytes]:
    for text in (row.kind.encode(), row.name.encode(), row.version.encode()):
        yield len(text).to_bytes(4, "big")
        yield text
    yield hashlib.sha256(row.text).digest()
    yield bytes((row.is_json,))
    yield stamp(row.apply_time).to_bytes(8, "big", signed=True)
