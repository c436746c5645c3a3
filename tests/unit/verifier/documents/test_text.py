"""Text to plain data: YAML's safe subset and JSON, without what makes either ambiguous."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verifier.documents.text import TEXT_MAX, InvalidDocument, parse_text


def test_yaml_and_json_give_the_same_data() -> None:
    expected = {"a": [1, "b"], "c": {"d": True}}
    assert parse_text(b"a: [1, b]\nc: {d: true}\n", is_json=False) == expected
    assert parse_text(b'{"a": [1, "b"], "c": {"d": true}}', is_json=True) == expected


def test_a_date_stays_text() -> None:
    assert parse_text(b"version: 2026-01-01\n", is_json=False) == {"version": "2026-01-01"}


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
        (b"a: 0x" + b"f" * 10_000, False, "a number of thousands of digits"),
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
