"""`sevattest platform` as a person sees it: what is printed where, and how it ends."""

from __future__ import annotations

import json
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from common.sev.abi import DeviceCommand
from emulator.cli import GENERATION_NAMES
from emulator.device_client import Device
from emulator.firmware_image import build_image
from emulator.keys import GENERATIONS
from tests.support.platform import SEVATTEST, give_chip, running_platform


def sevattest(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*SEVATTEST, *map(str, words)], capture_output=True, text=True, timeout=60, check=False)


def serve(state: Path, *more: str) -> subprocess.Popen[str]:
    words = [*SEVATTEST, "platform", "serve", "--state", str(state), *more]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve_says_one_line_when_it_is_ready_and_leaves_no_socket(tmp_path: Path, number: signal.Signals) -> None:
    give_chip(tmp_path / "p", "naples")
    process = serve(tmp_path / "p")
    assert process.stdout is not None
    assert process.stdout.readline() == f"sevattest platform: serving on {tmp_path}/p/sev.sock\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "")
    assert err == "sevattest platform: software only: nothing is encrypted and nothing is protected\n"
    assert not (tmp_path / "p" / "sev.sock").exists()


def test_a_new_folder_becomes_a_platform_with_its_root_and_key_service(tmp_path: Path) -> None:
    process = serve(tmp_path / "new", "--generation", "naples", "--kds-listen", "127.0.0.1:0", "--trace")
    assert process.stdout is not None
    assert process.stdout.readline().startswith("sevattest platform: serving on ")
    assert process.stdout.readline().startswith("sevattest platform: key service on http://127.0.0.1:")
    shown = json.loads(sevattest("platform", "show", "--state", tmp_path / "new", "--json").stdout)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert (shown["generation"], shown["api"], shown["build"]) == ("naples", "0.17", 48)
    assert (shown["state"], shown["owner"], shown["guests"], shown["served"]) == ("INIT", "self", [], True)
    assert sorted(shown["fingerprints"]) == ["ark", "ask", "cek", "oca", "pdh", "pek"]
    assert "connection 1: OPEN errno 0 status -" in err.splitlines()
    assert (tmp_path / "new" / "ask_ark.cert").stat().st_size == 1664
    assert [path.name for path in (tmp_path / "new" / "kds").iterdir()] == [f"{shown['chip_id'].upper()}.cert"]


def test_show_tells_of_a_platform_that_is_not_served(tmp_path: Path) -> None:
    with running_platform(tmp_path / "p", "naples"):
        served = json.loads(sevattest("platform", "show", "--state", tmp_path / "p", "--json").stdout)
    said = sevattest("platform", "show", "--state", tmp_path / "p")
    assert (said.returncode, said.stderr) == (0, "")
    lines = dict(line.split(None, 1) for line in said.stdout.splitlines() if not line.startswith("chip id"))
    assert (lines["generation"], lines["state"], lines["owner"], lines["served"]) == ("naples", "UNINIT", "self", "no")
    for name, value in served["fingerprints"].items():
        assert lines[name.upper()] == value


def test_the_tree_is_verified_only_under_the_root_in_the_folder(tmp_path: Path) -> None:
    with running_platform(tmp_path / "p", "naples") as platform:
        with Device(platform.socket, writable=False) as device:
            chain = device.issue(DeviceCommand.PDH_CERT_EXPORT, struct.pack("<II", 2084, 6252))[8:]
        shown = json.loads(sevattest("platform", "show", "--state", platform.state, "--json").stdout)
        (tmp_path / "chain").write_bytes(chain)
        words = ["verify", "--sev", tmp_path / "chain", "--kds", platform.kds]
        named = sevattest(*words, "--ca", platform.ask_ark)
        unnamed = sevattest(*words)
    assert named.returncode == 0, named.stderr
    for value in shown["fingerprints"].values():
        assert value in named.stdout
    assert unnamed.returncode == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["show", "--state", "{}"], "sevattest: there is no platform in {}"),
        (["serve", "--state", "{}/" + "x" * 120], "is longer than a socket's path may be (107 bytes)"),
        (["serve", "--state", "{}", "--generation", "zen6"], "invalid choice: 'zen6'"),
        (["serve", "--state", "{}", "--kds-listen", "nowhere"], "'nowhere' is not HOST:PORT"),
        (["serve"], "the following arguments are required: --state"),
        (["qemu", "--state", "{}", "--qemu", "{}/absent", "-S"], "sevattest: there is no program {}/absent"),
        (["qemu", "--state", "{}", "--qemu-version", "7.2", "-S"], "--qemu-version is the built-in machine's"),
        (["qemu", "--builtin", "-S"], "the following arguments are required: --state"),
        ([], "the following arguments are required: serve|qemu|run|firmware|show"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(tmp_path: Path, words: list[str], message: str) -> None:
    said = sevattest("platform", *(word.format(tmp_path) for word in words))
    assert (said.returncode, said.stdout) == (2, "")
    assert message.format(tmp_path) in said.stderr
    assert "Traceback" not in said.stderr


def test_a_second_server_is_refused_and_the_first_serves_on(tmp_path: Path) -> None:
    with running_platform(tmp_path / "p", "naples"):
        second = sevattest("platform", "serve", "--state", tmp_path / "p")
        assert second.returncode == 2
        assert second.stderr.splitlines()[-1] == f"sevattest: another process serves the platform in {tmp_path}/p"
        shown = json.loads(sevattest("platform", "show", "--state", tmp_path / "p", "--json").stdout)
        assert shown["served"] is True


def test_qemus_words_reach_the_machine_untouched(tmp_path: Path) -> None:
    with running_platform(tmp_path / "p", "naples") as platform:
        for words, line in (
            (["-nope"], "qemu-system-x86_64: -nope: invalid option\n"),
            (["--qemu-version", "10.0", "-S", "--help"], "qemu-system-x86_64: --help: invalid option\n"),
            (["-m", "-1"], "qemu-system-x86_64: -m -1: Parameter 'size' expects a size\n"),
        ):
            said = subprocess.run([*platform.machine(*words)], capture_output=True, text=True, timeout=60, check=False)
            assert (said.returncode, said.stdout, said.stderr) == (1, "", line)


def test_firmware_writes_the_image_that_belongs_to_a_label(tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert sevattest("platform", "firmware", tmp_path / name, "--label", name).returncode == 0
    assert (tmp_path / "one").read_bytes() == build_image("one") != (tmp_path / "two").read_bytes()
    said = sevattest("platform", "firmware", tmp_path / "no" / "such", "--label", "x")
    assert said.returncode == 2
    assert said.stderr == f"sevattest: {tmp_path}/no/such: No such file or directory\n"


def test_help_names_every_generation_without_loading_keys() -> None:
    assert tuple(GENERATIONS) == GENERATION_NAMES
    code = "import sys, emulator.cli; print('cryptography' in sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert loaded.stdout == "False\n"


def test_a_machine_starts_without_loading_cryptography_or_grpc() -> None:
    code = "import sys, emulator.qmp_server; print([m for m in ('cryptography', 'grpc') if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert loaded.stdout == "[]\n"
