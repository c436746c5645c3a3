"""Processes that the demonstration starts: ready lines, early ends, and being ended by pid and by nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.errors import PlatformFailed
from orchestrator.demo.processes import Service, end_machine, machine_pid, script, signals_held

SERVES = "import signal; print('x: serving on here:1', flush=True); signal.pause()"
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);" + SERVES
ENDS = "import sys; sys.stderr.write('first\\nno such thing\\n'); sys.exit(3)"


def service(tmp_path: Path, code: str) -> Service:
    return Service("x", [sys.executable, "-c", code], logs=tmp_path, environ=dict(os.environ))


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Service]:
    made = service(tmp_path, SERVES)
    made.start()
    yield made
    made.stop()


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_a_service_says_where_it_serves(serving: Service) -> None:
    assert serving.wait_ready(20) == "here:1"
    assert serving.where == "here:1"
    assert serving.running


def test_whoever_asks_again_is_told_what_the_one_ready_line_said(serving: Service) -> None:
    assert [serving.wait_ready(20), serving.wait_ready(0.05)] == ["here:1"] * 2
    serving.kill()
    with pytest.raises(PlatformFailed, match="was not started"):
        serving.wait_ready(20)


def test_a_service_that_ends_before_it_is_ready_has_its_last_words_heard(tmp_path: Path) -> None:
    made = service(tmp_path, ENDS)
    made.start()
    with pytest.raises(PlatformFailed, match="x ended with 3: no such thing"):
        made.wait_ready(20)
    made.stop()


def test_a_service_that_says_nothing_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    made = service(tmp_path, "import signal; signal.pause()")
    made.start()
    with pytest.raises(PlatformFailed, match="was not ready within"):
        made.wait_ready(0.05)
    pid = made.pid
    made.stop()
    assert not alive(pid)


def test_a_service_that_says_something_else_is_not_ready(tmp_path: Path) -> None:
    made = service(tmp_path, "print('hello', flush=True); import signal; signal.pause()")
    made.start()
    with pytest.raises(PlatformFailed, match="hello"):
        made.wait_ready(20)
    made.stop()


def test_a_stopped_service_is_gone_and_may_be_stopped_again(serving: Service) -> None:
    serving.wait_ready(20)
    pid = serving.pid
    serving.stop()
    assert not alive(pid)
    assert not serving.running
    serving.stop()


def test_a_service_that_ignores_sigterm_is_ended_by_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.demo.processes._STOP_SECONDS", 0.2)
    made = service(tmp_path, STUBBORN)
    made.start()
    made.wait_ready(20)
    pid = made.pid
    made.stop()
    assert not alive(pid)


def test_a_killed_service_starts_again_with_settings_of_its_own(tmp_path: Path) -> None:
    made = service(
        tmp_path, "import os,signal; print('x: serving on', os.environ.get('WHERE'), flush=True)\nsignal.pause()"
    )
    made.start()
    assert made.wait_ready(20) == "None"
    made.kill()
    made.start({"WHERE": "there"})
    assert made.wait_ready(20) == "there"
    made.stop()


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()", str(tmp_path)])
    yield process
    process.kill()
    process.wait()


def test_a_machine_is_found_and_ended_by_the_id_that_it_wrote(tmp_path: Path, machine: subprocess.Popen[bytes]) -> None:
    (tmp_path / "pid").write_text(f"{machine.pid}\n")
    assert machine_pid(tmp_path / "pid", str(tmp_path)) == machine.pid
    assert end_machine(tmp_path / "pid", str(tmp_path))
    assert machine.wait() == -signal.SIGTERM
    assert machine_pid(tmp_path / "pid", str(tmp_path)) is None


def test_a_process_that_has_got_the_machines_id_is_left_alone(tmp_path: Path, machine: subprocess.Popen[bytes]) -> None:
    (tmp_path / "pid").write_text(f"{machine.pid}\n")
    assert not end_machine(tmp_path / "pid", "/another/folder")
    assert machine.poll() is None


@pytest.mark.parametrize("text", [None, "", "no number", "999999999"])
def test_there_is_no_machine_without_a_good_id(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "pid").write_text(text)
    assert not end_machine(tmp_path / "pid", str(tmp_path))


@pytest.mark.parametrize("name", ["sevattest", "sev-host-agent", "sev-verifier"])
def test_each_script_is_found(name: str) -> None:
    assert Path(script(name)[0]).exists()


def test_a_signal_waits_while_a_process_is_written_down() -> None:
    seen: list[str] = []
    before = signal.signal(signal.SIGHUP, lambda _number, _frame: seen.append("signal"))
    try:
        with signals_held():
            signal.raise_signal(signal.SIGHUP)
            seen.append("written down")
        assert seen == ["written down", "signal"]
        signal.raise_signal(signal.SIGHUP)
        assert seen[2:] == ["signal"]
    finally:
        signal.signal(signal.SIGHUP, before)
