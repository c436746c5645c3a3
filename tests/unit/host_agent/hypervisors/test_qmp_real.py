"""The agent's monitor client against real QEMUs: what real-guest.md saw by hand, seen by the client.

Without SEV: QEMU 7.2 and one from 9.1 on, paused, with nothing in them. What a launch's commands answer is the fakes'
business; here it is the channel.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from common.errors import OutcomeUnknown, PlatformFailed, Unavailable
from host_agent.hypervisors import qapi
from host_agent.hypervisors.base import SevState
from host_agent.hypervisors.qmp import MonitorSession, is_taken, listening_pid, monitor
from tests.support.agent import alive, open_descriptors
from tests.support.eventually import until, wait_until
from tests.support.qmp import QmpClient, is_listening
from tests.support.real_qemu import EACH_QEMU, qemu, version_of
from tests.support.stages import short_folder

__all__ = ["qemu"]  # a fixture
pytestmark = EACH_QEMU
SOCKET = "q"
LONG, SHORT = 20.0, 0.5


@pytest.fixture
def machine(qemu: str) -> Iterator[tuple[Path, subprocess.Popen[bytes]]]:
    """A paused machine and the folder of its monitor, to which nobody has come yet.

    One that asks whether it is there may be the end of a QEMU that is starting, or of the client that comes next.
    """
    with short_folder() as folder:
        words = ["-nodefaults", "-no-user-config", "-machine", "none", "-display", "none", "-S"]
        process = subprocess.Popen([qemu, *words, "-qmp", f"unix:{folder / SOCKET},server=on,wait=off"])
        try:
            wait_until(lambda: is_listening(folder / SOCKET) or process.poll() is not None)
            assert process.poll() is None
            yield folder, process
        finally:
            process.kill()
            process.wait()


@asynccontextmanager
async def patient(folder: Path, *, listener: int | None = None) -> AsyncIterator[MonitorSession]:
    """A monitor, asked again as the agent does: QEMU may reset who comes while the client before is still leaving."""
    ends = asyncio.get_running_loop().time() + LONG
    async with AsyncExitStack() as stack:
        while True:
            try:
                session = await stack.enter_async_context(monitor(folder, SOCKET, limit=LONG, listener=listener))
                break
            except Unavailable:
                if asyncio.get_running_loop().time() > ends:
                    raise
                await asyncio.sleep(0.05)
        yield session


async def test_it_says_how_it_stands_whatever_its_version(
    qemu: str, machine: tuple[Path, subprocess.Popen[bytes]]
) -> None:
    async with patient(machine[0]) as session:
        status = await session.execute("query-status")
        sev = await session.execute("query-sev")
    assert isinstance(sev, dict)
    assert isinstance(status, dict)
    # 9.1 made a union of query-sev, and 10 dropped a member of query-status.
    assert ("sev-type" in sev) == (version_of(qemu) >= (9, 1))
    assert ("singlestep" in status) == (version_of(qemu) < (8, 1))
    seen = qapi.inspection(status, sev)
    assert (seen.enabled, seen.running, seen.status, seen.state) == (False, False, "prelaunch", SevState.UNINIT)
    assert not seen.is_paused
    assert not seen.has_run


@pytest.mark.parametrize(
    ("command", "arguments", "words"),
    [
        ("query-sev-launch-measure", None, "SEV launch measurement is not available"),
        ("query-sev-capabilities", None, "not enabled"),
        ("query-sev-attestation-report", {"mnonce": ""}, "not enabled"),
        ("sev-inject-launch-secret", {}, "'packet-header' is missing"),
        ("sev-inject-launch-secret", {"packet-header": "AA==", "secret": "AA=="}, "not enabled"),
        ("sev-inject-launch-secret", {"packet-header": 1, "secret": "AA=="}, "packet-header"),
    ],
)
async def test_its_refusals_are_told_in_its_words_and_break_nothing(
    machine: tuple[Path, subprocess.Popen[bytes]], command: str, arguments: dict[str, object] | None, words: str
) -> None:
    async with patient(machine[0]) as session:
        with pytest.raises(PlatformFailed, match=words):
            await session.execute(command, arguments)
        assert isinstance(await session.execute("query-status"), dict)


async def test_an_event_that_comes_before_the_answer_is_not_taken_for_it(
    machine: tuple[Path, subprocess.Popen[bytes]],
) -> None:
    async with patient(machine[0]) as session:
        assert await session.execute("cont") == {}
        status = await session.execute("query-status")
        assert isinstance(status, dict)
        assert status["running"]


async def test_a_guest_that_somebody_else_resumed_is_seen_to_run(
    machine: tuple[Path, subprocess.Popen[bytes]],
) -> None:
    with QmpClient(machine[0] / SOCKET) as other:
        other.negotiate()
        other.ask("cont")
    async with patient(machine[0]) as session:
        seen = qapi.inspection(await session.execute("query-status"), await session.execute("query-sev"))
    assert seen.has_run


async def test_a_second_client_hears_nothing_and_is_told_so_in_time(
    machine: tuple[Path, subprocess.Popen[bytes]],
) -> None:
    async with patient(machine[0]) as session:
        with pytest.raises(Unavailable, match=r"does not greet|closed before its greeting"):
            async with monitor(machine[0], SOCKET, limit=SHORT):
                pass
        # The one that gave up did not disturb the one that is there.
        assert isinstance(await session.execute("query-status"), dict)
    async with patient(machine[0]) as session:
        assert isinstance(await session.execute("query-status"), dict)


async def test_who_listens_is_known_without_a_word(machine: tuple[Path, subprocess.Popen[bytes]]) -> None:
    folder, process = machine
    assert await listening_pid(folder, SOCKET, limit=LONG) == process.pid
    assert await is_taken(folder, SOCKET)
    async with patient(folder, listener=process.pid) as session:
        # Also while another client has it.
        assert await listening_pid(folder, SOCKET, limit=LONG) == process.pid
        assert isinstance(await session.execute("query-status"), dict)
    with pytest.raises(Unavailable, match="another process than the machine"):
        async with monitor(folder, SOCKET, limit=LONG, listener=os.getpid()):
            pass


@pytest.mark.parametrize(
    ("command", "kind"), [("query-status", Unavailable), ("cont", OutcomeUnknown)], ids=["looks", "changes"]
)
async def test_a_machine_that_stands_still_is_given_up_in_time_and_its_late_answer_reaches_nobody(
    machine: tuple[Path, subprocess.Popen[bytes]], command: str, kind: type[Exception]
) -> None:
    folder, process = machine
    async with patient(folder) as session:
        session._limit = SHORT
        os.kill(process.pid, signal.SIGSTOP)
        began = asyncio.get_running_loop().time()
        with pytest.raises(kind):
            await session.execute(command)
        assert asyncio.get_running_loop().time() - began < LONG
    os.kill(process.pid, signal.SIGCONT)
    async with patient(folder) as session:
        assert isinstance(await session.execute("query-sev"), dict)


@pytest.mark.parametrize(
    ("command", "kind"), [("query-status", Unavailable), ("cont", OutcomeUnknown)], ids=["looks", "changes"]
)
async def test_a_machine_that_is_killed_under_a_command_is_no_answer(
    machine: tuple[Path, subprocess.Popen[bytes]], command: str, kind: type[Exception]
) -> None:
    folder, process = machine
    async with patient(folder) as session:
        os.kill(process.pid, signal.SIGSTOP)
        step = asyncio.create_task(session.execute(command))
        await until(session._client._outgoing.empty)
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(kind):
            await step
        process.wait()
    # What it leaves is a socket that refuses.
    assert (folder / SOCKET).exists()
    assert not await is_taken(folder, SOCKET)
    with pytest.raises(Unavailable, match="refused"):
        async with monitor(folder, SOCKET, limit=LONG):
            pass


@pytest.mark.parametrize("_turn", range(5))
async def test_a_machine_that_ends_is_the_end_of_the_connection_and_no_other_error(
    machine: tuple[Path, subprocess.Popen[bytes]], _turn: int
) -> None:
    # A client whose last line QEMU has not read gets ECONNRESET, mostly; another one the end of the file.
    folder, process = machine
    async with patient(folder) as session:
        # QEMU may hang in its own end when a command comes in while it ends: then it says nothing any more.
        session._limit = 2
        os.kill(process.pid, signal.SIGTERM)
        with pytest.raises(Unavailable):
            await _ask_until_it_ends(session)
    process.kill()


async def _ask_until_it_ends(session: MonitorSession) -> None:
    while True:
        await session.execute("query-status")


@pytest.mark.slow
async def test_a_thousand_connections_leave_no_descriptor_no_thread_and_no_task(
    machine: tuple[Path, subprocess.Popen[bytes]],
) -> None:
    folder, process = machine
    async with patient(folder):
        pass

    def held() -> tuple[int, int, int]:
        return open_descriptors(), threading.active_count(), len(asyncio.all_tasks())

    before = held()
    its = descriptors_of(process.pid)
    for number in range(1000):
        async with patient(folder) as session:
            if number % 2:
                await session.execute("query-status")
            else:
                with pytest.raises(PlatformFailed):
                    await session.execute("query-sev-launch-measure")
    assert held() == before
    assert alive(process.pid)
    await until(lambda: descriptors_of(process.pid) <= its)


def descriptors_of(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))
