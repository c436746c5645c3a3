"""`sev-host-agent selftest` that is told to stop: it ends its guest first, whatever else it is told."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.support.agent_site import Site
from tests.support.eventually import until
from tests.support.selftest import AGENT, assert_nothing_is_left

pytestmark = pytest.mark.slow

# A machine that never greets; the stubborn one is told to end and does not, so that its end takes a while.
WAITING = "import time; time.sleep(3600)"
STUBBORN = (
    "import signal; signal.signal(signal.SIGTERM, lambda *_: print('told', flush=True)); print('deaf', flush=True); "
)


@contextmanager
def waiting_selftest(site: Site, program: str = WAITING, *before: str) -> Iterator[subprocess.Popen[str]]:
    """A selftest whose machine runs `program` and does not answer."""
    site.program = [sys.executable, "-c", program]
    site.write_config()
    command = [*before, *AGENT, "selftest", "--config", str(site.config)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            asyncio.run(until(lambda: any(b"3600" in _command_line(pid) for pid in site.machines())))
            yield process
        finally:
            process.kill()


def last_words(site: Site) -> bytes:
    """What the machine has said."""
    return b"".join(path.read_bytes() for path in (site.root / "state").glob("selftest-*/machine.log"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
def test_a_signal_ends_the_guest_first(site: Site, number: signal.Signals) -> None:
    with waiting_selftest(site) as process:
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "Traceback" not in errors
    assert_nothing_is_left(site)


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
def test_further_signals_do_not_keep_the_guest_from_being_ended(site: Site, second: signal.Signals) -> None:
    site.qemu["stop_timeout"] = 1
    with waiting_selftest(site, STUBBORN + WAITING) as process:
        asyncio.run(until(lambda: b"deaf" in last_words(site)))
        process.send_signal(signal.SIGTERM)
        asyncio.run(until(lambda: b"told" in last_words(site)))  # so its end is under way
        assert process.poll() is None
        process.send_signal(second)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in errors
    assert_nothing_is_left(site)


def test_a_terminal_that_hangs_up_ends_the_guest_first(site: Site) -> None:
    site.program = [sys.executable, "-c", WAITING]
    site.write_config()
    ours, theirs = os.openpty()
    command = ["setsid", "--ctty", "--wait", *AGENT, "selftest", "--config", str(site.config)]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        try:
            os.close(theirs)
            asyncio.run(until(lambda: any(b"3600" in _command_line(pid) for pid in site.machines())))
            os.close(ours)
            process.wait(timeout=60)
        finally:
            process.kill()
    asyncio.run(until(lambda: not site.machines() and not [*(site.root / "state").glob("selftest-*")]))
    assert_nothing_is_left(site)


def test_a_signal_that_was_ignored_before_stays_ignored(site: Site) -> None:
    with waiting_selftest(site, WAITING, "nohup") as process:
        process.send_signal(signal.SIGHUP)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert_nothing_is_left(site)


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
