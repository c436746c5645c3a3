"""From a document's text to the value that it spells, or to everything that is wrong with it.

Four kinds, a form and a reader for each. What a reader makes needs no further check of form; nothing is read from disk
here. What is absent is refused where absence would allow more.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path, PurePath
from types import MappingProxyType

import msgspec

from verifier.documents.form import API_VERSION, fill_in
from verifier.documents.form_grant import GrantForm
from verifier.documents.form_platform import PlatformForm
from verifier.documents.form_revocation import RevocationForm
from verifier.documents.form_workload import WorkloadForm
from verifier.documents.grant import Grant
from verifier.documents.platform import KnownPlatform
from verifier.documents.reader_grant import read_grant
from verifier.documents.reader_platform import read_platform
from verifier.documents.reader_revocation import read_revocation
from verifier.documents.reader_workload import read_workload
from verifier.documents.revocation import Revocation
from verifier.documents.text import InvalidDocument, parse_text
from verifier.documents.workload import Workload

Document = Workload | Grant | KnownPlatform | Revocation
Form = WorkloadForm | GrantForm | PlatformForm | RevocationForm

FORMS: Mapping[str, type[Form]] = MappingProxyType(
    {"Workload": WorkloadForm, "Grant": GrantForm, "Platform": PlatformForm, "Revocation": RevocationForm}
)
KINDS = tuple(FORMS)
_KIND_OF: Mapping[type[Document], str] = MappingProxyType(
    {Workload: "Workload", Grant: "Grant", KnownPlatform: "Platform", Revocation: "Revocation"}
)


def kind_of(document: Document) -> str:
    """`Workload`, `Grant`, `Platform` or `Revocation`."""
    return _KIND_OF[type(document)]


def read_document(text: bytes, *, is_json: bool, folder: PurePath, source: str, confined: bool = False) -> Document:
    """The value that a document's text spells.

    Args:
        text: the document.
        is_json: whether it is JSON; else YAML.
        folder: what relative paths are relative to.
        source: the document's name in messages.
        confined: whether it may name files in the folder only: no absolute path, no `..`.

    Raises:
        InvalidDocument: with every problem that was found.
    """
    form = _form(text, is_json=is_json)
    sha256 = hashlib.sha256(text).hexdigest()
    if isinstance(form, WorkloadForm):
        return read_workload(form, folder=Path(folder), sha256=sha256, source=source, confined=confined)
    if isinstance(form, GrantForm):
        return read_grant(form, sha256=sha256, source=source)
    if isinstance(form, PlatformForm):
        return read_platform(form, sha256=sha256, source=source)
    return read_revocation(form, sha256=sha256, source=source)


def written_out(text: bytes, *, is_json: bool) -> str:
    """A document as JSON with its defaults written out; reads as the same document.

    Raises:
        InvalidDocument: it fills in no form.
    """
    return msgspec.json.encode(_form(text, is_json=is_json)).decode()


def _form(text: bytes, *, is_json: bool) -> Form:
    data = parse_text(text, is_json=is_json)
    if not isinstance(data, dict):
        raise InvalidDocument("a document is a mapping with apiVersion, kind, metadata and spec")
    if isinstance(version := data.get("apiVersion"), str) and version != API_VERSION:
        raise InvalidDocument(f"apiVersion: must be {API_VERSION}, not {version!r}")
    kind = data.get("kind")
    form = FORMS.get(kind) if isinstance(kind, str) else None
    if form is None:
        raise InvalidDocument(f"kind: must be one of {', '.join(KINDS)}")
    return fill_in(form, data)
