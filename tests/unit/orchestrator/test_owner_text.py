"""How the owner's commands print: YAML that reads as what was meant, tables, and nothing that steers a terminal."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta, timezone

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from common.command import clean
from orchestrator.cli.owner.text import as_yaml, table, when

_TEXT = st.text(st.characters(exclude_categories=["Cs"]))
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | _TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_TEXT, inner, max_size=4),
    max_leaves=20,
)


@given(_VALUES)
def test_yaml_reads_as_the_value_that_was_printed(value: object) -> None:
    assert yaml.safe_load(as_yaml(json.dumps(value))) == value


@pytest.mark.parametrize(
    "word",
    [
        "yes",
        "No",
        "on",
        "null",
        "~",
        "1",
        "1.0",
        "1e3",
        "0x1f",
        "2026-01-01",
        "a: b",
        "# x",
        "- x",
        "",
        " x",
        "=",
        "<<",
    ],
)
def test_text_that_yaml_takes_for_something_else_is_quoted(word: str) -> None:
    assert yaml.safe_load(as_yaml(json.dumps({"key": word, word: "value"}))) == {"key": word, word: "value"}


def test_a_document_looks_as_people_write_it() -> None:
    content = {
        "kind": "Grant",
        "spec": {"callers": ["a", "b"], "empty": [], "none": None, "list": [{"x": 1, "z": [2]}]},
    }
    assert as_yaml(json.dumps(content)) == (
        "kind: Grant\nspec:\n  callers:\n    - a\n    - b\n  empty: []\n  none: null\n"
        "  list:\n    - x: 1\n      z:\n        - 2"
    )


@given(_TEXT)
def test_nothing_that_is_printed_steers_a_terminal(value: str) -> None:
    assert all(letter.isprintable() for letter in clean(value))
    assert all(letter.isprintable() or letter == "\n" for letter in as_yaml(json.dumps([value])))


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    assert table(["A", "LONG"], [["xyz", ""], ["", "v"]]) == ["A    LONG", "xyz  -", "-    v"]


def test_times_are_in_utc_to_the_second() -> None:
    east = timezone(timedelta(hours=2))
    assert when(datetime(2026, 3, 1, 14, 0, 5, 999, tzinfo=east)) == "2026-03-01 12:00:05Z"
    assert when(datetime(2026, 3, 1, tzinfo=UTC)) == "2026-03-01 00:00:00Z"
    assert when(None) == ""
