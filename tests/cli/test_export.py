"""`sevattest export`: what is written, and what never is."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from common.sev.abi import CHAIN_SIZE
from common.sev.certs.chain import PlatformChain
from tests.support.chains import make_platform
from tests.support.host_commands import OLD, do, export, names, write
from tests.support.platform import SEVATTEST, Platform


def test_an_export_is_complete_and_verifies(host: Platform, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short, full = tmp_path / "sev.pdh", tmp_path / "full.pdh"
    assert export(host, short) == 0
    assert export(host, full, "--full") == 0
    assert short.stat().st_size == CHAIN_SIZE
    assert full.read_bytes() == short.read_bytes() + host.ask_ark.read_bytes()
    assert len(full.read_bytes()) == 11536
    warning = f"sevattest: warning: the root in {host.ask_ark} is not AMD's: platforms under it are emulated\n"
    assert capsys.readouterr() == ("", 2 * warning)
    for exported in (short, full):
        assert do("verify", "--sev", exported, "--ca", host.ask_ark) == 0
    assert PlatformChain.parse(short.read_bytes()).cek.is_signed


def test_the_options_come_in_any_order_as_in_sevctl(host: Platform, tmp_path: Path) -> None:
    more = ["--kds", host.kds, "--ca", host.ask_ark]
    for number, words in enumerate([["-f", "{}"], ["{}", "-f"], ["--full", "{}"]]):
        target = tmp_path / f"{number}.pdh"
        assert do("export", *(word.format(target) for word in words), *more) == 0
        assert target.stat().st_size == 11536


def test_a_key_service_gives_the_cek_once_and_the_cache_from_then_on(
    host: Platform, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export", "--ca", host.ask_ark, "--cache", tmp_path / "cache"]
    assert do(*words, "--kds", host.key_service, tmp_path / "a.pdh") == 0
    # Port 1 on loopback has no listener.
    assert do(*words, "--kds", "http://127.0.0.1:1", tmp_path / "b.pdh") == 0
    assert (tmp_path / "a.pdh").read_bytes() == (tmp_path / "b.pdh").read_bytes()
    capsys.readouterr()
    shutil.rmtree(tmp_path / "cache")
    assert do(*words, "--kds", "http://127.0.0.1:1", tmp_path / "c.pdh") == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert "cannot be reached" in err
    assert "hint: --kds URL|DIR names another key service" in err
    assert not (tmp_path / "c.pdh").exists()


@pytest.mark.parametrize(
    ("evil", "code", "sentence"),
    [
        ("another chip's CEK", 1, "the signed CEK is not this platform's"),
        ("a CEK that somebody else signed", 1, "none of the trusted roots signed the CEK"),
        ("a CEK cut off", 3, "is no CEK"),
        ("no CEK", 2, "holds no CEK for this chip"),
        ("no folder", 3, "there is no folder"),
        ("no root named", 1, "none of the trusted roots signed the CEK"),
        ("another root", 1, "none of the trusted roots signed the CEK"),
        ("half a root", 2, "does not hold an ASK and an ARK"),
    ],
)
def test_what_does_not_verify_is_not_written_and_what_stood_there_stays(
    host: Platform, tmp_path: Path, evil: str, code: int, sentence: str, *, capsys: pytest.CaptureFixture[str]
) -> None:
    (published,) = host.kds.iterdir()
    kds, ca = tmp_path / "kds", ["--ca", host.ask_ark]
    kds.mkdir()
    cek, other = published.read_bytes(), make_platform()
    if evil == "another chip's CEK":
        cek = other.chain.cek.raw
    elif evil == "a CEK that somebody else signed":
        cek = cek[:1044] + other.chain.cek.raw[1044:]
    elif evil == "a CEK cut off":
        cek = cek[:-1]
    elif evil == "no root named":
        ca = []
    elif evil == "another root":
        ca = ["--ca", write(tmp_path / "ca", other.ca.to_bytes())]
    elif evil == "half a root":
        ca = ["--ca", write(tmp_path / "ca", other.ca.ask.raw)]
    if evil == "no folder":
        kds.rmdir()
    elif evil != "no CEK":
        write(kds / published.name, cek)
    target = write(tmp_path / "sev.pdh", OLD)
    before = names(tmp_path)
    for full in ([], ["-f"]):
        assert do("export", *full, "--kds", kds, *ca, target) == code
        out, err = capsys.readouterr()
        assert (out, sentence in err) == ("", True), err
        assert target.read_bytes() == OLD
        assert names(tmp_path) == before


@pytest.mark.parametrize("where", ["nowhere/sev.pdh", "folder"])
def test_a_target_that_cannot_be_written_is_named(
    host: Platform, tmp_path: Path, where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder").mkdir()
    before = names(tmp_path)
    assert export(host, tmp_path / where) == 2
    assert f"sevattest: {tmp_path / where}: " in capsys.readouterr().err
    assert (names(tmp_path), names(tmp_path / "folder")) == (before, set())


def test_links_in_a_circle_are_a_sentence(host: Platform, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    for code in (export(host, loop), do("generate", loop, tmp_path / "key"), do("generate", tmp_path / "cert", loop)):
        assert code == 2
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if "warning" not in line] == [
        f"sevattest: {loop}: Too many levels of symbolic links"
    ] * 3
    assert names(tmp_path) == {"loop"}


def test_what_stdout_held_before_stays_before_an_export_to_it(host: Platform, tmp_path: Path) -> None:
    (tmp_path / "stdout").symlink_to("/proc/self/fd/1")
    out = write(tmp_path / "out", OLD)
    for number, name in enumerate(("/dev/stdout", str(tmp_path / "stdout"))):
        words = [*SEVATTEST, "export", "--kds", str(host.kds), "--ca", str(host.ask_ark), name]
        with out.open("ab") as stream:
            subprocess.run(words, stdout=stream, check=True, capture_output=False, timeout=60)
        written = out.read_bytes()
        assert written.startswith(OLD)
        assert len(written) == len(OLD) + (number + 1) * CHAIN_SIZE
    assert (tmp_path / "stdout").is_symlink()


def test_a_full_device_is_named(host: Platform, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(host, Path("/dev/full")) == 2
    assert "sevattest: /dev/full: No space left on device\n" in capsys.readouterr().err


def test_an_interrupted_export_leaves_the_old_file_and_nothing_else(host: Platform, tmp_path: Path) -> None:
    target = write(tmp_path / "sev.pdh", OLD)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        words = [*SEVATTEST, "export", "--kds", url, "--ca", str(host.ask_ark), str(target)]
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            silent.settimeout(60)
            connection, _ = silent.accept()
            with connection:
                process.send_signal(signal.SIGINT)
                out, err = process.communicate(timeout=60)
    assert (process.returncode, out, "Traceback" in err) == (130, "", False)
    assert target.read_bytes() == OLD
    assert names(tmp_path) == {"sev.pdh"}
