"""The end-to-end run: a stack for each worker, a row for each scenario, and what must hold after every one of them."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

import pytest

from orchestrator.demo.guest.parts import is_amdsev
from tests.e2e import leftovers
from tests.e2e.bench import Bench, running_bench
from tests.e2e.inventory import Missing, gathered
from tests.e2e.report import PROPERTY, Row, Table
from tests.e2e.scene import Scene
from tests.support.stack import sides

_FOLDER = pytest.StashKey[Path]()
_TABLE = pytest.StashKey[Table]()
_LEFT = pytest.StashKey[list[str]]()
_ROW = pytest.StashKey[Row]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("e2e", "the end-to-end run")
    group.addoption("--guest", type=_path, default=".guest", help="folder with the guest's parts")
    group.addoption("--ovmf", type=_path, help="an AmdSev build of OVMF to use instead of the folder's")
    group.addoption("--qemu", type=_path, help="the real QEMU to use instead of the one on the PATH")
    group.addoption("--efi-secret", action="store_true", help="let the guest read its secrets through efi_secret")
    group.addoption("--builtin", action="store_true", help="use the stand-in machine, which runs no kernel")


def _path(text: str) -> Path:
    # The agent takes no other; and its machines run in folders of their own.
    return Path(text).absolute()


def pytest_configure(config: pytest.Config) -> None:
    # What ends a run in CI, or by `timeout`, ends it as Ctrl-C does: with every machine and folder that it has made.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    if hasattr(config, "workerinput"):
        return
    _check_named(config)
    config.stash[_FOLDER] = leftovers.begin()
    config.stash[_TABLE] = table = Table()
    config.pluginmanager.register(table)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Give the test its row, which is in the table whether or not the test comes to run."""
    mark = item.get_closest_marker("scenario")
    assert mark is not None, "a test of the end-to-end run names its scenario"
    name, verdict = mark.args
    callspec = getattr(item, "callspec", None)
    row = Row(name=name.format(**(callspec.params if callspec else {})), verdict=verdict)
    item.stash[_ROW] = row
    _note(item, row)


def _note(item: pytest.Item, row: Row) -> None:
    item.user_properties[:] = [(PROPERTY, row.properties())]


def _interrupt(number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt(f"signal {number}")


def _check_named(config: pytest.Config) -> None:
    """Refuse a part that was named and cannot be used: skipping everything would look like success."""
    qemu, ovmf = config.getoption("--qemu"), config.getoption("--ovmf")
    if qemu is not None and not os.access(qemu, os.X_OK):
        raise pytest.UsageError(f"--qemu {qemu}: there is no such program")
    if ovmf is not None and not is_amdsev(ovmf):
        raise pytest.UsageError(f"--ovmf {ovmf}: is no firmware with places for secrets and kernel hashes")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """See that nothing is left; a run that leaves something has failed."""
    # Last of all: pytest-xdist has ended its workers by now.
    if (folder := session.config.stash.get(_FOLDER, None)) is not None:
        session.config.stash[_LEFT] = left = leftovers.end(folder)
        table = session.config.stash[_TABLE]
        # A run that has shown nothing has not passed.
        if left or (table.rows and not any(row.outcome == "passed" for row in table.rows)):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    table = config.stash.get(_TABLE, None)
    if table is not None and table.rows:
        terminalreporter.section("what was seen in the guests")
        for line in table.lines():
            terminalreporter.line(line)
        for reason in table.skipped:
            terminalreporter.line(f"not shown: {reason}", yellow=True)
    for what in config.stash.get(_LEFT, []):
        terminalreporter.line(f"LEFT BEHIND: {what}", red=True)


@pytest.fixture(scope="session")
def bench(pytestconfig: pytest.Config) -> Iterator[Bench]:
    """This worker's stack."""
    with tempfile.TemporaryDirectory(prefix="parts-") as folder:
        try:
            parts = gathered(pytestconfig, Path(folder))
        except Missing as missing:
            pytest.skip(str(missing))
        with running_bench(parts) as running:
            yield running


@pytest.fixture(autouse=True)
def _no_guest_has_what_is_not_its_own(bench: Bench) -> Iterator[None]:
    """After every scenario, whatever it looked at itself: nobody booted or read anything that it was not to."""
    bench.forget()
    yield
    wrongs = bench.wrongs()
    bench.forget()
    assert not wrongs, "; ".join(wrongs)


@pytest.fixture
async def scene(
    bench: Bench, _no_guest_has_what_is_not_its_own: None, request: pytest.FixtureRequest
) -> AsyncIterator[Scene]:
    """The scenario that the test's mark names, with both services in reach."""
    row = request.node.stash[_ROW]
    async with sides(bench.stack) as reached:
        scene = Scene(bench=bench, sides=reached, row=row)
        yield scene
        with contextlib.suppress(OSError):
            await scene.end()
    _note(request.node, row)


def accepted(name: str) -> pytest.MarkDecorator:
    """A scenario that must end with an attested guest; its parameters may stand in the name as `{parameter}`."""
    return pytest.mark.scenario(name, "accepted")


def refused(name: str) -> pytest.MarkDecorator:
    """A scenario in which no guest may get a secret."""
    return pytest.mark.scenario(name, "refused")
