"""The shape of a Workload document: which keys exist, of which type. What the values mean is `workload`'s.

docs/workload.md describes each key; a test compares the two. Unknown keys are refused with their path.
"""

from __future__ import annotations

import re
from typing import Any, Literal

import msgspec

from verifier.documents.text import InvalidDocument

API_VERSION = "sevattest/v1"


class MetadataForm(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """`metadata`."""

    name: str
    version: str


class MeasureForm(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """`spec.measure`: artefacts to measure."""

    firmware: str
    kernel: str | None = None
    initrd: str | None = None
    cmdline: str | None = None
    vcpus: list[int | str] = []
    cpus: list[str] = []
    flavours: Literal["all"] | list[str] = []


class DigestForm(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """One of `spec.digests`, with a label for receipts."""

    digest: str
    label: str


class PolicyForm(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """`spec.policy`."""

    allow: list[Literal["debug", "key-sharing", "no-es", "send"]] = []
    minimum_api: str | None = None
    domain: bool = False


class PlatformsForm(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """`spec.platforms`."""

    generations: list[str]
    chips: Literal["any"] | list[str]


class SourceForm(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """`spec.secrets[].source`."""

    file: str


class SecretForm(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """One of `spec.secrets`."""

    guid: str
    source: SourceForm
    trailing_nul: bool = False


class SpecForm(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """`spec`."""

    callers: list[str]
    platforms: PlatformsForm
    measure: MeasureForm | None = None
    digests: list[str | DigestForm] | None = None
    secret_area: int | None = None
    policy: PolicyForm = PolicyForm()
    floors: dict[str, str] = {}
    accept_old_firmware: str | None = None
    secrets: list[SecretForm] = []
    lifetime: str = "10m"


class WorkloadForm(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """A whole document."""

    apiVersion: Literal["sevattest/v1"]  # noqa: N815 -- the key's spelling in the document
    kind: Literal["Workload"]
    metadata: MetadataForm
    spec: SpecForm


# Kinds that the vocabulary knows and this release does not serve.
_LATER_KINDS = ("Grant", "Platform", "Revocation")
_AT = re.compile(r"(?P<what>.*?)(?: - at `(?:\$|key in )(?P<path>[^`]*)`)?", re.DOTALL)


def read_form(data: Any) -> WorkloadForm:
    """The form that plain data fills in.

    Raises:
        InvalidDocument: it is no Workload, or a key is unknown, missing or of the wrong type.
    """
    if not isinstance(data, dict):
        raise InvalidDocument("a document is a mapping with apiVersion, kind, metadata and spec")
    kind = data.get("kind")
    if kind in _LATER_KINDS:
        raise InvalidDocument(f"kind: {kind} is not served by this version, only Workload is")
    try:
        return msgspec.convert(data, WorkloadForm, strict=True)
    except msgspec.ValidationError as error:
        raise InvalidDocument(sentence(str(error))) from None


def sentence(message: str) -> str:
    """Msgspec's message as `path: what is wrong`."""
    match = _AT.fullmatch(message)
    what, path = (match["what"], match["path"] or "") if match else (message, "")
    what = what[:1].lower() + what[1:]
    if "expected `str`, got `float`" in what or "expected `str`, got `int`" in what:
        what += ": put it into quotes"
    path = path.lstrip(".")
    return f"{path}: {what}" if path else what
