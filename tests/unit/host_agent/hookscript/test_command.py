"""`sev-host-agent proxmox-hookscript`: what it prints, what it installs, and what it leaves alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from host_agent import hookscript
from host_agent.cli import main
from host_agent.hookscript import NAME

SHELLS = [shell for shell in ("sh", "dash", "bash") if shutil.which(shell)]


@pytest.fixture
def snippets(tmp_path: Path) -> Path:
    folder = tmp_path / "snippets"
    folder.mkdir()
    return folder


@pytest.fixture
def program(tmp_path: Path) -> Path:
    file = tmp_path / "bin" / "sevattest"
    file.parent.mkdir()
    file.touch()
    return file


def command(*words: object) -> int:
    return main(["proxmox-hookscript", *map(str, words)])


def installed(snippets: Path) -> Path:
    """The only file of the folder."""
    [file] = snippets.iterdir()
    assert file.name == NAME
    return file


def test_it_is_printed_with_the_program_that_was_installed_with_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert command() == 0
    text = capsys.readouterr().out
    assert text.startswith("#!/bin/sh\n")
    assert f":-{sysconfig.get_path('scripts')}/sevattest}}\n" in text
    assert "/opt/sevattest" not in text


def test_it_is_installed_executable_and_whole(
    snippets: Path, program: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--install", snippets, "--program", program) == 0
    file = installed(snippets)
    assert file.stat().st_mode & 0o7777 == 0o755
    assert file.read_text() == hookscript.script(program)
    assert capsys.readouterr().out.splitlines()[0] == str(file)


def test_installed_a_second_time_it_is_as_it_was_and_executable_again(snippets: Path, program: Path) -> None:
    assert command("--install", snippets, "--program", program) == 0
    file = installed(snippets)
    file.chmod(0o644)
    before = file.stat().st_ino
    assert command("--install", snippets, "--program", program) == 0
    assert installed(snippets).stat().st_ino == before
    assert file.stat().st_mode & 0o7777 == 0o755


def test_another_file_of_its_name_is_left_alone_unless_it_is_to_be_replaced(
    snippets: Path, program: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = snippets / NAME
    theirs.write_text("#!/bin/sh\n# ours, for years\n")
    assert command("--install", snippets, "--program", program) == 2
    assert f"{theirs}: there is another one" in capsys.readouterr().err
    assert installed(snippets).read_text() == "#!/bin/sh\n# ours, for years\n"
    assert command("--install", snippets, "--program", program, "--replace") == 0
    assert installed(snippets).read_text() == hookscript.script(program)


def test_a_link_of_its_name_is_another_file_and_what_it_leads_to_is_never_written(
    snippets: Path, program: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text(hookscript.script(program))
    elsewhere.chmod(0o600)
    (snippets / NAME).symlink_to(elsewhere)
    assert command("--install", snippets, "--program", program) == 2
    assert (snippets / NAME).is_symlink()
    assert command("--install", snippets, "--program", program, "--replace") == 0
    assert not (snippets / NAME).is_symlink()
    assert elsewhere.stat().st_mode & 0o7777 == 0o600


def test_a_folder_that_is_not_there_is_not_made(
    tmp_path: Path, program: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--install", tmp_path / "snippets", "--program", program) == 2
    said = capsys.readouterr().err
    assert "no such folder" in said
    assert "--content" in said
    assert not (tmp_path / "snippets").exists()


def test_without_a_folder_it_goes_to_the_storage_that_every_host_has(
    snippets: Path, program: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert Path("/var/lib/vz/snippets") == hookscript.SNIPPETS
    monkeypatch.setattr("host_agent.hookscript.cli.SNIPPETS", snippets)
    assert command("--install", "--program", program) == 0
    assert installed(snippets).exists()
    assert f"--hookscript local:snippets/{NAME}" in capsys.readouterr().out


def test_one_that_would_run_nothing_is_not_installed(snippets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--install", snippets, "--program", "/nowhere/sevattest") == 2
    assert "/nowhere/sevattest: not there" in capsys.readouterr().err
    assert command("--install", snippets, "--program", "sevattest") == 2
    assert "must be an absolute path" in capsys.readouterr().err
    assert not list(snippets.iterdir())


def test_a_disk_that_fails_half_way_leaves_the_old_one_and_nothing_else(
    snippets: Path, program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (snippets / NAME).write_text("old")

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert command("--install", snippets, "--program", program, "--replace") == 2
    assert installed(snippets).read_text() == "old"


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("name", ["bin", "a b", "it's", "a}b", "$HOME", "`id`"])
def test_the_script_runs_its_program_wherever_that_is(tmp_path: Path, shell: str, name: str) -> None:
    program = tmp_path / name / "sevattest"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >"{tmp_path}/words"\n')
    program.chmod(0o755)
    (tmp_path / "run" / "100").mkdir(parents=True)
    (tmp_path / "100").write_text("web\n")
    hook = tmp_path / NAME
    hook.write_text(hookscript.script(program))
    environ = {"SEVATTEST_PROXMOX_CONF": str(tmp_path), "SEVATTEST_PROXMOX_RUN": str(tmp_path / "run")}
    environ["PATH"] = os.environ["PATH"]
    subprocess.run([shell, hook, "100", "launch"], env=environ, check=True, timeout=20)
    assert (tmp_path / "run" / "100" / "result").read_text() == "0\n"
    assert (tmp_path / "words").read_text() == "launch --timeout 120 web\n"
