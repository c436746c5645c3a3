"""The form of a Workload document; docs/workload.md describes each key, and a test compares the two."""

from __future__ import annotations

from typing import Literal

import msgspec

from verifier.documents.form import MetadataForm
from verifier.documents.sources import GENERATED_SIZE


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
    ownership: Literal["any", "self"] | list[str] = "any"


class StoredForm(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """`spec.secrets[].source.stored` in full."""

    name: str
    version: int | None = None


class VaultForm(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """`spec.secrets[].source.vault`."""

    mount: str
    path: str
    field: str
    base64: bool = False
    version: int | None = None


class GeneratedForm(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """`spec.secrets[].source.generated` in full."""

    form: Literal["bytes", "passphrase"] = "bytes"
    size: int = GENERATED_SIZE


class SourceForm(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """`spec.secrets[].source`: exactly one of these."""

    file: str | None = None
    stored: str | StoredForm | None = None
    vault: VaultForm | None = None
    generated: Literal["bytes", "passphrase"] | GeneratedForm | None = None


class SecretForm(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """One of `spec.secrets`."""

    guid: str
    source: SourceForm
    trailing_nul: bool = False


class SpecForm(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """`spec`."""

    platforms: PlatformsForm
    callers: list[str] = []
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
