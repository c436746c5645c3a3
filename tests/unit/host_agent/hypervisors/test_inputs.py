"""The owner's files for a machine: private, whole, and gone when they are to be."""

from __future__ import annotations

import base64
import os
from pathlib import Path

import pytest

from common.errors import PlatformFailed
from host_agent.hypervisors.inputs import Inputs

NAMES = ["godh.b64", "launch.cfg", "session.b64"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_they_are_written_for_the_agent_alone_and_removed(tmp_path: Path) -> None:
    inputs = Inputs(tmp_path / "a" / "in")
    old = os.umask(0)
    try:
        inputs.prepare()
        inputs.write(b"godh", b"session")
        inputs.call("[machine]\n")
    finally:
        os.umask(old)
    assert names(inputs.folder) == NAMES
    assert inputs.folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in inputs.folder.iterdir()} == {0o600}
    assert base64.b64decode((inputs.folder / "session.b64").read_bytes()) == b"session"
    inputs.remove()
    inputs.remove()
    assert names(inputs.folder) == []


def test_a_folder_that_others_can_look_into_is_refused(tmp_path: Path) -> None:
    Inputs(tmp_path / "in").prepare()
    for mode in (0o750, 0o701, 0o777):
        (tmp_path / "in").chmod(mode)
        with pytest.raises(PlatformFailed, match="mode 0700"):
            Inputs(tmp_path / "in").prepare()


def test_a_link_in_the_folders_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "in").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PlatformFailed, match="not a folder of the agent's own"):
        Inputs(tmp_path / "in").prepare()


def test_a_link_in_a_files_place_is_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("theirs")
    inputs = Inputs(tmp_path / "in")
    inputs.prepare()
    for name in (*NAMES, "session.b64.new"):
        (inputs.folder / name).symlink_to(outside)
    inputs.write(b"godh", b"session")
    inputs.call("x")
    assert outside.read_text() == "theirs"
    assert not (inputs.folder / "session.b64").is_symlink()


def test_what_cannot_be_written_whole_is_not_left_in_part(tmp_path: Path) -> None:
    inputs = Inputs(tmp_path / "in")
    inputs.prepare()
    (inputs.folder / "launch.cfg").mkdir()
    inputs.write(b"godh", b"session")
    with pytest.raises(PlatformFailed, match="cannot be written"):
        inputs.call("x")
    assert names(inputs.folder) == ["launch.cfg"]


def test_what_a_dead_agent_was_writing_is_removed_with_the_rest(tmp_path: Path) -> None:
    inputs = Inputs(tmp_path / "in")
    inputs.prepare()
    for name in [*NAMES, *(f"{name}.new" for name in NAMES), "qmp.sock"]:
        (inputs.folder / name).touch()
    inputs.remove()
    assert names(inputs.folder) == ["qmp.sock"]


def test_a_folder_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Inputs(tmp_path / "in").prepare()
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(PlatformFailed, match="not a folder of the agent's own"):
        Inputs(tmp_path / "in").prepare()


@pytest.mark.parametrize("before", [[], NAMES], ids=["nothing", "another launch's"])
def test_the_file_that_calls_for_a_machine_comes_last_and_goes_first(
    tmp_path: Path, before: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = Inputs(tmp_path / "in")
    inputs.prepare()
    for name in before:
        (inputs.folder / name).touch()
    seen: list[list[str]] = []
    replace, unlink = Path.replace, Path.unlink

    def replaced(path: Path, target: Path) -> Path:
        moved = replace(path, target)
        seen.append(names(inputs.folder))
        return moved

    def unlinked(path: Path, *, missing_ok: bool = False) -> None:
        unlink(path, missing_ok=missing_ok)
        if path.suffix != ".new":
            seen.append(names(inputs.folder))

    monkeypatch.setattr(Path, "replace", replaced)
    inputs.write(b"godh", b"session")
    inputs.call("x")
    monkeypatch.setattr(Path, "unlink", unlinked)
    inputs.remove()
    assert ["launch.cfg" in there for there in seen] == [False, False, True, False, False, False]
    assert seen[2] == NAMES
