"""Reads `spec.secrets` of a Workload: which secrets, and where each comes from."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from common.ids import canonical_uuid
from common.sev.secret import ENTRIES_MAX
from verifier.documents.form_workload import GeneratedForm, SecretForm, SourceForm, StoredForm, VaultForm
from verifier.documents.problems import Problems
from verifier.documents.sources import (
    GENERATED_MAX,
    FileSource,
    GeneratedSource,
    Source,
    StoredSource,
    VaultSource,
)
from verifier.documents.workload import ATTESTED_GUID, SecretSpec

# 16 random bytes are as strong as AES-128; a passphrase's characters hold 5 bits each, so 26 of them hold as much.
_SIZE_MIN = {"bytes": 16, "passphrase": 26}
_VERSION_MAX = 2**31 - 1  # what a store's column and Vault's counter both hold
_FIELD_MAX = 128
# Path segments that mean themselves in a URL and in Vault's own paths.
_SEGMENT = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9._~ -]{1,128}")
_ONE_OF = "needs exactly one of file, stored, vault and generated"


def read_secrets(items: Sequence[SecretForm], folder: Path, problems: Problems) -> tuple[SecretSpec, ...]:
    """The secrets to release; without any, one that only an attested guest can know."""
    path = "spec.secrets"
    if not items:
        return (SecretSpec(guid=ATTESTED_GUID, source=GeneratedSource()),)
    if len(items) > ENTRIES_MAX:
        problems.add(path, f"lists {len(items)} secrets, Linux reads at most {ENTRIES_MAX}")
    secrets = []
    for index, item in enumerate(items):
        guid = canonical_uuid(item.guid)
        if guid is None or guid.int == 0:
            words = "must be a GUID in canonical form (36 characters, lower case), not zero"
            problems.add(f"{path}[{index}].guid", words)
        source = _source(item.source, f"{path}[{index}].source", folder, problems)
        if guid is not None and source is not None:
            secrets.append(SecretSpec(guid=guid, source=source, trailing_nul=item.trailing_nul))
    problems.refuse_repeats(path, [str(secret.guid) for secret in secrets])
    return tuple(secrets)


def _source(form: SourceForm, path: str, folder: Path, problems: Problems) -> Source | None:
    named = [each for each in (form.file, form.stored, form.vault, form.generated) if each is not None]
    if len(named) != 1:
        problems.add(path, _ONE_OF)
        return None
    if form.file is not None:
        return FileSource(path=str(problems.file(f"{path}.file", folder, form.file)))
    if form.stored is not None:
        return _stored(form.stored, f"{path}.stored", problems)
    if form.vault is not None:
        return _vault(form.vault, f"{path}.vault", problems)
    assert form.generated is not None  # noqa: S101 -- one of the four is there
    return _generated(form.generated, f"{path}.generated", problems)


def _stored(form: str | StoredForm, path: str, problems: Problems) -> StoredSource:
    if isinstance(form, str):
        return StoredSource(name=problems.name(path, form))
    name = problems.name(f"{path}.name", form.name)
    return StoredSource(name=name, version=_version(form.version, path, problems))


def _vault(form: VaultForm, path: str, problems: Problems) -> VaultSource:
    for key, text in (("mount", form.mount), ("path", form.path)):
        if not all(_SEGMENT.fullmatch(segment) for segment in text.split("/")):
            problems.add(f"{path}.{key}", "must be parts of A-Z a-z 0-9 . _ ~ - and blanks with single slashes between")
    if not 1 <= len(form.field) <= _FIELD_MAX:
        problems.add(f"{path}.field", f"must be 1 to {_FIELD_MAX} characters")
    return VaultSource(
        mount=form.mount,
        path=form.path,
        field=form.field,
        base64=form.base64,
        version=_version(form.version, path, problems),
    )


def _generated(form: str | GeneratedForm, path: str, problems: Problems) -> GeneratedSource:
    full = GeneratedForm(form=form) if isinstance(form, str) else form  # type: ignore[arg-type]  # msgspec checked it
    least = _SIZE_MIN[full.form]
    if not least <= full.size <= GENERATED_MAX:
        problems.add(f"{path}.size", f"must be {least} to {GENERATED_MAX} for {full.form}")
    return GeneratedSource(form=full.form, size=full.size)


def _version(version: int | None, path: str, problems: Problems) -> int | None:
    if version is not None and not 1 <= version <= _VERSION_MAX:
        problems.add(f"{path}.version", f"must be 1 to {_VERSION_MAX}")
    return version
