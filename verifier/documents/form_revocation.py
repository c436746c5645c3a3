"""The form of a Revocation document; docs/revocations.md describes each key, and a test compares the two."""

from __future__ import annotations

from typing import Literal

import msgspec

from verifier.documents.form import MetadataForm


class RevokedFirmwareForm(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """One of `spec.firmware`."""

    generation: str
    versions: list[str] = []
    below: str | None = None


class RevokedWorkloadForm(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """One of `spec.workloads`."""

    name: str
    versions: Literal["any"] | list[str]


class RevocationSpecForm(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """`spec`."""

    why: str
    chips: list[str] = []
    ceks: list[str] = []
    generations: list[str] = []
    firmware: list[RevokedFirmwareForm] = []
    ocas: list[str] = []
    workloads: list[RevokedWorkloadForm] = []


class RevocationForm(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """A whole document."""

    apiVersion: Literal["sevattest/v1"]  # noqa: N815 -- the key's spelling in the document
    kind: Literal["Revocation"]
    metadata: MetadataForm
    spec: RevocationSpecForm
