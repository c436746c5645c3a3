"""A demonstration's transcript with what differs from run to run, or from machine to machine, replaced by its kind."""

from __future__ import annotations

import re

_KINDS = (
    (r"(?m)^  firmware   .*$", "  firmware   FIRMWARE"),
    (r"secret ([0-9a-f-]{36}) (\d+) [0-9a-f]+…?", r"secret \1 \2 HEX"),
    (r"[0-9a-f]{96}|[0-9a-f]{64}", "HEX"),
    (r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "UUID"),
    (r"in [0-9.]+ s", "in TIME"),
    (r" +[0-9.]+ ms", " TIME"),
    (r"(?m)^  \[ *[0-9.]+\] ", "  [TIME] "),
    (r"chip [0-9a-f]{16}…", "chip CHIP"),
    (r"\d+ known neighbours", "N known neighbours"),
    (r'"[A-Za-z0-9_-]{32}"', '"SECRET"'),
    (r"QEMU [0-9]+(\.[0-9]+)+", "QEMU VERSION"),
    (r"Linux (version )?[0-9]+\.[0-9]+\.[^\s,]+", r"Linux \1RELEASE"),
    (r"EFI v[0-9.]+ by .*", "EFI FIRMWARE"),
)


def still(text: str) -> str:
    """The transcript as it is every time."""
    for pattern, kind in _KINDS:
        text = re.sub(pattern, kind, text)
    return text
