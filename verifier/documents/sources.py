"""Where a secret comes from, as a workload says it. Values only: `verifier.secrets` asks the sources.

The classes are tagged (`kind`), because they are frozen with a launch's terms and read again at release.
"""

from __future__ import annotations

import msgspec

GENERATED_SIZE = 32  # bytes of a generated secret, unless the document says another
GENERATED_MAX = 512  # bytes


class FileSource(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="file"):
    """A file on the verifier's own disk, read anew for each release.

    Attributes:
        path: absolute, or relative to the verifier's working directory once the document's folder was put before it.
    """

    path: str


class StoredSource(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="stored"):
    """A secret that the owner put into the verifier's store.

    Attributes:
        name: its name.
        version: from 1; None for the newest at release.
    """

    name: str
    version: int | None = None


class VaultSource(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="vault"):
    """A field of a secret in HashiCorp Vault's key-value engine, version 2.

    Attributes:
        mount: where the engine is mounted.
        path: of the secret below it.
        field: in the secret; its text in UTF-8 is the secret, or what that text decodes to.
        base64: whether the text is base64 of the secret.
        version: from 1; None for the newest at release.
    """

    mount: str
    path: str
    field: str
    base64: bool = False
    version: int | None = None


class GeneratedSource(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="generated"):
    """A secret that is made for one launch, and kept, sealed, for the owner.

    Attributes:
        form: `bytes` for random bytes, `passphrase` for text that can be typed (LUKS, GRUB): base32, no line end.
        size: bytes of the secret, which for a passphrase are characters of 5 bits each.
    """

    form: str = "bytes"
    size: int = GENERATED_SIZE


Source = FileSource | StoredSource | VaultSource | GeneratedSource


def source_name(source: Source) -> dict[str, object]:
    """What a source is called, in parts; none of their names is that of a field that the log blacks out."""
    match source:
        case FileSource():
            return {"file": source.path}
        case StoredSource():
            return {"stored": source.name, "version": source.version}
        case VaultSource():
            return {"vault": f"{source.mount}/{source.path}#{source.field}", "version": source.version}
        case GeneratedSource():
            return {"generated": source.form}
