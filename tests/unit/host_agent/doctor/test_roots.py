"""Whose signature counts for the doctor and the selftest."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.sev.certs.roots import pinned_roots
from common.sev.errors import ParseError
from host_agent.doctor.roots import trusted


def test_without_a_file_amds_own_roots_count() -> None:
    assert trusted(None) == pinned_roots()


def test_a_file_with_amds_ask_and_ark_is_that_root(tmp_path: Path) -> None:
    root = pinned_roots()[0]
    file = tmp_path / "ask_ark"
    file.write_bytes(root.ask.raw + root.ark.raw)
    assert trusted(file) == (root,)


@pytest.mark.parametrize("size", [0, 1 << 37], ids=["empty", "larger than memory"])
def test_a_file_with_something_else_is_refused_by_its_name(tmp_path: Path, size: int) -> None:
    file = tmp_path / "ask_ark"
    with file.open("wb") as made:
        made.truncate(size)  # nothing of it is on the disk
    with pytest.raises(ParseError, match=str(file)):
        trusted(file)
