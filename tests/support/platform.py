"""A software SEV platform for tests: as a real process, or in a thread of this one where a test injects faults.

A chip's RSA keys take seconds to make. They are made once per test run and generation, in the folder that `keep_chips`
names, and copied from there. Two workers that start at once both make one; the first rename wins and the other's is
dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from emulator.app import ServeOptions, serve
from emulator.faults import Faults
from emulator.keys import GENERATIONS, make_chip

SEVATTEST = (sys.executable, "-c", "import sys; from orchestrator.cli import main; sys.exit(main())")
_chips: list[Path] = []  # where this run keeps its chips
_START_TIMEOUT = 60.0  # seconds; generous, since a loaded machine may have to make RSA keys first


@dataclass(kw_only=True)
class Platform:
    """A platform that is being served.

    Attributes:
        state: its folder.
        socket: the device socket.
        ask_ark: ASK || ARK, the root that a verifier must name.
        kds: folder of signed CEKs.
        generation: what it imitates.
        key_service: URL of its key service, where one was asked for.
        process: the serving process; None for one in a thread.
    """

    state: Path
    generation: str
    key_service: str | None = None
    process: subprocess.Popen[str] | None = None
    socket: Path = field(init=False)
    ask_ark: Path = field(init=False)
    kds: Path = field(init=False)

    def __post_init__(self) -> None:
        self.socket = self.state / "sev.sock"
        self.ask_ark = self.state / "ask_ark.cert"
        self.kds = self.state / "kds"

    def machine(self, *own_options: str) -> list[str]:
        """The words before QEMU's own arguments that run the stand-in machine on this platform."""
        return [*SEVATTEST, "platform", "qemu", "--builtin", "--state", str(self.state), *own_options]

    def front(self, program: str, *own_options: str) -> list[str]:
        """The words before QEMU's own arguments that run the real QEMU `program` on this platform."""
        return [*SEVATTEST, "platform", "qemu", "--state", str(self.state), "--qemu", program, *own_options]


@contextlib.contextmanager
def running_platform(
    state_dir: Path, generation: str = "milan", *, key_service: bool = False, options: Sequence[str] = ()
) -> Iterator[Platform]:
    """Serve a platform in `state_dir` as a process of its own; ends it (SIGTERM) and removes nothing else.

    Args:
        state_dir: the platform's folder, made when it is missing; a platform that is there already is served again.
        generation: what a new platform imitates.
        key_service: whether it serves its key service as well.
        options: further options of `sevattest platform serve`.
    """
    give_chip(state_dir, generation)
    words = [*SEVATTEST, "platform", "serve", "--state", str(state_dir), "--generation", generation, *options]
    if key_service:
        words += ["--kds-listen", "127.0.0.1:0"]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            ready = _line(process)
            if not ready.startswith("sevattest platform: serving on "):
                errors.seek(0)
                raise AssertionError(f"the platform did not start: {ready!r} {errors.read()}")
            url = _line(process).rsplit(" ", 1)[-1].strip() if key_service else None
            yield Platform(state=state_dir, generation=generation, key_service=url, process=process)
        finally:
            process.terminate()
            try:
                process.communicate(timeout=_START_TIMEOUT)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()


@contextlib.contextmanager
def platform_in_thread(
    state_dir: Path,
    generation: str = "milan",
    *,
    faults: Faults | None = None,
    initialise: bool = True,
    es: bool = True,
) -> Iterator[Platform]:
    """Serve a platform from a thread of this process, so that `faults` can be injected."""
    give_chip(state_dir, generation)
    options = ServeOptions(state=state_dir, generation=generation, initialise=initialise, es=es)
    ready = threading.Event()
    stop: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []
    failure: list[BaseException] = []

    async def main() -> None:
        stopped = asyncio.Event()
        stop.append((asyncio.get_running_loop(), stopped))
        await serve(options, faults=faults, stop=stopped, ready=ready.set)

    def run() -> None:
        try:
            asyncio.run(main())
        except BaseException as error:  # noqa: BLE001 -- handed to the test that waits
            failure.append(error)
        finally:
            ready.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(_START_TIMEOUT)
    if failure:
        raise failure[0]
    try:
        yield Platform(state=state_dir, generation=generation)
    finally:
        loop, stopped = stop[0]
        loop.call_soon_threadsafe(stopped.set)
        thread.join(_START_TIMEOUT)
        if failure:
            raise failure[0]


def keep_chips(folder: Path) -> None:
    """Make this run's chips in `folder`."""
    folder.mkdir(exist_ok=True)
    _chips.append(folder)


def give_chip(state_dir: Path, generation: str) -> None:
    """Put a ready-made chip of this test run into `state_dir`, unless there is one."""
    state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    chip = state_dir / "chip"
    if chip.exists():
        return
    if not _chips:
        return  # outside of a test run: the platform makes its own
    made = _chips[-1] / generation
    if not made.is_dir():
        with contextlib.suppress(OSError):  # another worker was first
            make_chip(made, GENERATIONS[generation])
    shutil.copytree(made, chip)


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    watchdog = threading.Timer(_START_TIMEOUT, process.kill)
    watchdog.start()
    try:
        return process.stdout.readline()
    finally:
        watchdog.cancel()
