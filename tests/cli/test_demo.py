"""Transcripts of `sevattest demo`: what a newcomer reads, and that nothing is left behind, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.demo.processes import script
from tests.cli.transcripts import Said, run
from tests.support.still import still

pytestmark = pytest.mark.slow

# The machine that is there everywhere; a real guest's story is told by `make e2e`.
BUILTIN = ("--machine", "builtin")

HONEST = """\
sevattest demo: one guest, attested end to end; every party is a process on this machine

  platform   software, with a root of its own: shows the procedure, proves nothing about hardware
  machine    built in, in QEMU's place: takes its command line, speaks its QMP, runs no kernel
  firmware   FIRMWARE

making the software platform's keys …
making identities for two sites …
starting verifier and agent …

The platform's certificates, verified to the root that the owner's configuration names:
  PDH EP384 D256 HEX
   ⬑ PEK EP384 E256 HEX
     •⬑ OCA EP384 E256 HEX
      ⬑ CEK EP384 E256 HEX
         ⬑ ASK R4096 R384 HEX
           •⬑ ARK R4096 R384 HEX

   • = self signed, ⬑ = signs, •̷ = invalid self sign, ⬑̸ = invalid signs

The launch, step by step:
  export TIME  8336 bytes of certificates
  begin TIME  launch UUID: emulated platform, chip CHIP
  start TIME  guest web paused, policy 0x1100000f
  measure TIME  measured by firmware 1.55.24
  release TIME  accepted: workload shop, version 2
  inject TIME  secret packet in place
  resume TIME  guest runs

The guest has read, in its own memory:
  UUID  32 bytes  "SECRET"
  which is what the guest owner has on file

done in TIME; nothing is left behind
"""

TAMPERED = """\
The launch, step by step:
  export TIME  8336 bytes of certificates
  begin TIME  launch UUID: emulated platform, chip CHIP
  start TIME  guest web paused, policy 0x1100000f
  measure TIME  measured by firmware 1.55.24
  release TIME  failed
  sevattest: release: the measurement is not one that the owner expects (MEASUREMENT_REFUSED, audit id UUID)
  hint: the guest owner's audit log has more under that id

The guest owner's log under that id (sev-verifier audit):
  launch.refused  MEASUREMENT_REFUSED
  found:        the measurement is none of those that were frozen for the launch (launch.measurement)
  explanation:  the guest was measured with kernel 'shop 1' instead of 'shop 2'
                (found by search: N known neighbours were tried)

No secret left:
  the launch at the verifier   refused
  the launch at the agent      aborted
  the guest's machine          ended
  secret packets made          0
  secrets that the guest read  0

done in TIME; nothing is left behind
"""


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder of our own; tmp_path is too long for the sockets that come into it."""
    with tempfile.TemporaryDirectory(prefix="sev-") as folder:
        yield Path(folder)


def processes_of(folder: Path) -> list[int]:
    """The processes whose command line names something in the folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                line = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if str(folder).encode() in line:
                found.append(int(entry.name))
    return found


def test_a_newcomer_sees_tree_steps_and_secret() -> None:
    said = run("demo", *BUILTIN)
    assert Said(out=still(said.out), err=said.err, code=said.code) == Said(out=HONEST, err="", code=0)


def test_a_dishonest_host_is_shown_as_refused_explained_and_empty_handed() -> None:
    said = run("demo", *BUILTIN, "--tamper=kernel")
    assert (said.code, said.err) == (1, "")
    assert "  host       dishonest: the host starts the guest from version 1 of the kernel\n" in said.out
    assert still(said.out)[still(said.out).index("The launch, step") :] == TAMPERED


@pytest.mark.parametrize(
    ("when", "number", "code"),
    [
        ("making identities", signal.SIGINT, 130),
        ("starting verifier", signal.SIGINT, 130),
        ("  start ", signal.SIGINT, 130),
        ("  start ", signal.SIGTERM, 143),
        ("The guest has read", signal.SIGHUP, 129),
    ],
)
def test_an_interrupted_demonstration_leaves_nothing_behind(
    when: str, number: signal.Signals, code: int, short: Path
) -> None:
    environ = {**os.environ, "TMPDIR": str(short)}
    # Whoever runs the tests in the background of a shell ignores SIGINT, and so would the demonstration.
    command = ["/usr/bin/env", "--default-signal=INT,TERM,HUP", *script("sevattest"), "demo", *BUILTIN]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ, start_new_session=True
    ) as process:
        assert process.stdout
        for line in process.stdout:
            if line.startswith(when):
                break
        process.send_signal(number)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert "Traceback" not in err
    assert process.returncode == code
    assert list(short.iterdir()) == []
    assert processes_of(short) == []


def test_a_signal_that_was_ignored_from_the_start_stays_ignored(short: Path) -> None:
    environ = {**os.environ, "TMPDIR": str(short)}
    command = ["/usr/bin/nohup", *script("sevattest"), "demo", *BUILTIN]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environ
    ) as process:
        assert process.stdout
        process.stdout.readline()
        process.send_signal(signal.SIGHUP)
        assert "nothing is left behind" in process.stdout.read()
    assert process.returncode == 0


def test_a_reader_that_goes_away_ends_it_quietly(short: Path) -> None:
    environ = {**os.environ, "TMPDIR": str(short)}
    command = [*script("sevattest"), "demo", *BUILTIN]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ) as process:
        assert process.stdout
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr
        err = process.stderr.read()
    assert "Traceback" not in err
    assert processes_of(short) == []
    assert list(short.iterdir()) == []


def test_a_folder_to_keep_must_be_empty(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    assert run("demo", "--keep", tmp_path) == Said(out="", err=f"sevattest: {tmp_path}: is not empty\n", code=2)
    assert (tmp_path / "mine").read_text() == "precious"


def test_a_path_that_is_too_long_for_sockets_is_said_so(tmp_path: Path) -> None:
    said = run("demo", "--keep", tmp_path / ("long" * 20))
    assert (said.out, said.code) == ("", 2)
    first, second = said.err.splitlines()
    assert first.endswith("bytes too long for the sockets in it")
    assert second == "hint: --keep DIR, or TMPDIR, names a shorter one"


def test_an_unknown_way_to_tamper_lists_those_that_there_are() -> None:
    assert run("demo", "--tamper=nothing") == Said(
        out="",
        err="sevattest: argument --tamper: must be one of firmware, kernel, cmdline, policy, replay, chain\n"
        "hint: sevattest demo --help\n",
        code=2,
    )


@pytest.mark.parametrize("machine", ["qemu", "auto"])
def test_a_real_machine_that_was_named_and_cannot_be_had_is_refused(tmp_path: Path, machine: str) -> None:
    said = run("demo", "--machine", machine, "--qemu", tmp_path / "no-qemu")
    assert (said.out, said.code) == ("", 2)
    assert f"{tmp_path / 'no-qemu'} is not there; install Debian's qemu-system-x86" in said.err


@pytest.mark.parametrize("machine", ["qemu", "auto"])
def test_a_folder_that_was_named_and_holds_no_parts_is_refused(tmp_path: Path, machine: str) -> None:
    assert run("demo", "--machine", machine, "--guest", tmp_path) == Said(
        out="",
        err=f"sevattest: {tmp_path} is not a folder with a guest's parts\n"
        "hint: `make guest` makes one; one of another version must be made again\n",
        code=2,
    )


def test_a_built_in_machine_says_what_a_real_one_lacks(tmp_path: Path) -> None:
    said = run("demo", environ={"PATH": str(tmp_path)})
    assert said.code == 0
    assert "no real one: qemu-system-x86_64 is not there; install Debian's qemu-system-x86" in said.out
