"""`sevattest show`, and what all commands of a host do alike: the device, `-q`, help."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from common.sev.abi import CHAIN_SIZE
from emulator import protocol
from emulator.device_client import Device as Connection
from emulator.protocol import GuestRequest
from tests.cli.transcripts import run
from tests.support.host_commands import do, names
from tests.support.platform import SEVATTEST, Platform, give_chip

ROOT = Path(__file__).resolve().parents[2]


def test_show_says_what_sevctl_says(
    host: Platform, capsys: pytest.CaptureFixture[str], owner: tuple[Path, Path]
) -> None:
    (published,) = host.kds.iterdir()
    expected = {"version": "1.55.24\n", "guests": "0\n", "identifier": f"{published.stem}\n", "flags": "es\n"}
    for what, line in expected.items():
        assert do("show", what) == 0
        assert capsys.readouterr() == (line, "")
    assert do("provision", *owner) == 0
    assert do("show", "flags") == 0
    assert capsys.readouterr() == ("owned\nes\n", "")
    with Connection(host.socket) as connection:
        connection.issue(GuestRequest.LAUNCH_START, protocol.LAUNCH_START.pack(0, 0, 0, 0))
        assert do("show", "guests") == 0
    assert capsys.readouterr() == ("1\n", "")


def test_show_prints_json_on_request(host: Platform, capsys: pytest.CaptureFixture[str]) -> None:
    (published,) = host.kds.iterdir()
    found: dict[str, object] = {}
    for what in ("flags", "guests", "identifier", "version"):
        assert do("show", what, "--json") == 0
        found |= json.loads(capsys.readouterr().out)
    assert found == {"flags": ["es"], "guests": 0, "identifier": published.stem, "version": "1.55.24"}


@pytest.mark.parametrize("words", [["show"], ["show", "snp-status"], ["show", "flags", "guests"], ["rotate", "now"]])
def test_words_that_sevctl_does_not_know_are_usage_errors(
    host: Platform, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert do(*words) == 2
    out, err = capsys.readouterr()
    assert (out, "hint: sevattest" in err) == ("", True)
    assert host.socket.exists()


@pytest.mark.parametrize(
    "words", [["show", "version"], ["export", "x"], ["reset"], ["rotate"], ["provision", "oca.cert", "oca.key"]]
)
def test_without_a_device_every_command_says_what_todo(
    tmp_path: Path, words: list[str], owner: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    here = dict(zip(("oca.cert", "oca.key"), owner, strict=True)) | {"x": tmp_path / "x"}
    assert do(*(here.get(word, word) for word in words), "--device", tmp_path / "sev") == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"sevattest: {tmp_path}/sev cannot be opened for ")
    assert "hint: this host has no SEV device at that path" in err
    assert not (tmp_path / "x").exists()


def test_the_device_is_the_kernels_unless_something_else_is_named(
    host: Platform, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SEVATTEST_DEVICE", str(tmp_path / "nowhere"))
    assert do("show", "version", "--device", host.socket) == 0
    assert do("show", "version") == 3
    assert "nowhere" in capsys.readouterr().err
    for nothing in ({}, {"SEVATTEST_DEVICE": ""}):
        monkeypatch.delenv("SEVATTEST_DEVICE", raising=False)
        for name, value in nothing.items():
            monkeypatch.setenv(name, value)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("COLUMNS", "200")
            assert do("show", "--help") == 0
        assert "(/dev/sev; SEVATTEST_DEVICE)" in capsys.readouterr().out


def test_quiet_says_nothing_but_what_was_asked_for(
    host: Platform, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exported = tmp_path / "sev.pdh"
    for quiet in ("-q", "--quiet"):
        assert do(quiet, "show", "version") == 0
        assert capsys.readouterr() == ("1.55.24\n", "")
        assert do(quiet, "export", "--kds", host.kds, "--ca", host.ask_ark, exported) == 0
        assert do(quiet, "verify", "--sev", exported, "--ca", host.ask_ark) == 0
        assert do(quiet, "verify", "--sev", exported) == 1
        assert do(quiet, "show", "nonsense") == 2
        assert do(quiet, "show", "version", "--device", tmp_path / "sev") == 3
        assert capsys.readouterr() == ("", "")


def test_help_is_a_word_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert do("help") == 0
    out, _ = capsys.readouterr()
    assert all(f"  {name} " in out for name in ("export", "generate", "provision", "reset", "rotate", "show", "verify"))
    assert do("help", "export") == 0
    assert "usage: sevattest export" in capsys.readouterr().out


def test_the_page_is_followed_word_for_word_without_hardware(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "host-commands.md").read_text(encoding="utf-8")
    block = page.partition("## Without hardware")[2].split("```\n")[1]
    assert "/tmp/p" in block  # noqa: S108 -- what the page says; here it is a folder of the test's
    give_chip(tmp_path / "p", "milan")
    program = tmp_path / "bin" / "sevattest"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {shlex.join(SEVATTEST)} "$@"\n')
    program.chmod(0o755)
    ours = {name: value for name, value in os.environ.items() if not name.startswith("SEVATTEST_")}
    environment = {**ours, "PATH": f"{program.parent}:{os.environ['PATH']}"}
    script = "set -e\n" + block.replace("/tmp/p", str(tmp_path / "p")) + "wait\n"  # noqa: S108
    # In a session of its own, which is all that is ended where it hangs.
    with (tmp_path / "err").open("w+") as err:
        process = subprocess.Popen(
            ["sh", "-c", script],
            stdout=subprocess.PIPE,
            stderr=err,
            text=True,
            cwd=tmp_path,
            env=environment,
            start_new_session=True,
        )
        try:
            out, _ = process.communicate(timeout=120)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        err.seek(0)
        assert process.returncode == 0, err.read()
    assert (tmp_path / "host.pdh").stat().st_size == CHAIN_SIZE
    assert "\n1.55.24\n" in out
    assert not (tmp_path / "p" / "sev.sock").exists()


def test_the_program_itself_on_the_software_platform(host: Platform, tmp_path: Path) -> None:
    # As processes, without this test's environment.
    device = ["--device", str(host.socket)]
    assert run("show", "flags", *device).out == "es\n"
    assert run("generate", tmp_path / "oca.cert", tmp_path / "oca.key").code == 0
    assert run("provision", tmp_path / "oca.cert", tmp_path / "oca.key", *device).code == 0
    assert run("show", "flags", *device).out == "owned\nes\n"
    refused = run("provision", tmp_path / "oca.cert", tmp_path / "oca.key", *device)
    assert (refused.code, refused.out) == (3, "")
    assert refused.err.splitlines()[1].startswith("hint: ")
    assert run("reset", *device) == run("rotate", *device)
    assert names(tmp_path) == {"oca.cert", "oca.key"}
