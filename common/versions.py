"""The order of documents' versions, which owners and the verifier must agree on."""

from __future__ import annotations

import re


def version_order(version: str) -> tuple[tuple[int, int, str], ...]:
    """Sorts versions naturally: numbers as numbers (`1.9` before `1.10`), and what is longer is newer.

    Any text has a place, as it may come from a request: numbers of any length, digits of other scripts as letters.
    """
    parts = re.findall(r"([0-9]+)|([^0-9]+)", version)
    return tuple(
        (1, len(number.lstrip("0")), number.lstrip("0")) if number else (0, 0, words) for number, words in parts
    )
