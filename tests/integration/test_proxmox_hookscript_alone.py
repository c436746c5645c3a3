"""Proxmox VE's hookscript by itself: its locks, a launch that hangs, one that is killed.

`sevattest launch` is a shell script here that does what a test says; the shell is the system's `sh`, `dash` and `bash`.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from host_agent.hypervisors.proxmox import is_starting
from tests.support.agent import alive
from tests.support.eventually import wait_until
from tests.support.machine_kinds import REPOSITORY

HOOK = REPOSITORY / "host_agent" / "hookscript" / "sevattest-hookscript"
VMID = "100"
# One of each kind: `sh` is one of the others.
SHELLS = sorted(
    {Path(os.path.realpath(found)).name for shell in ("sh", "dash", "bash") if (found := shutil.which(shell))}
)
# A launch that has written the file, as the agent does for it, and goes on until it is told to end.
GOES_ON = 'touch "$RUN/launch.cfg"; while [ ! -e "$RUN/enough" ]; do sleep 0.02; done'
HANGS = "while :; do sleep 0.02; done"
DEAF = f"trap '' TERM HUP INT; {HANGS}"


@dataclass
class Hook:
    """The script on a host of its own."""

    root: Path
    shell: str
    running: list[subprocess.Popen[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        (self.root / "conf").mkdir()
        (self.root / "conf" / VMID).write_text("web\n--workload\nshop\n")
        # The script calls itself by its own name, so the shell stands in its first line. It waits less for its locks.
        self.script = self.root / "hook"
        text = HOOK.read_text().replace("#!/bin/sh", f"#!{shutil.which(self.shell)}", 1)
        assert " -w 5" in text
        self.script.write_text(text.replace(" -w 5", " -w 0.5"))
        self.script.chmod(0o755)

    @property
    def run(self) -> Path:
        return self.root / "run" / VMID

    def launch_is(self, body: str) -> None:
        """What `sevattest` does; its process and words are noted first."""
        program = self.root / "sevattest"
        program.write_text(f'#!/bin/sh\nRUN={self.run}\necho "$$" >>"$RUN/pids"\necho "$*" >"$RUN/words"\n{body}\n')
        program.chmod(0o755)

    def begin(self, phase: str, timeout: int = 60, path: str = os.environ["PATH"]) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [self.script, VMID, phase],
            env={
                "PATH": path,
                "SEVATTEST_PROXMOX_CONF": str(self.root / "conf"),
                "SEVATTEST_PROXMOX_RUN": str(self.root / "run"),
                "SEVATTEST_PROXMOX_TIMEOUT": str(timeout),
                "SEVATTEST_PROGRAM": str(self.root / "sevattest"),
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.running.append(process)
        return process

    def phase(self, phase: str, timeout: int = 60) -> tuple[int, str]:
        """Run one phase; its exit code and what it said, as Proxmox VE reads it: until nobody holds the pipe."""
        process = self.begin(phase, timeout)
        said, _ = process.communicate(timeout=40)
        return process.returncode, said

    @property
    def pids(self) -> list[int]:
        """The launches that were begun."""
        noted = self.run / "pids"
        return [int(line) for line in noted.read_text().split()] if noted.exists() else []

    def holds(self, name: str) -> bool:
        """Whether somebody holds that lock."""
        with (self.run / name).open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def end(self) -> None:
        for pid in self.pids:
            # A launch leads no group of its own; its shell, the script's phase, does.
            with suppress(ProcessLookupError):
                os.killpg(os.getpgid(pid), signal.SIGKILL)
        for process in self.running:
            if process.poll() is None:
                process.kill()
            process.communicate()


@pytest.fixture(params=SHELLS)
def hook(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Hook]:
    made = Hook(tmp_path, request.param)
    try:
        yield made
    finally:
        made.end()


def test_the_script_is_one_for_any_posix_shell(hook: Hook) -> None:
    done = subprocess.run([hook.shell, "-n", HOOK], check=False, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_launch_that_gets_its_file_goes_on_and_post_start_waits_for_its_end(hook: Hook) -> None:
    hook.launch_is(f"{GOES_ON}; echo 'running: web'")
    assert hook.phase("pre-start") == (0, "")
    assert alive(hook.pids[0])
    after = hook.begin("post-start")
    with pytest.raises(subprocess.TimeoutExpired):
        after.wait(0.5)
    (hook.run / "enough").touch()
    said, _ = after.communicate(timeout=20)
    assert (after.returncode, said) == (0, "sevattest: running: web\n")
    assert sorted(path.name for path in hook.run.iterdir()) == [
        *("enough", "launch.cfg", "launching", "pids", "starting", "words")
    ]


def test_a_launch_that_fails_after_the_start_fails_post_start_with_its_code(hook: Hook) -> None:
    hook.launch_is(f"{GOES_ON}; echo 'error: no'; exit 5")
    assert hook.phase("pre-start")[0] == 0
    (hook.run / "enough").touch()
    code, said = hook.phase("post-start")
    assert code == 5
    assert said == "sevattest: error: no\nsevattest: the launch failed; the guest has not run\n"


def test_the_launch_gives_up_before_the_script_does_unless_the_operator_says_otherwise(hook: Hook) -> None:
    hook.launch_is("exit 1")
    assert hook.phase("pre-start", timeout=60)[0] == 1
    assert (hook.run / "words").read_text() == "launch --timeout 60 web --workload shop\n"


@pytest.mark.parametrize("body", [HANGS, DEAF], ids=["ends-when-told", "must-be-killed"])
def test_when_pre_start_gives_up_nothing_of_the_launch_goes_on(hook: Hook, body: str) -> None:
    hook.launch_is(f"echo 'begin: soon'; {body}")
    code, said = hook.phase("pre-start", timeout=0)
    assert code == 1
    assert said == "sevattest: begin: soon\nsevattest: no launch; the machine is not started\n"
    assert [alive(pid) for pid in hook.pids] == [False]
    assert not hook.holds("launching")
    assert not hook.holds("starting")
    # And the next start is not in its way.
    hook.launch_is(GOES_ON)
    assert hook.phase("pre-start") == (0, "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_start_that_is_called_off_takes_its_launch_along(hook: Hook, number: signal.Signals) -> None:
    hook.launch_is(HANGS)
    before = hook.begin("pre-start")
    wait_until(lambda: len(hook.pids) == 1)
    assert alive(hook.pids[0])
    before.send_signal(number)
    said, _ = before.communicate(timeout=20)
    assert before.returncode == 1
    assert "no launch; the machine is not started" in said
    assert not alive(hook.pids[0])


# What the launch's own process, which opens its log, may have done or not when the signal comes.
_LOG_GONE = 'until [ -e "$run/launch.log" ]; do :; done; rm "$run/launch.log"; '


@pytest.mark.parametrize("first", ["", _LOG_GONE], ids=["at-once", "without-a-log"])
def test_a_start_that_is_called_off_as_its_launch_begins_takes_it_along(hook: Hook, first: str) -> None:
    hook.launch_is(HANGS)
    lines = hook.script.read_text().splitlines(keepends=True)
    [at] = [number for number, line in enumerate(lines) if line.strip().startswith("setsid ")]
    hook.script.write_text("".join([*lines[: at + 1], f"{first}kill -s TERM $$\n", *lines[at + 1 :]]))
    code, said = hook.phase("pre-start")
    assert code == 1
    assert "no launch; the machine is not started" in said
    assert not hook.holds("launching")


def test_a_start_that_is_called_off_before_its_launch_leads_a_group_begins_none(hook: Hook) -> None:
    hook.launch_is(HANGS)
    slow = hook.root / "bin" / "setsid"
    slow.parent.mkdir()
    slow.write_text(f'#!/bin/sh\ntouch {hook.root}/forked\nsleep 1\nexec {shutil.which("setsid")} "$@"\n')
    slow.chmod(0o755)
    before = hook.begin("pre-start", path=f"{slow.parent}:{os.environ['PATH']}")
    wait_until((hook.root / "forked").exists)
    before.send_signal(signal.SIGTERM)
    said, _ = before.communicate(timeout=20)
    assert before.returncode == 1
    assert "no launch; the machine is not started" in said
    assert hook.pids == []
    assert not hook.holds("launching")


def test_a_launch_that_is_killed_before_its_file_is_there_ends_pre_start_at_once(hook: Hook) -> None:
    hook.launch_is(HANGS)
    before = hook.begin("pre-start")
    wait_until(lambda: len(hook.pids) == 1)
    os.killpg(os.getpgid(hook.pids[0]), signal.SIGKILL)
    said, _ = before.communicate(timeout=20)
    assert before.returncode == 1
    assert "no launch; the machine is not started" in said


def test_a_launch_that_is_killed_while_post_start_waits_fails_it(hook: Hook) -> None:
    hook.launch_is(GOES_ON)
    assert hook.phase("pre-start")[0] == 0
    after = hook.begin("post-start")
    with pytest.raises(subprocess.TimeoutExpired):
        after.wait(0.3)
    os.killpg(os.getpgid(hook.pids[0]), signal.SIGKILL)
    said, _ = after.communicate(timeout=20)
    assert after.returncode == 1
    assert said == "sevattest: the launch failed; the guest has not run\n"


def test_a_launch_that_never_ends_does_not_hold_post_start_for_ever(hook: Hook) -> None:
    hook.launch_is(GOES_ON)
    assert hook.phase("pre-start")[0] == 0
    code, said = hook.phase("post-start", timeout=0)
    assert code == 1
    assert said == "sevattest: the launch has not ended in time\n"
    assert alive(hook.pids[0])


def test_the_agent_is_told_of_a_start_while_pre_start_waits_and_no_longer(hook: Hook) -> None:
    hook.launch_is(f'while [ ! -e "$RUN/go" ]; do sleep 0.02; done; {GOES_ON}')
    before = hook.begin("pre-start")
    wait_until(lambda: len(hook.pids) == 1)
    assert is_starting(hook.run)
    (hook.run / "go").touch()
    before.communicate(timeout=20)
    assert before.returncode == 0
    assert alive(hook.pids[0])
    assert not is_starting(hook.run)


def test_two_starts_of_a_machine_at_once_make_one_launch(hook: Hook) -> None:
    hook.launch_is(HANGS)
    hook.begin("pre-start")
    wait_until(lambda: len(hook.pids) == 1)
    assert hook.phase("pre-start") == (1, "sevattest: another start of this machine is under way\n")
    assert len(hook.pids) == 1
    assert alive(hook.pids[0])


def test_a_start_while_an_earlier_launch_goes_on_makes_no_second_one(hook: Hook) -> None:
    hook.launch_is(GOES_ON)
    assert hook.phase("pre-start")[0] == 0
    (hook.run / "launch.cfg").unlink()  # the agent has taken it away, and the machine's start has failed
    assert hook.phase("pre-start") == (1, "sevattest: an earlier launch of this machine has not ended yet\n")
    assert len(hook.pids) == 1
    assert alive(hook.pids[0])


def test_a_start_that_follows_one_that_failed_goes_on_with_its_launch(hook: Hook) -> None:
    hook.launch_is(f"{GOES_ON}; echo 'error: no'; exit 5")
    assert hook.phase("pre-start") == (0, "")
    assert hook.phase("pre-start") == (0, "sevattest: the launch of an earlier start goes on\n")
    assert len(hook.pids) == 1
    (hook.run / "enough").touch()
    code, said = hook.phase("post-start")
    assert code == 5
    assert said == "sevattest: error: no\nsevattest: the launch failed; the guest has not run\n"


def test_a_machine_that_the_agent_starts_is_left_to_it(hook: Hook) -> None:
    hook.launch_is("exit 1")
    hook.run.mkdir(parents=True)
    (hook.run / "launch.cfg").touch()
    assert hook.phase("pre-start") == (0, "sevattest: the agent starts this machine\n")
    assert hook.phase("post-start") == (0, "")
    assert hook.pids == []
