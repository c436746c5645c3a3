"""Connections to a monitor: within a time limit, whatever it says or does not, and nothing of them is left."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path

import pytest

from common.errors import Unavailable
from common.rpc.steps import drain
from host_agent.hypervisors import qmp
from host_agent.hypervisors.qmp import is_taken, listening_pid, monitor
from tests.support.agent import Script, open_descriptors
from tests.support.eventually import until
from tests.support.fake_monitor import GREETING, LONG, SHORT, SOCKET, TOLERANCE, qemu, script, session
from tests.support.stages import short_folder

__all__ = ["qemu", "script"]  # fixtures


@pytest.mark.parametrize("mute", ["silence", "close", "garbage"])
async def test_a_monitor_that_does_not_greet_is_unavailable(qemu: Script, mute: str) -> None:
    qemu.set(mute=mute)
    with pytest.raises(Unavailable):
        async with session(qemu, SHORT if mute == "silence" else LONG):
            pass


@asynccontextmanager
async def a_monitor_that_loses_clients(folder: Path, losses: list[str]) -> AsyncIterator[list[str]]:
    """A monitor as QEMU's is while a client is still leaving, one loss after the other; then an honest one."""
    heard: list[str] = []
    lost = iter(losses)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        loss = next(lost, "none")
        if loss != "sent away":
            writer.write(json.dumps(GREETING).encode() + b"\n")
        decoder, text = json.JSONDecoder(), ""
        while loss != "sent away" and (part := await reader.read(4096)):
            if loss == "not heard":
                continue
            request, end = decoder.raw_decode(text := (text + part.decode()).lstrip())
            text = text[end:]
            heard.append(request["execute"])
            name = {"id": request["id"]} if "id" in request else {}  # the library's negotiation has none
            writer.write(json.dumps({"return": {}, **name}).encode() + b"\n")
        writer.close()

    async with await asyncio.start_unix_server(serve, folder / "q"):
        yield heard


@pytest.mark.parametrize(
    "losses", [["sent away"], ["not heard"], ["sent away", "not heard", "sent away"], ["sent away"] * 4]
)
async def test_a_client_that_is_lost_behind_the_one_before_begins_again(losses: list[str]) -> None:
    before = open_descriptors()
    with short_folder() as folder:
        async with a_monitor_that_loses_clients(folder, losses) as heard, monitor(folder, "q", limit=LONG) as connected:
            assert await connected.execute("cont") == {}
        assert heard == ["qmp_capabilities", "cont"]
    assert open_descriptors() == before


async def test_one_that_is_always_lost_is_told_so_and_has_said_nothing() -> None:
    with short_folder() as folder:
        async with a_monitor_that_loses_clients(folder, ["sent away"] * 100) as heard:
            with pytest.raises(Unavailable, match="closed before its greeting"):
                async with monitor(folder, "q", limit=LONG):
                    pass
            with pytest.raises(Unavailable):
                async with monitor(folder, "q", limit=SHORT):
                    pass
        assert heard == []


async def who_listens(folder: Path) -> None:
    assert await listening_pid(folder, "q", limit=LONG) == os.getpid()


async def whether_it_is_taken(folder: Path) -> None:
    assert await is_taken(folder, "q")


async def another_than_expected(folder: Path) -> None:
    with pytest.raises(Unavailable, match="another process"):
        async with monitor(folder, "q", limit=LONG, listener=1):
            pass


@pytest.mark.parametrize("ask", [who_listens, whether_it_is_taken, another_than_expected])
@pytest.mark.parametrize("greeting", [b"{", b""], ids=["greets", "says nothing"])
async def test_who_only_asks_who_listens_does_not_leave_before_the_greeting(
    ask: Callable[[Path], Awaitable[None]], greeting: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qmp, "_GREETS", 1.0 if not greeting else LONG)
    with short_folder() as folder:
        async with a_monitor_that_is_starting(folder, 0.05, greeting) as left:
            await ask(folder)
            await until(lambda: bool(left))
    assert left == [True]  # and not before the greeting


@asynccontextmanager
async def a_monitor_that_is_starting(folder: Path, seconds: float, greeting: bytes) -> AsyncIterator[list[bool]]:
    """A monitor that greets late; of each client, whether it stayed until then."""
    left: list[bool] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with closing(writer), suppress(ConnectionError):
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await reader.read(1)
                    left.append(False)
                    return
            writer.write(greeting)
            await reader.read(1)
            left.append(True)

    async with await asyncio.start_unix_server(serve, folder / "q"):
        yield left


@asynccontextmanager
async def a_monitor_that_says(folder: Path, *parts: bytes) -> AsyncIterator[list[float]]:
    """A monitor that says this to each client, a second part again and again, and hears nothing; when each came."""
    came: list[float] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        came.append(asyncio.get_running_loop().time())
        first, *rest = parts
        with closing(writer), suppress(ConnectionError):
            writer.write(first)
            while rest:
                writer.write(rest[0])
                await writer.drain()
                await asyncio.sleep(0)
            await reader.read()

    async with await asyncio.start_unix_server(serve, folder / "q"):
        yield came


HOSTILE = {
    "silence": [b""],
    "a greeting and silence": [json.dumps(GREETING).encode() + b"\n"],
    "a greeting without end": [b'{"QMP": "', b"x" * (1 << 16)],
    "a greeting in drops": [b'{"QMP": "', b"x"],
    "greetings without end": [b"", json.dumps(GREETING).encode() + b"\n"],
    "a greeting and events": [json.dumps(GREETING).encode() + b"\n", b'{"event": "STOP"}\n'],
    "white space without end": [b"", b" " * (1 << 16)],
    "empty lines without end": [b"", b"\n"],
    "half a greeting and silence": [b'{"QMP": '],
}


@pytest.mark.parametrize("first", [0.001, 1.0], ids=["five attempts", "one attempt"])
@pytest.mark.parametrize("said", HOSTILE)
async def test_whatever_a_hostile_monitor_says_the_time_limit_is_kept_and_nothing_is_left(
    said: str, first: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qmp, "_FIRST_ATTEMPT", first)
    monkeypatch.setattr(qmp, "_RETRY", 0.001)
    clock = asyncio.get_running_loop().time
    before = open_descriptors()
    # Long enough for five attempts on any machine.
    limit = 1.0 if said.endswith("silence") and first < SHORT else SHORT
    with short_folder() as folder:
        async with a_monitor_that_says(folder, *HOSTILE[said]) as came:
            begun = clock()
            with pytest.raises(Unavailable):
                async with monitor(folder, "q", limit=limit):
                    pass
            took = clock() - begun
        # It may give up before, where what it hears is not QMP.
        assert took < limit + TOLERANCE
        if said.endswith("silence"):
            assert took > limit - 0.03
            assert len(came) == (5 if first < SHORT else 1)
        else:
            assert 1 <= len(came) <= 5
    await until(lambda: open_descriptors() <= before)


@pytest.mark.parametrize("late", ["greeting", "answer"])
async def test_the_last_attempt_has_all_the_time_that_is_left(late: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmp, "_FIRST_ATTEMPT", 0.005)
    greet, answer = json.dumps(GREETING).encode() + b"\n", b'{"return": {}}\n'
    clients = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal clients
        clients += 1
        is_last = clients == 5
        with closing(writer):
            writer.write(greet if late == "answer" else b"")
            if is_last:
                await asyncio.sleep(0.5)  # far longer than any attempt before had
                writer.write(answer if late == "answer" else greet + answer)
            with suppress(ConnectionError):
                await reader.read()

    with short_folder() as folder:
        async with await asyncio.start_unix_server(serve, folder / "q"), monitor(folder, "q", limit=LONG):
            pass
    assert clients == 5


@pytest.mark.parametrize("losses", [[], ["sent away"], ["not heard"]])
async def test_a_step_that_is_cancelled_at_any_moment_ends_there_and_leaves_no_connection(
    losses: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qmp, "_FIRST_ATTEMPT", 0.01)
    monkeypatch.setattr(qmp, "_RETRY", 0.001)
    moments = 0
    before = open_descriptors()

    async def step(folder: Path) -> None:
        async with monitor(folder, "q", limit=LONG) as connected:
            await connected.execute("query-status")
        done.set()
        await asyncio.Event().wait()

    done = asyncio.Event()
    while not done.is_set():
        moments += 1 + moments // 16  # the first ones one by one
        with short_folder() as folder:
            async with a_monitor_that_loses_clients(folder, losses):
                task = asyncio.create_task(step(folder))
                for _ in range(moments):
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.wait({task}, timeout=LONG)
                assert task.cancelled()
        await until(lambda: open_descriptors() <= before)
        await drain()
    assert moments > 20


async def test_a_second_client_is_told_in_time_that_it_hears_nothing(qemu: Script) -> None:
    async with session(qemu):
        with pytest.raises(Unavailable, match="does not greet"):
            async with session(qemu, SHORT):
                pass
    async with session(qemu) as connected:
        assert isinstance(await connected.execute("query-sev"), dict)


def fill_backlog(folder: Path) -> list[socket.socket]:
    """Connect until the kernel says that the backlog is full."""
    directory = os.open(folder, os.O_PATH)
    waiting: list[socket.socket] = []
    try:
        while True:
            client = socket.socket(socket.AF_UNIX)
            waiting.append(client)
            client.settimeout(0)
            client.connect(f"/proc/self/fd/{directory}/{SOCKET}")
    except BlockingIOError:
        return waiting
    finally:
        os.close(directory)


async def test_a_full_backlog_is_waited_for_until_the_limit(qemu: Script) -> None:
    async with session(qemu):
        waiting = fill_backlog(qemu.path.parent)
        try:
            with pytest.raises(Unavailable, match="takes no connection"):
                async with session(qemu, SHORT):
                    pass
        finally:
            for client in waiting:
                client.close()


async def test_a_socket_that_is_not_there_is_unavailable(script: Script) -> None:
    with pytest.raises(Unavailable, match="cannot be reached"):
        async with monitor(script.path.parent, SOCKET, limit=LONG):
            pass


async def test_a_stale_socket_is_unavailable(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(script.path.parent)
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(SOCKET)
    with pytest.raises(Unavailable, match="refused"):
        async with monitor(script.path.parent, SOCKET, limit=LONG):
            pass


async def test_a_listener_of_another_user_is_refused(qemu: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    other = os.geteuid() + 1
    async with session(qemu):
        pass
    monkeypatch.setattr(os, "geteuid", lambda: other)
    with pytest.raises(Unavailable, match="another user"):
        async with session(qemu):
            pass


async def test_a_step_that_is_cancelled_leaves_no_connection(qemu: Script) -> None:
    qemu.set(on={"query-status": [{"do": "silence"}]})

    async def step() -> None:
        async with session(qemu) as connected:
            await connected.execute("query-status")

    task = asyncio.create_task(step())
    await until(lambda: qemu.commands("query-status"))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with session(qemu) as connected:
        assert isinstance(await connected.execute("query-sev"), dict)


@pytest.mark.slow
async def test_a_thousand_connections_leave_no_descriptor_no_thread_and_no_task(qemu: Script) -> None:
    async with session(qemu):
        pass
    evil = ["close", "cut", "deep", "text"]
    qemu.set(on={"query-sev": [{"do": evil[turn % 4], "text": "[]"} for turn in range(334)]})
    before = open_descriptors(), threading.active_count(), len(asyncio.all_tasks())
    for number in range(1000):
        try:
            async with session(qemu) as connected:
                await connected.execute("query-sev" if number % 3 == 0 else "query-status")
        except Unavailable:
            assert number % 3 == 0
    assert (open_descriptors(), threading.active_count(), len(asyncio.all_tasks())) == before
