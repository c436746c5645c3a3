"""The form of a Platform document; docs/platforms.md describes each key, and a test compares the two."""

from __future__ import annotations

from typing import Literal

import msgspec

from verifier.documents.form import MetadataForm


class PlatformSpecForm(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """`spec`."""

    cek: str
    callers: Literal["any"] | list[str]
    pools: list[str] = []
    oca: str | None = None


class PlatformForm(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """A whole document."""

    apiVersion: Literal["sevattest/v1"]  # noqa: N815 -- the key's spelling in the document
    kind: Literal["Platform"]
    metadata: MetadataForm
    spec: PlatformSpecForm
