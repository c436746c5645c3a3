"""The documents that the owner applied: rows of the store, each read by itself.

An owner's identity opens the store of documents, not the verifier's disk: such a document names files in the folder of
documents only, or it could have any file that the verifier can read released to a guest. Links in the folder are
followed: whoever keeps the folder made them (a mounted Kubernetes volume consists of them), and no call makes one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from verifier.documents.reader import Document, kind_of, read_document
from verifier.documents.text import InvalidDocument
from verifier.library.documents import Entry
from verifier.store.rows import DocumentRow, DocumentSet

APPLIED = "applied"  # takes the place of a file's name in messages


class DocumentRows(Protocol):
    """What is asked of the store; `verifier.store.base.Store` is this."""

    async def revision(self) -> int:
        """Of the documents; grows with every change of them."""
        ...

    async def documents(self) -> DocumentSet:
        """All versions of all documents that were not deleted, as they stand at one moment."""
        ...


def read_applied(text: bytes, *, is_json: bool, folder: Path) -> Document:
    """The document that a text from an owner spells.

    Raises:
        InvalidDocument: with everything that is wrong with it, files outside the folder included.
    """
    return read_document(text, is_json=is_json, folder=folder, source=APPLIED, confined=True)


def read_row(row: DocumentRow, folder: Path) -> Entry:
    """The document in a row, readable or not.

    A row was read once, when it was applied; but a newer version of the verifier on the same store may know forms that
    this one does not.
    """
    document, problem = None, None
    try:
        document = read_applied(row.text, is_json=row.is_json, folder=folder)
    except InvalidDocument as error:
        problem = error.message
    else:
        if (kind_of(document), document.name, document.version) != (row.kind, row.name, row.version):
            document, problem = None, "the text is another document's"
    return Entry(
        kind=row.kind,
        name=row.name,
        version=row.version,
        text=row.text,
        is_json=row.is_json,
        file="",
        apply_time=row.apply_time,
        document=document,
        problem=problem,
    )
