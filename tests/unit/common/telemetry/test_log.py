"""The log: one line of JSON an event, and no secret in it whatever a caller passes."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import IntEnum, IntFlag
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import Reason, Refused
from common.telemetry.log import SECRET_NAMES, SECRET_WORDS, SILENCE, Log, configure, redact

CANARY = "c0ffee00c0ffee00"


class Lines:
    """A configured log and what it has written."""

    def __init__(self) -> None:
        self.stream = io.StringIO()
        self.log: Log = configure("sev-test", self.stream)

    def one(self) -> dict[str, Any]:
        (line,) = self.stream.getvalue().splitlines()
        parsed: dict[str, Any] = json.loads(line)
        return parsed


@pytest.fixture
def lines() -> Iterator[Lines]:
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield Lines()
    root.setLevel(level)
    root.handlers[:] = handlers


def test_an_event_is_one_line_with_time_level_service_and_fields(lines: Lines) -> None:
    lines.log.info("launch.released", launch_id=UUID(int=7), count=3, ok=True, at=datetime(2026, 11, 23, tzinfo=UTC))
    line = lines.one()
    assert datetime.fromisoformat(line.pop("time")).tzinfo is not None
    assert line == {
        "level": "info",
        "service": "sev-test",
        "event": "launch.released",
        "launch_id": "00000000-0000-0000-0000-000000000007",
        "count": 3,
        "ok": True,
        "at": "2026-11-23T00:00:00.000Z",
    }


@pytest.mark.parametrize("level", ["info", "warning", "error"])
def test_each_level_names_itself(lines: Lines, level: str) -> None:
    getattr(lines.log, level)("event")
    assert lines.one()["level"] == level


def test_a_text_with_line_breaks_stays_on_its_line(lines: Lines) -> None:
    lines.log.info("a\nb", text='x\n{"event":"forged"}\x1b[2J')
    assert lines.one()["text"] == 'x\n{"event":"forged"}\x1b[2J'
    assert "\x1b" not in lines.stream.getvalue()


@pytest.mark.parametrize(
    "name", sorted({*SECRET_WORDS, *SECRET_NAMES, "TEK", "vm_tik", "secret_value", "kek-file.kek"})
)
def test_a_field_that_sounds_like_a_secret_is_not_printed_at_any_depth(lines: Lines, name: str) -> None:
    lines.log.info("event", **{name: CANARY}, deep={name: [CANARY]}, deeper=[{name: CANARY}])
    assert CANARY not in lines.stream.getvalue()
    assert lines.one()[name] == "[redacted]"


def test_how_many_secrets_there_are_is_no_secret(lines: Lines) -> None:
    lines.log.info("event", secrets=3, has_tik=False, tek=None, kek=int(CANARY, 16))
    line = lines.one()
    assert (line["secrets"], line["has_tik"], line["tek"], line["kek"]) == (3, False, None, "[redacted]")


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_bytes_are_counted_and_never_printed(lines: Lines, kind: type) -> None:
    raw = kind(bytes.fromhex(CANARY))
    lines.log.info("event", data=raw, more=[raw, {"x": raw}])
    line = lines.one()
    assert (line["data"], line["more"]) == ("[8 bytes]", ["[8 bytes]", {"x": "[8 bytes]"}])


def test_of_an_object_only_its_type_is_printed(lines: Lines) -> None:
    @dataclass
    class Holder:
        value: str = CANARY

        def __str__(self) -> str:
            return CANARY

    lines.log.info("event", holder=Holder(), path=Path("a/b"), reason=Reason.NOT_FOUND, kinds={1})
    line = lines.one()
    assert (line["holder"], line["path"], line["reason"], line["kinds"]) == ("[Holder]", "a/b", "NOT_FOUND", [1])
    assert CANARY not in lines.stream.getvalue()


def _raised(error: Exception, cause: Exception | None = None) -> Exception:
    def stumble() -> None:
        raise error from cause

    with pytest.raises(type(error)) as caught:
        stumble()
    return caught.value


def test_a_foreign_exception_is_its_type_its_place_and_its_causes(lines: Lines) -> None:
    lines.log.error("defect", error=_raised(ValueError(CANARY), KeyError(CANARY)))
    described = lines.one()["error"]
    assert described["type"] == "ValueError"
    assert described["causes"] == ["KeyError"]
    assert described["where"][-1].startswith("test_log.py:")
    assert CANARY not in lines.stream.getvalue()


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (Refused(Reason.CHIP_REVOKED, "the chip is revoked"), "the chip is revoked"),
        (FileNotFoundError(2, "No such file or directory", "x"), "No such file or directory"),
        (sqlite3.OperationalError("database is locked"), "database is locked"),
    ],
)
def test_an_exception_that_cannot_quote_a_secret_keeps_its_words(lines: Lines, error: Exception, text: str) -> None:
    lines.log.error("failed", error=_raised(error))
    assert lines.one()["error"]["text"] == text


def test_a_field_cannot_take_the_place_of_the_lines_own(lines: Lines) -> None:
    lines.log.info("event", service="forged", time="never")
    line = lines.one()
    assert (line["service"], line["service_"], line["time_"]) == ("sev-test", "forged", "never")


def test_what_libraries_log_comes_through_without_what_they_quote(lines: Lines) -> None:
    logging.getLogger("some.library").warning("request %s failed\nbody: %s", CANARY, CANARY)
    logging.getLogger("some.library").info("nobody asked")
    line = lines.one()
    assert (line["event"], line["logger"], line["text"]) == ("library", "some.library", "request %s failed")
    assert CANARY not in lines.stream.getvalue()


async def test_a_forgotten_tasks_exception_is_logged_without_its_text(lines: Lines) -> None:
    error = _raised(ValueError(CANARY))
    asyncio.get_running_loop().call_exception_handler({"message": "a task was forgotten", "exception": error})
    line = lines.one()
    assert (line["logger"], line["text"], line["error"]["type"]) == ("asyncio", "a task was forgotten", "ValueError")
    assert CANARY not in lines.stream.getvalue()


@pytest.mark.parametrize(
    "error", [BrokenPipeError(), OSError(28, "No space left on device"), ValueError("closed file")]
)
def test_a_line_that_cannot_be_written_is_lost_and_fails_no_call(error: Exception) -> None:
    class Gone(io.StringIO):
        def write(self, _text: str) -> int:
            raise error

    log = configure("sev-test", Gone())
    log.error("something.failed")
    logging.getLogger("library").warning("something")


def test_configuring_twice_writes_once() -> None:
    first, second = Lines(), Lines()
    logging.getLogger("some.library").warning("once")
    assert first.stream.getvalue() == ""
    assert len(second.stream.getvalue().splitlines()) == 1
    root = logging.getLogger()
    root.handlers[:] = [handler for handler in root.handlers if "_LibraryHandler" not in repr(handler)]


_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(_values)
def test_whatever_is_logged_can_be_written_as_json(value: object) -> None:
    json.dumps(redact(value))


@pytest.mark.parametrize("value", ["\x9b2J", "\u202egnp", "\udcff", 1 << 80, float("nan"), float("inf")])
def test_whatever_is_logged_is_one_line_of_ascii(lines: Lines, value: object) -> None:
    lines.log.info("event", value=value, text="ok")
    written = lines.stream.getvalue()
    assert written.isascii()
    assert lines.one()["text"] == "ok"
    if not isinstance(value, float):
        assert lines.one()["value"] == value


class Count(int):
    pass


class Share(float):
    pass


class Word(str):
    __slots__ = ()


class Colour(IntEnum):
    RED = 1


class Bits(IntFlag):
    A = 1
    B = 2


# A value, and what a reader of the line gets.
WRITTEN = (
    *(("\x7f", "\x7f"), ("a\x7fé", "a\x7fé"), ("\\\x7f", "\\\x7f"), ({"\x7f": 1}, {"\x7f": 1}), ("\\u007f", "\\u007f")),
    *((float(word), None) for word in ("nan", "inf", "-inf")),
    *(
        (["é", float("nan")], ["é", None]),
        ({"é": {"x": float("inf")}}, {"é": {"x": None}}),
        ([1 << 80, -0.5], [1 << 80, -0.5]),
    ),
    *((Count(5), 5), (Share(0.5), 0.5), (Share("nan"), None), (Word("x"), "x"), (Colour.RED, 1), (Bits.A | Bits.B, 3)),
    *(
        ([Count(5), (Share(0.5),)], [5, [0.5]]),
        ({Word("k"): Count(1), "secrets": Count(2)}, {"k": 1, "secrets": 2}),
        (True, True),
        (None, None),
    ),
    *((1 << 20_000, "[20001 bits]"), (["é", -(1 << 20_000)], ["é", "[20001 bits]"])),
)


@pytest.mark.parametrize("beside", ["ok", "é"])  # each of the two ways to write a line
@pytest.mark.parametrize(("value", "read"), WRITTEN, ids=range(len(WRITTEN)))
def test_whatever_is_logged_is_json_that_a_terminal_takes_for_text(
    lines: Lines, value: object, read: object, beside: str
) -> None:
    lines.log.info("event", value=value, beside=beside)
    written = lines.stream.getvalue()
    assert written.removesuffix("\n").isprintable()
    assert written.isascii()

    def refuse(constant: str) -> object:
        raise ValueError(constant)

    line = json.loads(written, parse_constant=refuse)
    assert (line["value"], line["beside"]) == (read, beside)
    assert type(line["value"]) is type(read)


def test_a_value_that_contains_itself_is_printed_to_a_depth() -> None:
    knot: list[object] = []
    knot.append(knot)
    json.dumps(redact(knot))


def test_the_silent_log_takes_everything() -> None:
    SILENCE.info("event", tek=b"x")
    SILENCE.warning("event")
    SILENCE.error("event")
