"""The files that the owner's commands read: documents, chains, keys, secrets; `-` is standard input."""

from __future__ import annotations

import sys
from pathlib import Path

from common.errors import CLASS_OF, InvalidInput, Reason, SevattestError

DOCUMENT_MAX = 256 * 1024  # bytes that the verifier reads
SECRET_MAX = 16 * 1024  # bytes that the largest packet holds


def read(name: str, most: int) -> bytes:
    """A file's bytes, `most` at the most; `-` is standard input.

    Raises:
        InvalidInput: it is larger.
        OSError: it cannot be read.
    """
    if name == "-":
        data = sys.stdin.buffer.read(most + 1)
    else:
        with Path(name).open("rb") as file:
            data = file.read(most + 1)
    if len(data) > most:
        raise wrong(name, f"is larger than {most} bytes")
    return data


def read_document(name: str) -> str:
    """A document's text. The verifier reads it as JSON if it starts with `{`, and as YAML otherwise.

    Raises:
        InvalidInput: it is too large, no text, or called `.json` and no JSON object.
    """
    try:
        text = read(name, DOCUMENT_MAX).decode()
    except UnicodeDecodeError:
        raise wrong(name, "is not UTF-8 text") from None
    if not text.strip():
        raise wrong(name, "is empty")
    if name.endswith(".json") and not text.lstrip().startswith("{"):
        raise wrong(name, "is no JSON object")
    return text


def wrong(name: str, what: str) -> InvalidInput:
    """The error for a file that cannot be used."""
    return InvalidInput(Reason.INVALID_ARGUMENT, f"{_called(name)}: {what}")


def about(name: str, error: SevattestError) -> SevattestError:
    """The same error, saying which file it is about."""
    named = CLASS_OF[error.reason](error.reason, f"{_called(name)}: {error.message}", **error.fields)
    named.problems = tuple(f"{_called(name)}: {each}" for each in error.problems)
    return named


def _called(name: str) -> str:
    return "standard input" if name == "-" else name
