"""The form of a Grant document; docs/grants.md describes each key, and a test compares the two."""

from __future__ import annotations

from typing import Literal

import msgspec

from verifier.documents.form import MetadataForm


class GrantPlatformsForm(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """`spec.platforms`, where not any platform will do."""

    names: list[str] = []
    pools: list[str] = []


class GrantSpecForm(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """`spec`."""

    workload: str
    callers: list[str]
    platforms: Literal["any"] | GrantPlatformsForm
    launches: int
    at_once: int
    versions: Literal["any"] | list[str] = "any"
    refusals: int | None = None
    rate: str | None = None
    not_before: str | None = None
    not_after: str | None = None
    suspended: bool = False


class GrantForm(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """A whole document."""

    apiVersion: Literal["sevattest/v1"]  # noqa: N815 -- the key's spelling in the document
    kind: Literal["Grant"]
    metadata: MetadataForm
    spec: GrantSpecForm
