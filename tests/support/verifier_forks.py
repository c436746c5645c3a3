"""Verifier processes in a tenth of the time: one process imports the program, and forks for each that is to be killed.

Each fork is a process of its own that opens its store anew and ends as its hook or the test wants. One lives at a time.
Run as a program this module is the one that forks: it reads a line for each, and tells how each began and ended.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Self

from common.clock import SystemClock
from tests.support.verifier_process import VerifierSite, killer

_TIMEOUT_S = 60.0
_PR_SET_PDEATHSIG = 1


class Forks:
    """The process that forks."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.verifier_forks"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )

    def serve(self, site: VerifierSite, *, die_at: str | None = None, ahead: float = 0.0) -> Fork:
        """A verifier of the site, which serves.

        Args:
            site: the site.
            die_at: the step at which it kills itself.
            ahead: seconds that its clock is ahead.
        """
        process = self._process
        assert process.stdin is not None
        request = {"config": str(site.config), "log": str(site.folder / "log"), "die_at": die_at, "ahead": ahead}
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        said = self.say().split()
        assert said[0] == "serving", (site.folder / "log").read_text()
        return Fork(forks=self, pid=int(said[1]), address=said[2])

    def say(self) -> str:
        """The next line that it says."""
        assert self._process.stdout is not None
        watchdog = threading.Timer(_TIMEOUT_S, self._process.kill)
        watchdog.start()
        line = self._process.stdout.readline()
        watchdog.cancel()
        return line.strip() or "nothing"

    def close(self) -> None:
        """End it, and what it forked."""
        self._process.kill()
        self._process.communicate()


@dataclass(kw_only=True)
class Fork:
    """One verifier."""

    forks: Forks
    pid: int
    address: str
    code: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        if self.code is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)
            self._wait()

    async def wait_dead(self) -> int:
        """The exit code of one that is about to die."""
        return await asyncio.to_thread(self._wait)

    def _wait(self) -> int:
        what, code = self.forks.say().split()
        assert what == "ended"
        self.code = int(code)
        return self.code


@dataclass(frozen=True)
class _Ahead:
    """A clock that is ahead."""

    seconds: float

    def now(self) -> datetime:
        """The time."""
        return SystemClock().now() + timedelta(seconds=self.seconds)


def main() -> None:
    """Fork for each line."""
    from common.telemetry.log import configure
    from verifier.app import Addresses, App, real_surroundings

    def serve(request: dict[str, Any]) -> None:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        os.dup2(os.open(request["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), 2)
        on_step: Callable[[str], None] = killer(request["die_at"] or "never")
        surroundings = replace(real_surroundings(), on_step=on_step, clock=_Ahead(request["ahead"]))

        def announce(at: Addresses) -> None:
            print(f"serving {os.getpid()} {at.launches}", flush=True)  # noqa: T201 -- the test reads it

        asyncio.run(App(Path(request["config"]), configure("sev-verifier"), surroundings).run(announce))

    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                serve(json.loads(line))
                code = 0
            finally:
                os._exit(code)
        _, status = os.waitpid(pid, 0)
        print(f"ended {os.waitstatus_to_exitcode(status)}", flush=True)  # noqa: T201 -- the same


if __name__ == "__main__":
    main()
