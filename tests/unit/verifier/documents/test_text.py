"""Text to plain data: YAML's safe subset and JSON, without what makes either ambiguous."""

from __future__ import annotations

import contextlib
import json
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verifier.documents.text import TEXT_MAX, InvalidDocument, parse_text


def test_yaml_and_json_give_the_same_data() -> None:
    expected = {"a": [1, "b"], "c": {"d": True}}
    assert parse_text(b"a: [1, b]\nc: {d: true}\n", is_json=False) == expected
    assert parse_text(b'{"a": [1, "b"], "c": {"d": true}}', is_json=True) == expected


# What is spelled, and what it means; None where readers differ (YAML 1.1 and the core schema of YAML 1.2), so that none
# is asked.
SPELLINGS: tuple[tuple[str, object], ...] = (
    ("100", 100),
    ("0", 0),
    ("-7", -7),
    ("+7", 7),
    ("1.10", 1.1),
    ("-0.5", -0.5),
    (".5", 0.5),
    ("1.5e+3", 1500.0),
    (".inf", math.inf),
    ("true", True),
    ("False", False),
    ("null", None),
    ("~", None),
    ("", None),
    ("tRUE", "tRUE"),
    ("1.2.3", "1.2.3"),
    ("1.55.24", "1.55.24"),
    ("10/1m", "10/1m"),
    ("10m", "10m"),
    ("1-8", "1-8"),
    ("0.5s", "0.5s"),
    ("1:99", "1:99"),
    ("2026-01-01", "2026-01-01"),
    ("2026-01-31T18:00:00Z", "2026-01-31T18:00:00Z"),
    ("deadbeef", "deadbeef"),
    ("0xyz", "0xyz"),
    ("0X1f", "0X1f"),
    ("12ab", "12ab"),
    ("=", "="),
    ("<<", "<<"),
    ("y", "y"),
    ("no-es", "no-es"),
)
DIFFERENT = (
    *("0100", "010", "-010", "00", "089", "0_7", "1_000", "1_0.5", "1_000.5", "0b11", "0x10", "0o17", "1:00"),
    *("-1:30", "190:20:30", "1:30.5", "1e3", "12e4", "1.5e3", "-.5", "-.5e3"),
    *("yes", "Yes", "YES", "no", "No", "NO", "on", "On", "ON", "off", "Off", "OFF"),
)


@pytest.mark.parametrize(("spelled", "meant"), SPELLINGS)
def test_plain_text_means_what_every_reader_of_yaml_takes_it_for(spelled: str, meant: object) -> None:
    assert parse_text(f"a: {spelled}\n".encode(), is_json=False) == {"a": meant}


@pytest.mark.parametrize("spelled", DIFFERENT)
def test_what_readers_of_yaml_differ_on_is_refused_unless_it_is_in_quotes(spelled: str) -> None:
    with pytest.raises(InvalidDocument, match=f"^line 2: {re.escape(spelled)} means different things"):
        parse_text(f"b: 1\na: {spelled}\n".encode(), is_json=False)
    assert parse_text(f"a: '{spelled}'\n".encode(), is_json=False) == {"a": spelled}


@pytest.mark.parametrize("value", [0, 100, -7, 1.5, True, False, None, "0100", "1:00", "yes", "2026-01-01", "", "~"])
def test_a_value_in_json_is_the_same_in_yaml(value: object) -> None:
    text = json.dumps({"a": value}).encode()
    assert parse_text(text, is_json=True) == parse_text(text, is_json=False) == {"a": value}


# What PyYAML takes for a line break and others do not; the place where it stands, and the line that others count.
BREAKS = ("\x85", "\u2028", "\u2029", "\r")
PLACES = (
    ("a: 1\n# reviewed{}b: 2\n", False, 2),
    ("a: 1{}b: 2\n", False, 1),
    ("\n\na: 1{}", False, 3),
    ("a: 1\r\nb: [1,{}2]\r\n", False, 2),
    ("a: 'x{}y'\n", False, 1),
    ('a: "x{}y"\n', False, 1),
    ("a: |\n  x{}  b: 2\n", False, 2),
    ("a{}: 1\n", False, 1),
    ("{}a: 1\n", False, 1),
    ("a: 1\n{}", False, 2),
    ('{{"a": "x{}y"}}', False, 1),
    ('{{"a": "x{}y"}}', True, 1),
    ('{{"a": 1,\n{}"b": 2}}', True, 2),
)


@pytest.mark.parametrize("character", BREAKS)
@pytest.mark.parametrize(("text", "is_json", "line"), PLACES)
def test_what_only_some_readers_take_for_a_line_break_is_refused(
    text: str,
    is_json: bool,  # noqa: FBT001
    line: int,
    character: str,
) -> None:
    with pytest.raises(
        InvalidDocument, match=rf"^line {line}: U\+{ord(character):04X} is a line break to some readers"
    ):
        parse_text(text.format(character).encode(), is_json=is_json)


@pytest.mark.parametrize("is_json", [False, True])
@pytest.mark.parametrize("character", BREAKS)
def test_such_a_character_can_be_escaped(character: str, is_json: bool) -> None:  # noqa: FBT001
    text = f'{{"a": "x\\u{ord(character):04x}y"}}'.encode()
    assert parse_text(text, is_json=is_json) == {"a": f"x{character}y"}


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_lines_end_as_on_any_system(ending: str) -> None:
    lines = ("# a comment", "a: 1", "b: |", "  x", "  y", "")
    assert parse_text(ending.join(lines).encode(), is_json=False) == {"a": 1, "b": "x\ny\n"}


# Texts that are JSON and YAML by their looks: what both take means the same, what one does not take is refused by it.
BOTH = (
    *(
        '{"a": 1}',
        '{"a":1}',
        '{"a": -0}',
        '{"a": 1.5E+3}',
        '{"a": "\\/"}',
        '{"a": "b: #c"}',
        '{"a": "\ufeffx"}',
        "[1, 2]",
    ),
    *('{"a": 1e3}', '{"a": 1E400}', '{"a": NaN}', '{"a": Infinity}', '{"a": -Infinity}', '{"a": [NaN]}', '{"a": .nan}'),
    *('{"a": "x\x7fy"}', '{"a": "x\ty"}', '{"a":\t1}', '{"a"\n: 1}', '\ufeff{"a": 1}', '{"a": "\\ud83d\\ude00"}'),
    *(f'{{"a": "x{each} y"}}' for each in (*BREAKS, "\ufffe", "\xa0", "\x0b", "\x0c", "\x1c")),
)


@pytest.mark.parametrize("text", BOTH)
def test_json_and_yaml_never_read_two_things_out_of_one_text(text: str) -> None:
    meant = []
    for is_json in (False, True):
        with contextlib.suppress(InvalidDocument):
            meant.append(parse_text(text.encode(), is_json=is_json))
    assert meant[1:] in ([], meant[:1])


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=8,
    ),
    st.booleans(),
)
def test_any_json_that_yaml_takes_is_the_same_in_it(value: object, escaped: bool) -> None:  # noqa: FBT001
    text = json.dumps(value, ensure_ascii=escaped).encode("utf-8", "surrogatepass")
    with contextlib.suppress(InvalidDocument):
        assert parse_text(text, is_json=False) == value
        assert parse_text(text, is_json=True) == value


@pytest.mark.parametrize("spelled", ["NaN", "Infinity", "-Infinity"])
def test_json_has_finite_numbers_only(spelled: str) -> None:
    with pytest.raises(InvalidDocument, match=f"^the text is not JSON: {spelled} is no number of it$"):
        parse_text(f'{{"a": {spelled}}}'.encode(), is_json=True)
    assert parse_text(f'{{"a": "{spelled}"}}'.encode(), is_json=True) == {"a": spelled}


@pytest.mark.parametrize(
    ("text", "is_json", "problem"),
    [
        (b"a: 1\nb: 2\na: 3\n", False, "line 3: a comes twice"),
        (b"s:\n  a: 1\n  a: 2\n", False, "line 3: a comes twice"),
        (b'{"a": 1, "a": 2}', True, "a comes twice"),
        (b"a: &x [1]\nb: *x\n", False, "line 2: aliases are not used in documents"),
        (b"1: a\n", False, "line 1: a key is not text"),
        (b"a: !!python/object/apply:os.system [id]\n", False, "line 1: tags are not used in documents"),
        (b"a: !!int ''\n", False, "line 1: tags are not used in documents"),
        (b"a: !!bool maybe\n", False, "line 1: tags are not used in documents"),
        (b"a:\n  !!set {b}\n", False, "line 2: tags are not used in documents"),
        (b"! a: 1\n", False, "line 1: tags are not used in documents"),
        (b'a: "\\UFFFFFFFF"\n', False, "the text is not YAML"),
        (b'a: "\\ud800"\n', False, "half a character"),
        (b'{"a": ["x\\ud800"]}', True, "half a character"),
        (b'{"\\udfff": 1}', True, "half a character"),
        (b"a: 0x" + b"f" * 10_000, False, "line 1: 0x"),
        (b"a: " + b"9" * 10_000, False, "the text is not YAML"),
        (b'{"a": ' + b"9" * 10_000 + b"}", True, "the text is not JSON"),
        (b"on: 1\n", False, "line 1: a key is not text"),
        (b"a: 1\n---\nb: 2\n", False, "more than one document"),
        (b"a: [\n", False, "line 2: "),
        (b"{", True, "line 1: "),
        (b"\xff\xfe", False, "the text is not UTF-8"),
        (b"a: \x07\n", False, "the text is not YAML"),
        (b"[" * 5000, False, "nested too deeply"),
        (b"[" * 100_000, True, "nested too deeply"),
        (b"a" * (TEXT_MAX + 1), False, "longer than"),
    ],
)
def test_ambiguous_or_broken_text_is_refused_with_its_place(text: bytes, is_json: bool, problem: str) -> None:  # noqa: FBT001
    with pytest.raises(InvalidDocument, match=problem.replace("(", r"\(")):
        parse_text(text, is_json=is_json)


@given(st.binary(max_size=300), st.booleans())
def test_any_bytes_are_data_or_refused(text: bytes, is_json: bool) -> None:  # noqa: FBT001
    with contextlib.suppress(InvalidDocument):
        parse_text(text, is_json=is_json)
