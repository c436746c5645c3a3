"""One JSON line an event on stderr. It never holds bytes, a secret's field, an object's repr or an exception's text."""

from __future__ import annotations

import json
import logging
import sqlite3
import sys
import traceback
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from functools import lru_cache
from itertools import islice
from math import isfinite
from pathlib import PurePath
from typing import Any, Protocol, TextIO, cast
from uuid import UUID

import msgspec

from common.errors import SevattestError

# Fields with these names, or with one of them as a word of the name (`vm_tek`, `secret_value`), are never printed.
SECRET_WORDS = frozenset(
    {
        "tek",
        "tik",
        "kek",
        "secret",
        "secrets",
        "payload",
        "packet",
        "plaintext",
        "password",
        "passphrase",
        "token",
        "pem",
    }
)
# … and these only as the whole name: `key` alone is a key, `api_key` is caught by nobody's naming here.
SECRET_NAMES = frozenset({"key", "private_key", "godh_key", "key_bytes", "table"})
_REDACTED = "[redacted]"
_MAX_TEXT = 2000
_MAX_ITEMS = 64
_MAX_DEPTH = 6
_MAX_FRAMES = 30
_MAX_COUNT = 1_000_000
_MAX_BITS = 14_000  # of a number; Python writes 4300 decimal digits and no more
_NUMBERS = frozenset({bool, int, float})
_ASCII = json.JSONEncoder(ensure_ascii=True, separators=(",", ":"))


class Log(Protocol):
    """Takes events: a short dotted name (`launch.released`) and fields."""

    def info(self, event: str, **fields: Any) -> Any:
        """Something happened that an operator expects."""
        ...

    def warning(self, event: str, **fields: Any) -> Any:
        """Something happened that an operator should look at."""
        ...

    def error(self, event: str, **fields: Any) -> Any:
        """Something failed that should not."""
        ...


class _Silence:
    """A log that keeps nothing."""

    def info(self, event: str, **fields: Any) -> None: ...

    def warning(self, event: str, **fields: Any) -> None: ...

    def error(self, event: str, **fields: Any) -> None: ...


SILENCE: Log = _Silence()


def configure(service: str, stream: TextIO | None = None) -> Log:
    """Make the process's log, and send what libraries log (warnings and worse) through it too.

    Args:
        service: the `service` of every line, for example `sev-verifier`.
        stream: where the lines go; stderr when None.
    """
    log = _JsonLog(service, stream or sys.stderr)
    root = logging.getLogger()
    for old in [handler for handler in root.handlers if isinstance(handler, _LibraryHandler)]:
        root.removeHandler(old)
    root.addHandler(_LibraryHandler(log))
    root.setLevel(logging.WARNING)
    return log


class _JsonLog:
    """The `Log` that writes. A line that cannot be written (closed pipe, full disk) is lost: no call fails for it."""

    def __init__(self, service: str, stream: TextIO) -> None:
        self._service = service
        self._stream = stream

    def info(self, event: str, **fields: Any) -> None:
        self._write("info", event, fields)

    def warning(self, event: str, **fields: Any) -> None:
        self._write("warning", event, fields)

    def error(self, event: str, **fields: Any) -> None:
        self._write("error", event, fields)

    def _write(self, level: str, event: str, fields: Mapping[Any, object]) -> None:
        line: dict[str, Any] = {
            "time": _timestamp(datetime.now(UTC)),
            "level": level,
            "service": self._service,
            "event": event[:_MAX_TEXT],
        }
        # A field never replaces one of the line's own.
        line |= {(name if name not in line else f"{name}_"): value for name, value in _fields(fields, 0).items()}
        with suppress(OSError, ValueError):
            self._stream.write(_encode(line))
            self._stream.flush()


def _encode(line: dict[str, Any]) -> str:
    """The line's text, of ASCII: what a terminal could take for a command or a direction is escaped."""
    with suppress(ValueError, OverflowError):  # half a surrogate pair, a number of more than 64 bits
        text = msgspec.json.encode(line).decode()
        if text.isascii() and "\x7f" not in text:
            return text + "\n"
    return _ASCII.encode(_writable(line)).replace("\x7f", r"\u007f") + "\n"


def _writable(value: object) -> object:
    """What was taken for printing, without the numbers that JSON or Python cannot write."""
    if isinstance(value, dict):
        return {name: _writable(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_writable(each) for each in value]
    if isinstance(value, float) and not isfinite(value):
        return None
    if isinstance(value, int) and value.bit_length() > _MAX_BITS:
        return f"[{value.bit_length()} bits]"
    return value


def _fields(fields: Mapping[Any, object], depth: int) -> dict[str, object]:
    """What of some fields may be printed. A release writes fifty, so the plain ones go through no other function."""
    printed: dict[str, object] = {}
    for key, value in islice(fields.items(), _MAX_ITEMS):
        name, kind = str(key), type(value)
        if _is_secret(name):
            printed[name] = redact(value) if _is_count(value) else _REDACTED
        elif value is None or kind in _NUMBERS or (kind is str and len(cast("str", value)) <= _MAX_TEXT):
            printed[name] = value
        else:
            printed[name] = redact(value, depth)
    return printed


def _is_count(value: object) -> bool:
    """How many secrets there are, or whether there is one: that is no secret."""
    return value is None or isinstance(value, bool) or (isinstance(value, int) and abs(value) < _MAX_COUNT)


@lru_cache(maxsize=4096)
def _is_secret(name: str) -> bool:
    lowered = name.lower()
    words = lowered.replace("-", "_").replace(".", "_").split("_")
    return lowered in SECRET_NAMES or not SECRET_WORDS.isdisjoint(words)


def redact(value: object, depth: int = 0) -> object:
    """What of `value` may be printed: numbers, text, times, ids; containers of these; of all else only the type."""
    if isinstance(value, str):  # a StrEnum too
        return str(value) if len(value) <= _MAX_TEXT else f"{value[:_MAX_TEXT]}…"
    if value is None or type(value) in _NUMBERS:
        return value
    if isinstance(value, (int, float)):  # a kind of its own, that only this base can write
        return int(value) if isinstance(value, int) else float(value)
    if depth < _MAX_DEPTH:
        if isinstance(value, (list, tuple, set, frozenset)):
            return [redact(item, depth + 1) for item in list(value)[:_MAX_ITEMS]]
        if isinstance(value, (dict, Mapping)):  # for a `dict` nobody asks what a Mapping is
            return _fields(value, depth + 1)
    return _described(value)


def _described(value: object) -> object:
    if isinstance(value, datetime):
        return _timestamp(value)
    if isinstance(value, (UUID, PurePath)):
        return str(value)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return f"[{len(value)} bytes]"
    if isinstance(value, BaseException):
        return describe_exception(value)
    return f"[{type(value).__name__}]"


def _timestamp(value: datetime) -> str:
    return value.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def describe_exception(error: BaseException) -> dict[str, object]:
    """An exception as types and places, with text only where no secret can be in it.

    Of a foreign exception the text stays out: it may quote the value that it stumbled over.
    """
    kinds: list[str] = []
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen and len(kinds) < _MAX_ITEMS:
        seen.add(id(cause))
        kinds.append(f"{type(cause).__module__}.{type(cause).__qualname__}".removeprefix("builtins."))
        cause = cause.__cause__ or cause.__context__
    frames = traceback.extract_tb(error.__traceback__)[-_MAX_FRAMES:]
    described: dict[str, object] = {
        "type": kinds[0],
        "where": [f"{PurePath(f.filename).name}:{f.lineno} {f.name}" for f in frames],
    }
    if len(kinds) > 1:
        described["causes"] = kinds[1:]
    if isinstance(error, SevattestError):
        described |= {"reason": error.reason.value, "text": error.message}
    elif isinstance(error, OSError):
        described["text"] = error.strerror or ""
    elif isinstance(error, sqlite3.Error):
        # SQLite names tables, columns and conditions, never a bound value.
        described["text"] = str(error)
    return described


class _LibraryHandler(logging.Handler):
    """Brings the standard library's log records into ours: the logger's name and the first line of the template."""

    def __init__(self, log: Log) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record; arguments and exception texts stay out, they may quote anything."""
        template = record.msg.split("\n", 1)[0][:200] if isinstance(record.msg, str) else type(record.msg).__name__
        fields: dict[str, Any] = {"logger": record.name, "text": template}
        if record.exc_info and record.exc_info[1] is not None:
            fields["error"] = record.exc_info[1]
        write = self._log.error if record.levelno >= logging.ERROR else self._log.warning
        write("library", **fields)
