"""`platform run` as a process: it ends as its program did, passes signals on, and leaves nothing behind."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.support.eventually import wait_until
from tests.support.platform import SEVATTEST, Platform
from tests.support.under import TIMEOUT, run_words

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or os.uname().machine != "x86_64", reason="seccomp filters are written for x86-64 Linux"
)
SHELL = "/bin/sh"
# Prints the number of each signal that it gets, and ends with 5 at SIGUSR2.
COUNTS = """
import os, signal, sys
got = []
def note(number, frame):
    got.append(number)
    print(number, flush=True)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, note)
print("ready", os.getpid(), flush=True)
while signal.SIGUSR2 not in got:
    signal.pause()
sys.exit(5)
"""


def ended(platform: Platform, *program: str) -> tuple[int, str, str]:
    run = subprocess.run(run_words(platform, *program), capture_output=True, text=True, timeout=TIMEOUT, check=False)
    return run.returncode, run.stdout, run.stderr


@contextmanager
def started(platform: Platform, *program: str) -> Iterator[subprocess.Popen[str]]:
    """A run, and the end of it and of what its program has left behind, also where the test fails."""
    words = run_words(platform, *program)
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        # Once it was waited for, its number may be another's.
        for descendant in descendants(process.pid) if process.poll() is None else []:
            with suppress(ProcessLookupError):
                os.kill(descendant, signal.SIGKILL)
        process.kill()
        process.communicate(timeout=TIMEOUT)


def line(process: subprocess.Popen[str]) -> str:
    """The next line that it prints. One at a time is printed, so that none waits in a buffer of ours."""
    assert process.stdout is not None
    assert select.select([process.stdout], [], [], TIMEOUT)[0], "nothing was printed"
    return process.stdout.readline()


def is_running(process: int) -> bool:
    """Whether it exists and is no zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("code", [0, 1, 3, 127, 255])
def test_the_programs_exit_code_is_the_commands(platform: Platform, code: int) -> None:
    assert ended(platform, SHELL, "-c", f"echo out; echo err >&2; exit {code}") == (code, "out\n", "err\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGINT])
def test_a_program_that_dies_by_a_signal_takes_the_command_along(platform: Platform, number: signal.Signals) -> None:
    assert ended(platform, SHELL, "-c", f"kill -{int(number)} $$")[0] == -number


def test_words_streams_environment_and_folder_are_the_programs(platform: Platform, tmp_path: Path) -> None:
    words = run_words(platform, SHELL, "-c", 'cat; printf "%s|" "$0" "$@"; pwd; echo $MARK', "-x", "--", "a b", "")
    run = subprocess.run(
        words,
        input="in\n",
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=True,
        cwd=tmp_path,
        env={"MARK": "m"},
    )
    assert run.stdout == f"in\n-x|--|a b||{tmp_path}\nm\n"


def test_the_program_does_not_inherit_what_python_ignores_and_blocks(platform: Platform) -> None:
    seen = ended(platform, SHELL, "-c", "grep -E '^Sig(Blk|Ign)' /proc/self/status")[1]
    here = subprocess.run([SHELL, "-c", "grep -E '^Sig(Blk|Ign)' /proc/self/status"], capture_output=True, check=True)
    assert seen == here.stdout.decode()


def test_the_program_has_the_descriptors_that_a_program_started_directly_has(platform: Platform) -> None:
    end, start = os.pipe()
    words = [SHELL, "-c", "ls /proc/self/fd | sort -n"]
    listed = []
    for command in (words, run_words(platform, *words)):
        run = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=True, pass_fds=(start,))
        listed.append(run.stdout.split())
    os.close(end)
    os.close(start)
    assert listed[0] == listed[1]
    assert str(start) in listed[1]


def test_signals_are_passed_on(platform: Platform) -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)
    with started(platform, sys.executable, "-c", COUNTS) as process:
        assert line(process).startswith("ready ")
        for number in numbers:
            process.send_signal(number)
            assert line(process) == f"{int(number)}\n"
        process.send_signal(signal.SIGUSR2)
        assert process.communicate(timeout=TIMEOUT) == (f"{int(signal.SIGUSR2)}\n", "")
        assert process.returncode == 5


def test_ctrl_c_reaches_the_program_once(platform: Platform) -> None:
    ours, theirs = pty.openpty()
    take = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
    words = [sys.executable, "-c", take, *run_words(platform, sys.executable, "-c", COUNTS)]
    process = subprocess.Popen(words, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    try:
        pid = int(read_until(ours, b"\n").split()[1])
        # Apart in time, since two of a kind that wait are one.
        process.send_signal(signal.SIGSTOP)
        os.write(ours, b"\x03")
        said = read_until(ours, b"2\r\n")
        process.send_signal(signal.SIGUSR1)  # which the supervisor would pass on after a SIGINT
        process.send_signal(signal.SIGCONT)
        said += read_until(ours, b"10\r\n")
        os.kill(pid, signal.SIGUSR2)
        assert process.wait(TIMEOUT) == 5
        said += read_until(ours, None)
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    assert said.replace(b"^C", b"").split() == [b"2", b"10", b"12"]


def read_until(terminal: int, wanted: bytes | None) -> bytes:
    """What a terminal shows up to and with `wanted`; None: up to the end of the last who has it open."""
    said = b""
    while wanted is None or wanted not in said:
        try:
            said += os.read(terminal, 1024)
        except OSError:  # EIO: nobody has it open any more
            break
    return said


def test_what_a_program_leaves_behind_is_served_and_waited_for(platform: Platform) -> None:
    left = (
        "import os, sys; print(os.getpid(), flush=True); sys.stdin.readline(); "
        "open('/dev/sev').close(); print('served', flush=True)"
    )
    # dash gives what goes on in the background /dev/null as its standard input, and `<&0` is that already.
    script = f'exec 3<&0; {sys.executable} -c "{left}" <&3 3<&- & exit 6'
    with started(platform, SHELL, "-c", script) as process:
        orphan = int(line(process))
        wait_until(lambda: children(process.pid) == [orphan])
        assert process.communicate("go\n", timeout=TIMEOUT) == ("served\n", "")
        assert process.returncode == 6


def test_a_signal_ends_what_a_program_has_left_behind(platform: Platform) -> None:
    with started(platform, SHELL, "-c", "sleep 1000 & exit 0") as process:
        wait_until(lambda: [command_of(child) for child in children(process.pid)] == ["sleep 1000"])
        (left,) = children(process.pid)
        process.terminate()
        assert process.communicate(timeout=TIMEOUT) == ("", "")
        assert process.returncode == 0
        assert not is_running(left)


def test_a_killed_supervisor_takes_the_program_along_and_hangs_nobody(platform: Platform, tmp_path: Path) -> None:
    # The program's own child is not the supervisor's: its calls fail, it does not wait.
    tried = tmp_path / "tried"
    code = (
        "import os, signal, sys, time\n"
        "log = open(sys.argv[1], 'w')\n"
        "parent, deadline = os.getpid(), time.monotonic() + float(sys.argv[2])\n"
        "child = os.fork()\n"
        "if child:\n"
        "    print(os.getpid(), child, flush=True)\n"
        "    signal.pause()\n"
        "while os.getppid() == parent and time.monotonic() < deadline: time.sleep(0.01)\n"
        "try: os.open('/dev/sev', os.O_RDWR)\n"
        "except OSError as error: print(error.errno, file=log, flush=True)\n"
    )
    with started(platform, sys.executable, "-c", code, str(tried), str(TIMEOUT)) as process:
        program, child = map(int, line(process).split())
        process.kill()
        process.communicate(timeout=TIMEOUT)
        wait_until(lambda: not is_running(program) and not is_running(child))
    assert tried.read_text() == "38\n"  # ENOSYS


def test_a_program_killed_during_a_command_is_not_waited_for(tmp_path: Path) -> None:
    from emulator.faults import Fault, Faults
    from tests.support.platform import platform_in_thread

    faults = Faults()
    faults.inject(1, Fault(errno=5, delay=20.0))
    code = (
        "import fcntl, os\n"
        "device = os.open('/dev/sev', os.O_RDWR)\n"
        "print(os.getpid(), flush=True)\n"
        "fcntl.ioctl(device, 0xC0105300, bytearray(b'\\1' + bytes(15)))\n"
    )
    with (
        platform_in_thread(tmp_path / "p", faults=faults) as served,
        started(served, sys.executable, "-c", code) as process,
    ):
        program = int(line(process))
        wait_until(lambda: Path(f"/proc/{program}/syscall").read_text(encoding="ascii").startswith("16 "))
        begun = time.monotonic()
        os.kill(program, signal.SIGKILL)
        assert process.wait(TIMEOUT) == -signal.SIGKILL
        assert time.monotonic() - begun < 18


def test_without_a_served_platform_it_says_so_and_ends_with_3(tmp_path: Path) -> None:
    nowhere = Platform(state=tmp_path / "nowhere", generation="milan")
    code, out, err = ended(nowhere, SHELL, "-c", "echo started")
    assert (code, out) == (3, "")
    state = nowhere.state
    said = f"sevattest: no platform is served in {state}\nhint: sevattest platform serve --state {state}\n"
    assert err == said


def test_a_program_that_cannot_be_run_is_bad_input(platform: Platform, tmp_path: Path) -> None:
    (tmp_path / "broken").write_bytes(b"\x7fELF not a program")
    (tmp_path / "broken").chmod(0o755)
    assert ended(platform, "/no/such/program") == (2, "", "sevattest: there is no program /no/such/program\n")
    broken = str(tmp_path / "broken")
    assert ended(platform, broken) == (2, "", f"sevattest: {broken}: exec format error\n")
    run = subprocess.run(run_words(platform), capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert (run.returncode, run.stderr) == (2, "sevattest: which program?\nhint: sevattest platform run --help\n")


def test_it_cannot_be_nested_and_says_why(platform: Platform) -> None:
    code, out, err = ended(platform, *run_words(platform, SHELL, "-c", "echo started"))
    assert (code, out) == (3, "")
    assert err.startswith("sevattest: the kernel does not let calls be intercepted: device or resource busy\n")
    assert "not already under `platform run`" in err


def test_nothing_is_left_of_a_run(platform: Platform) -> None:
    before = sorted(entry.name for entry in platform.state.iterdir())
    with started(platform, SHELL, "-c", "echo $$; exec sleep 1000") as process:
        program = int(line(process))
        assert is_running(program)
        process.terminate()
        assert process.wait(TIMEOUT) == -signal.SIGTERM
    assert not is_running(program)
    assert sorted(entry.name for entry in platform.state.iterdir()) == before


def test_the_help_names_the_words() -> None:
    run = subprocess.run([*SEVATTEST, "platform", "run", "--help"], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("usage: sevattest platform run --state DIR [--vmsa FLAVOUR] -- PROGRAM ARGUMENTS …\n")


def children(process: int) -> list[int]:
    """Of its first thread, the only one that starts any; none when it is gone."""
    try:
        return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:
        return []


def descendants(process: int) -> list[int]:
    return [each for child in children(process) for each in (child, *descendants(child))]


def command_of(process: int) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_text().replace("\0", " ").strip()
    except OSError:
        return ""
