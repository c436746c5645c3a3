"""Which process is the machine that a launch waits for: real processes, and those that only look like it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import pytest

from host_agent.hypervisors import expected as module
from host_agent.hypervisors.base import MachineId
from host_agent.hypervisors.expected import Expected
from host_agent.hypervisors.process import Process, boot_id

# A program that says that it is there, and ends with its stdin.
_WAIT = "import sys; print(flush=True); sys.stdin.read()"


@contextmanager
def running(*words: str) -> Iterator[MachineId]:
    """A process with these words on its command line."""
    line = [sys.executable, "-ISE", "-c", _WAIT, *words]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        yield identity(child.pid)


def identity(pid: int) -> MachineId:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return MachineId(pid=pid, start_time=int(fields[19]), boot_id=boot_id())


@pytest.fixture
def awaited(tmp_path: Path) -> Expected:
    return Expected.from_now(tmp_path / "launch.cfg", uuid4())


@pytest.mark.parametrize("option", ["-readconfig", "--readconfig"])
def test_a_later_process_that_reads_the_file_is_the_machine(awaited: Expected, option: str) -> None:
    with running("-S", option, str(awaited.file), "-m", "1G") as machine:
        assert awaited.objection(machine) is None


def test_the_file_may_be_named_through_a_link(awaited: Expected, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    with running("-readconfig", str(tmp_path / "link" / "launch.cfg")) as machine:
        assert awaited.objection(machine) is None


@pytest.mark.parametrize(
    "words",
    [
        ["-m", "1G"],
        ["-readconfig", "/another/launch.cfg"],
        ["-readconfig", "launch.cfg"],
        ["-name", "FILE"],
        ["-readconfig=FILE"],
        ["FILE", "-readconfig"],
        ["-readconfig", "FILE.old"],
    ],
)
def test_a_process_that_does_not_read_the_file_is_not(
    awaited: Expected, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(awaited.file.parent)
    with running(*(word.replace("FILE", str(awaited.file)) for word in words)) as other:
        assert awaited.objection(other) == f"was not started with -readconfig {awaited.file}"


def test_an_older_process_that_reads_the_file_is_not(awaited: Expected) -> None:
    with running("-readconfig", str(awaited.file)) as machine:
        assert awaited.objection(replace(machine, start_time=awaited.since)) is None
        assert awaited.objection(replace(machine, start_time=awaited.since - 1)) == "began before the launch"
        assert awaited.objection(replace(machine, boot_id=str(uuid4()))) == "began before the launch"


def test_neither_the_agent_nor_what_it_runs_under_is(awaited: Expected, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_reads", lambda *_: True)
    late = awaited.since + 1
    for pid in (1, os.getpid(), os.getppid()):
        found = MachineId(pid=pid, start_time=late, boot_id=boot_id())
        assert awaited.objection(found) == "is the agent's own, or one that the agent runs under"
    with running() as other:
        assert awaited.objection(other) is None


def test_a_process_that_is_gone_is_not(awaited: Expected) -> None:
    with running("-readconfig", str(awaited.file)) as machine:
        pass
    assert awaited.objection(machine) is not None


def test_the_file_tells_an_agent_that_restarts_what_was_waited_for(awaited: Expected) -> None:
    awaited.file.write_text(awaited.head + "[machine]\n")
    assert Expected.read(awaited.file, awaited.launch) == awaited


@pytest.mark.parametrize("text", ["", "[machine]\n", "# sevattest\n", "\0" * 300])
def test_a_file_without_the_line_is_nobodys(awaited: Expected, text: str) -> None:
    awaited.file.write_text(text)
    assert Expected.read(awaited.file, awaited.launch) is None


def test_a_file_that_is_another_launchs_or_another_boots_or_gone_is_not_read(awaited: Expected) -> None:
    assert Expected.read(awaited.file, awaited.launch) is None
    awaited.file.write_text(awaited.head)
    assert Expected.read(awaited.file, uuid4()) is None
    awaited.file.write_text(replace(awaited, boot_id=str(uuid4())).head)
    assert Expected.read(awaited.file, awaited.launch) is None
    awaited.file.unlink()
    elsewhere = awaited.file.with_name("elsewhere")
    elsewhere.write_text(awaited.head)
    awaited.file.symlink_to(elsewhere)
    assert Expected.read(awaited.file, awaited.launch) is None


async def test_a_process_that_is_spawned_after_it_was_asked_for_is_never_too_old(tmp_path: Path) -> None:
    for _ in range(20):
        asked = Expected.from_now(tmp_path / "launch.cfg", uuid4())
        with (tmp_path / "log").open("wb") as log:
            process = Process.spawn(["/bin/true"], folder=tmp_path, log=log, marker="m")
        assert process.identity.start_time >= asked.since
        await process.end(5)
        process.close()
