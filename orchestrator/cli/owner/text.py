"""How the owner's commands print: tables, times, JSON, and documents as YAML that reads as the same document."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec

from common.command import clean

# Text that YAML reads as this very text without quotes, whichever of its versions reads it: nothing that could be a
# number, a date, a boolean, null or an indicator.
_PLAIN = re.compile(r"[A-Za-z_/][A-Za-z0-9_./-]*(?: [A-Za-z0-9_./-]+)*")
_BASIC_PLANE = 0xFFFF
_WORDS = frozenset({"true", "false", "null", "yes", "no", "on", "off", "y", "n"})


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table, columns two spaces apart."""
    cells = [list(heads), *([clean(cell) or "-" for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(heads))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def when(time: datetime | None) -> str:
    """A time to the second, in UTC; empty for none."""
    return "" if time is None else time.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def as_json(value: Any, *, indent: int | None = 2) -> str:
    """A value of `orchestrator.drivers.admin_values`, or several, as JSON."""
    return json.dumps(msgspec.to_builtins(value), indent=indent, ensure_ascii=False)


def as_yaml(text: str) -> str:
    """The YAML that says what a JSON text says, in the order of its members."""
    return "\n".join(_block(json.loads(text), 0))


def _block(value: Any, depth: int) -> Iterator[str]:
    indent = "  " * depth
    if isinstance(value, dict) and value:
        for key, member in value.items():
            yield from _entry(f"{indent}{_scalar(key)}:", member, depth)
    elif isinstance(value, list) and value:
        for item in value:
            if isinstance(item, dict | list) and item:
                first, *rest = _block(item, depth + 1)
                yield f"{indent}- {first.lstrip()}"
                yield from rest
            else:
                yield f"{indent}- {_scalar(item)}"
    else:
        yield f"{indent}{_scalar(value)}"


def _entry(key: str, value: Any, depth: int) -> Iterator[str]:
    if isinstance(value, dict | list) and value:
        yield key
        yield from _block(value, depth + 1)
    else:
        yield f"{key} {_scalar(value)}"


def _scalar(value: Any) -> str:
    if isinstance(value, str) and _PLAIN.fullmatch(value) and value.lower() not in _WORDS:
        return value
    # A JSON string is a YAML string in double quotes, as long as everything that could be seen otherwise is escaped.
    return "".join(map(_spelled, json.dumps(value, ensure_ascii=False)))


def _spelled(letter: str) -> str:
    code = ord(letter)
    if letter.isprintable():
        return letter
    return f"\\u{code:04x}" if code <= _BASIC_PLANE else f"\\U{code:08x}"
