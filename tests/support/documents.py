"""An owner's documents of all four kinds, the files that the workload names, and a store that holds documents only."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path, PurePath
from typing import Any
from uuid import UUID

import yaml

from common.audit.chain import Head
from tests.support.firmware import amdsev_image
from tests.support.store_rows import SEAL
from verifier.documents.reader import Document, read_document
from verifier.store.rows import DocumentRow, DocumentSet

CALLER = "spiffe://datacenter.example/orchestrator/cluster"
STRANGER = "spiffe://datacenter.example/orchestrator/stranger"
SECRET_GUID = UUID("43ced044-42ec-487a-88b7-261bda359f24")
SECRET = b"a disk's passphrase\n"
CHIP = "ab" * 32
APPLIED_AT = datetime(2026, 3, 1, 12, tzinfo=UTC)


def _document(kind: str, name: str, version: str, spec: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return {
        "apiVersion": "sevattest/v1",
        "kind": kind,
        "metadata": {"name": name, "version": version},
        "spec": {key: value for key, value in (spec | changes).items() if value is not None},
    }


def workload(name: str = "web", version: str = "1", /, **changes: Any) -> dict[str, Any]:
    """A workload document that is good; `changes` replace members of `spec`, None removes one."""
    spec = {
        "callers": [CALLER],
        "measure": {
            "firmware": "ovmf.fd",
            "kernel": "kernel",
            "initrd": "initrd",
            "cmdline": "console=ttyS0",
            "vcpus": [1, 2, 4],
            "cpus": ["EPYC-Milan"],
            "flavours": ["legacy", "init2"],
        },
        "platforms": {"generations": ["emulated"], "chips": "any"},
        "secrets": [{"guid": str(SECRET_GUID), "source": {"file": "secret"}}],
    }
    return _document("Workload", name, version, spec, changes)


def grant(name: str = "fleet", version: str = "1", /, **changes: Any) -> dict[str, Any]:
    """A grant document that is good."""
    spec = {"workload": "web", "callers": [STRANGER], "platforms": "any", "launches": 10, "at_once": 2}
    return _document("Grant", name, version, spec, changes)


def platform(name: str = "host-1", version: str = "1", /, **changes: Any) -> dict[str, Any]:
    """A platform document that is good."""
    return _document("Platform", name, version, {"cek": CHIP, "callers": "any", "pools": ["rack-1"]}, changes)


def revocation(name: str = "incident", version: str = "1", /, **changes: Any) -> dict[str, Any]:
    """A revocation document that is good."""
    return _document("Revocation", name, version, {"why": "sold", "ceks": [CHIP]}, changes)


def read(content: Any, folder: str = "/owner") -> Document:
    """What a document says."""
    return read_document(yaml.safe_dump(content).encode(), is_json=False, folder=PurePath(folder), source="a.yaml")


def write_document(folder: Path, content: dict[str, Any], name: str = "web.yaml") -> Path:
    """Put a document into the owner's folder."""
    path = folder / name
    # By way of JSON, so that members that are one object here are no aliases there.
    path.write_text(yaml.safe_dump(json.loads(json.dumps(content))))
    return path


def write_artefacts(folder: Path) -> None:
    """The files that `workload` names, and an older version of each."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ovmf.fd").write_bytes(amdsev_image("new"))
    (folder / "kernel").write_bytes(b"the kernel")
    (folder / "initrd").write_bytes(b"the initrd")
    (folder / "secret").write_bytes(SECRET)
    (folder / "ovmf-old.fd").write_bytes(amdsev_image("old"))
    (folder / "kernel-old").write_bytes(b"the old kernel")


def row(content: dict[str, Any], *, text: bytes | None = None) -> DocumentRow:
    """A document as the store keeps it; with a `text` of its own it says something else than it did when applied."""
    return DocumentRow(
        kind=content["kind"],
        name=content["metadata"]["name"],
        version=content["metadata"]["version"],
        text=json.dumps(content).encode() if text is None else text,
        is_json=True,
        apply_time=APPLIED_AT,
    )


@dataclass
class AppliedDocuments:
    """A store that holds documents only, and counts how often it was read."""

    rows: list[DocumentRow] = field(default_factory=list)
    number: int = 0
    reads: int = 0
    sealed: bool = True
    error: Exception | None = None

    def apply(self, *contents: dict[str, Any]) -> None:
        """Keep documents."""
        self.put(*(row(content) for content in contents))

    def put(self, *rows: DocumentRow) -> None:
        """Keep rows as they are."""
        self.rows += rows
        self.number += 1

    def delete(self, kind: str, name: str) -> None:
        """Withdraw a document."""
        self.rows = [each for each in self.rows if (each.kind, each.name) != (kind, name)]
        self.number += 1

    async def revision(self) -> int:
        """See `Store`."""
        if self.error is not None:
            raise self.error
        return self.number

    async def documents(self) -> DocumentSet:
        """See `Store`."""
        if self.error is not None:
            raise self.error
        self.reads += 1
        change = Head(number=self.number, hash=bytes(32))
        found = DocumentSet(revision=self.number, rows=tuple(self.rows), change=change, tag=None)
        return replace(found, tag=SEAL.tag(found)) if self.sealed else found
