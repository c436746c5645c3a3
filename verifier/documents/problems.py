"""What is wrong with a document, collected; and the checks that several kinds of document share."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from datetime import timedelta
from pathlib import Path

from common.errors import SevattestError
from common.rpc.identity import Role, parse_spiffe_id
from verifier.documents.form import MetadataForm

CALLERS_MAX = 1024
# Bytes of UTF-8 of a reason in words: it goes into findings, records and receipts, which have to fit into an answer.
REASON_MAX = 1024
# Names, fingerprints and the like in one list: a text of 256 KiB holds no more fingerprints than a few thousand.
ITEMS_MAX = 65536

HEX32 = re.compile(r"[0-9a-f]{64}")
HEX64 = re.compile(r"[0-9a-f]{128}")
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")
_DURATION = re.compile(r"(\d{1,5})(s|m|h)", re.ASCII)
_SECONDS = {"s": 1, "m": 60, "h": 3600}
_NAME_WORDS = "must be 1 to 128 of A-Z a-z 0-9 . _ -, not starting with . or -"
_VERSION_WORDS = "must be 1 to 64 of A-Z a-z 0-9 . _ + -, starting with a letter or digit"


def duration(text: str) -> timedelta | None:
    """What `90s`, `10m` or `1h` spells; None for anything else."""
    match = _DURATION.fullmatch(text)
    return timedelta(seconds=int(match[1]) * _SECONDS[match[2]]) if match else None


class Problems:
    """What is wrong with a document, each with its path."""

    def __init__(self, *, confined: bool = False) -> None:
        """Nothing is wrong yet.

        Args:
            confined: whether the document may name files in its folder only.
        """
        self.found: list[str] = []
        self._confined = confined

    def add(self, path: str, message: str) -> None:
        """One more."""
        self.found.append(f"{path}: {message}")

    def refuse_repeats(self, path: str, items: Iterable[object]) -> None:
        """A problem for each item that was there before."""
        seen: set[object] = set()
        for item in items:
            if item in seen:
                self.add(path, f"{item} comes twice")
            seen.add(item)

    def file(self, where: str, folder: Path, text: str) -> Path:
        """The path that `text` names, relative to the document's folder."""
        if not text or "\0" in text:
            self.add(where, "names no file")
            return folder
        # Judged by the text: what a link in the folder leads to is the choice of whoever keeps the folder.
        if self._confined and (text.startswith("/") or ".." in text.split("/")):
            self.add(where, "must be a path in the folder of documents, as an applied document names no other file")
        return folder / text

    def metadata(self, form: MetadataForm) -> None:
        """Check a document's name and version."""
        self.name("metadata.name", form.name)
        self.version("metadata.version", form.version)

    def name(self, path: str, text: str) -> str:
        """Check a name of a document, a pool or a stored secret."""
        if not NAME.fullmatch(text):
            self.add(path, _NAME_WORDS)
        return text

    def version(self, path: str, text: str) -> str:
        """Check a document's version."""
        if not _VERSION.fullmatch(text):
            self.add(path, _VERSION_WORDS)
        return text

    def reason(self, path: str, text: str) -> None:
        """Check a reason that the owner gives for whoever reads a record or a receipt."""
        if not text.strip() or len(text.encode()) > REASON_MAX:
            self.add(path, f"is a reason, in words, at most {REASON_MAX} bytes")

    def names(self, path: str, texts: Sequence[str]) -> frozenset[str]:
        """Check a list of names."""
        for index, text in enumerate(texts):
            self.name(f"{path}[{index}]", text)
        return self._listed(path, texts)

    def versions(self, path: str, texts: Sequence[str]) -> frozenset[str]:
        """Check a list of versions, which names one at least."""
        if not texts:
            self.add(path, "names no version: list some, or write any")
        for index, text in enumerate(texts):
            self.version(f"{path}[{index}]", text)
        return self._listed(path, texts)

    def digits(self, path: str, texts: Sequence[str], pattern: re.Pattern[str], words: str) -> frozenset[str]:
        """Check a list of fingerprints or ids."""
        for index, text in enumerate(texts):
            if not pattern.fullmatch(text):
                self.add(f"{path}[{index}]", words)
        return self._listed(path, texts)

    def callers(self, path: str, texts: Sequence[str]) -> frozenset[str]:
        """Check a list of orchestrators."""
        if len(texts) > CALLERS_MAX:
            self.add(path, f"names more than {CALLERS_MAX} callers")
        for index, text in enumerate(texts):
            try:
                if parse_spiffe_id(text).role is not Role.ORCHESTRATOR:
                    self.add(f"{path}[{index}]", "is not an orchestrator")
            except SevattestError:
                self.add(f"{path}[{index}]", "must be spiffe://TRUST-DOMAIN/orchestrator/NAME")
        return self._listed(path, texts)

    def _listed(self, path: str, texts: Sequence[str]) -> frozenset[str]:
        if len(texts) > ITEMS_MAX:
            self.add(path, f"lists more than {ITEMS_MAX}")
        self.refuse_repeats(path, texts)
        return frozenset(texts)
