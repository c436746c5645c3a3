"""Processes that outlive the agent: the gate, the identity, the end."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NoReturn
from uuid import uuid4

import pytest

from common.errors import PlatformFailed
from host_agent.hypervisors.base import MachineId
from host_agent.hypervisors.console import open_log
from host_agent.hypervisors.process import Process, boot_id, end_family
from tests.support.agent import alive
from tests.support.eventually import until

GRACE = 10.0


def spawn(folder: Path, *argv: str, marker: str | None = None) -> Process:
    with open_log(folder) as log:
        return Process.spawn(argv, folder=folder, log=log, marker=marker or str(uuid4()))


def fields(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third on."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def children() -> set[int]:
    """Pids of this process's children, zombies too."""
    found = set()
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdigit() and int(fields(int(entry.name))[1]) == os.getpid():
                found.add(int(entry.name))
    return found


def command_line(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def descriptors(pid: int) -> set[str]:
    found = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # a library that was being loaded
            found.add(str(link.readlink()))
    return found


async def test_the_program_begins_only_when_the_gate_opens(tmp_path: Path) -> None:
    process = spawn(tmp_path, "touch", "begun")
    await asyncio.sleep(0.05)
    assert not (tmp_path / "begun").exists()
    assert process.alive
    process.open_gate()
    await process.wait_gone()
    assert (tmp_path / "begun").exists()
    assert process.exit_code == 0
    process.close()


async def test_a_process_at_the_gate_ends_with_the_agent(tmp_path: Path) -> None:
    code = (
        "import asyncio, os, sys\n"
        "from pathlib import Path\n"
        "from tests.unit.host_agent.hypervisors.test_process import spawn\n"
        "async def main():\n"
        "    process = spawn(Path(sys.argv[1]), 'touch', 'begun')\n"
        "    print(process.identity.pid, flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
        "asyncio.run(main())\n"
    )
    agent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, str(tmp_path), stdout=asyncio.subprocess.PIPE, cwd=Path(__file__).parents[4]
    )
    out, _ = await agent.communicate()
    await until(lambda: not alive(int(out)))
    assert not (tmp_path / "begun").exists()


async def test_the_identity_survives_the_gate_and_finds_the_process_again(tmp_path: Path) -> None:
    marker = str(uuid4())
    process = spawn(tmp_path, "sleep", "60", marker=marker)
    process.open_gate()
    await until(lambda: b"sleep" in command_line(process.identity.pid))
    again = Process.attach(process.identity, marker=marker)
    assert again is not None
    assert again.identity == process.identity
    await again.end(GRACE)
    await process.wait_gone()
    assert Process.attach(process.identity, marker=marker) is None
    again.close()
    process.close()


@pytest.mark.parametrize("change", [{"start_time": 1}, {"boot_id": "another"}, {"pid": 2**31 - 1}, {"pid": -1}])
async def test_a_process_that_is_not_exactly_the_one_is_not_found(tmp_path: Path, change: dict[str, object]) -> None:
    process = spawn(tmp_path, "sleep", "60")
    same: dict[str, object] = {
        "pid": process.identity.pid,
        "start_time": process.identity.start_time,
        "boot_id": process.identity.boot_id,
    }
    assert Process.attach(MachineId(**{**same, **change}), marker="x") is None  # type: ignore[arg-type]  # any field
    await process.end(GRACE)
    process.close()


async def test_a_process_of_somebody_elses_is_ended_alone(tmp_path: Path) -> None:
    code = "sleep 61 & echo $! >child; wait"
    other = await asyncio.to_thread(subprocess.Popen, ["/bin/sh", "-c", code], cwd=tmp_path, start_new_session=True)
    child = tmp_path / "child"
    await until(lambda: child.exists() and child.read_text().strip())
    pid = int(child.read_text())
    adopted = Process.adopt(other.pid)
    assert adopted is not None
    again = Process.attach(adopted.identity, marker=None)
    assert again is not None
    assert Process.attach(replace(adopted.identity, start_time=1), marker=None) is None
    ending = asyncio.create_task(adopted.end(GRACE))
    assert await asyncio.to_thread(other.wait) == -signal.SIGTERM
    await ending
    assert not again.alive
    assert alive(pid), "what it started is nobody's business"
    os.kill(pid, signal.SIGKILL)
    adopted.close()
    again.close()


async def test_a_process_that_is_not_there_is_not_adopted() -> None:
    child = await asyncio.to_thread(subprocess.Popen, ["true"])
    await until(lambda: fields(child.pid)[0] == "Z")
    assert Process.adopt(child.pid) is None
    child.wait()
    for pid in (child.pid, 0, -1, 2**40):
        assert Process.adopt(pid) is None


async def test_whatever_has_the_launchs_mark_is_found_in_sessions_of_its_own(tmp_path: Path) -> None:
    process = spawn(tmp_path, "/bin/sh", "-c", "setsid sleep 61 & echo $! >child; wait", marker="mine")
    process.open_gate()
    child = tmp_path / "child"
    await until(lambda: child.exists() and child.read_text().strip())
    pid = int(child.read_text())
    await until(lambda: fields(pid)[3] == str(pid))
    await process.end(GRACE)
    assert alive(pid)
    await end_family(None, "somebody else's")
    assert alive(pid)
    await end_family(None, "mine")
    assert not alive(pid)
    process.close()


async def test_a_zombie_counts_as_gone() -> None:
    child = await asyncio.to_thread(subprocess.Popen, ["true"], start_new_session=True)
    await until(lambda: fields(child.pid)[0] == "Z")
    identity = MachineId(pid=child.pid, start_time=int(fields(child.pid)[19]), boot_id=boot_id())
    assert Process.attach(identity, marker="x") is None
    child.wait()


async def test_a_process_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    process = spawn(tmp_path, "/bin/sh", "-c", "trap '' TERM; touch ready; while :; do sleep 1; done")
    process.open_gate()
    await until((tmp_path / "ready").exists)
    await process.end(0.1)
    assert not alive(process.identity.pid)
    assert process.exit_code == -signal.SIGKILL
    process.close()


async def test_ending_what_is_gone_does_nothing(tmp_path: Path) -> None:
    process = spawn(tmp_path, "true")
    process.open_gate()
    await process.wait_gone()
    await process.end(GRACE)
    process.open_gate()
    process.close()


async def test_a_family_without_the_launchs_mark_is_left_alone(tmp_path: Path) -> None:
    process = spawn(tmp_path, "/bin/sh", "-c", "sleep 61 & echo $! >child; wait", marker="mine")
    process.open_gate()
    child = tmp_path / "child"
    await until(lambda: child.exists() and child.read_text().strip())
    pid = int(child.read_text())
    os.kill(process.identity.pid, signal.SIGKILL)
    await process.wait_gone()
    await end_family(process.identity.pid, "somebody else's")
    await end_family(os.getsid(0), "mine")
    assert alive(pid)
    await end_family(process.identity.pid, "mine")
    assert not alive(pid)
    process.close()


async def test_the_machine_gets_no_descriptor_of_the_agents(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.set_inheritable(True)
        process = spawn(tmp_path, "sleep", "60")
        assert not any(link.startswith("socket:") for link in descriptors(process.identity.pid))
        await process.end(GRACE)
        process.close()


@pytest.mark.parametrize("missing", ["os.pidfd_open", "host_agent.hypervisors.process.boot_id"])
async def test_a_process_that_cannot_be_watched_is_none_and_leaves_nothing(
    tmp_path: Path, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> NoReturn:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    before = children(), descriptors(os.getpid())
    with monkeypatch.context() as patch:
        patch.setattr(missing, refuse)
        with pytest.raises(PlatformFailed, match="no process can be started: Too many open files"):
            spawn(tmp_path, "touch", "begun")
    assert (children(), descriptors(os.getpid())) == before
    assert not (tmp_path / "begun").exists()


async def test_a_program_that_is_not_there_says_so_in_the_log(tmp_path: Path) -> None:
    process = spawn(tmp_path, "/no/such/program")
    process.open_gate()
    await process.wait_gone()
    assert process.exit_code == 127
    assert "/no/such/program" in (tmp_path / "machine.log").read_text()
    process.close()
