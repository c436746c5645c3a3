"""docs/errors.md says of every reason what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from common.errors import CLASS_OF, Reason, exit_code
from common.rpc.status import code_of
from sevattest.v1 import reason_pb2

ROOT = Path(__file__).resolve().parents[3]
_ROW = re.compile(
    r"^\| `(?P<reason>[A-Z_]+)` \| (?P<status>[A-Z_]+) \| (?P<exit>\d) \| (?P<whose>[^|]+) \| (?P<do>[^|]+) \|$"
)
# A comment "STATUS: sentence" stands above each name of the enum.
_COMMENT = re.compile(r"^  // (?P<status>[A-Z_]+): .+\n  REASON_(?P<name>[A-Z_]+) = ", re.MULTILINE)


def _rows() -> dict[str, re.Match[str]]:
    lines = (ROOT / "docs/errors.md").read_text(encoding="utf-8").splitlines()
    return {match["reason"]: match for line in lines if (match := _ROW.match(line))}


def _comments() -> dict[str, str]:
    text = (ROOT / "proto/sevattest/v1/reason.proto").read_text(encoding="utf-8")
    return {match["name"]: match["status"] for match in _COMMENT.finditer(text)}


def test_the_page_the_code_and_the_contract_have_the_same_reasons_in_the_same_order() -> None:
    wire = [name.removeprefix("REASON_") for name in reason_pb2.Reason.keys()]  # noqa: SIM118 -- not a dict
    assert list(_rows()) == [reason.value for reason in Reason] == wire[1:]


@pytest.mark.parametrize("reason", Reason)
def test_a_reason_has_the_same_status_on_the_page_in_the_contract_and_on_the_wire(reason: Reason) -> None:
    error = CLASS_OF[reason](reason, "a sentence")
    row = _rows()[reason.value]
    assert row["status"] == _comments()[reason.value] == code_of(error).name
    assert int(row["exit"]) == exit_code(error)


def test_each_row_says_whose_it_is_and_what_to_do() -> None:
    for reason, row in _rows().items():
        assert row["whose"] in {"caller", "operator", "platform", "policy", "sevattest", "nobody"}, reason
        assert row["do"].endswith("."), reason
