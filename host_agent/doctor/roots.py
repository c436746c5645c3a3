"""Whose signature under a chip's key counts: AMD's, or that of the root which a person names with `--ca`."""

from __future__ import annotations

from pathlib import Path

from common.sev.certs.chain import MAX_CONTAINER_SIZE
from common.sev.certs.roots import Root, named_root, pinned_roots
from common.sev.errors import ParseError


def trusted(ca: Path | None) -> tuple[Root, ...]:
    """The roots that count.

    Args:
        ca: a file with an ASK and an ARK; AMD's own count where there is none.

    Raises:
        ParseError: it holds something else; names it.
        Refused: the two do not hold together, or one is AMD's and the other is not.
        OSError: it cannot be read.
    """
    if ca is None:
        return pinned_roots()
    with ca.open("rb") as file:
        data = file.read(MAX_CONTAINER_SIZE + 1)
    try:
        return (named_root(data),)
    except ParseError as error:
        raise ParseError(f"{ca}: {error.message}") from error
