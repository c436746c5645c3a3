"""QEMU's monitor over a fake that misbehaves: every case ends in a typed error, in time, with nothing left behind."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path
from typing import Any

import pytest

from common.errors import OutcomeUnknown, PlatformFailed, Reason, Refused, SevattestError, Unavailable
from common.rpc.steps import drain
from host_agent.hypervisors import qmp
from host_agent.hypervisors.qmp import COMMANDS, IRREVERSIBLE, MonitorSession, listening_pid, monitor
from tests.support import fake_qemu
from tests.support.agent import Script, open_descriptors
from tests.support.eventually import until
from tests.support.stages import short_folder

SOCKET = "qmp.sock"
GREETING = {"QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 7}, "package": ""}, "capabilities": []}}
LONG = 20.0
SHORT = 0.3
TOLERANCE = 10.0  # of a loaded machine
ARGUMENTS = ["-object", "sev-guest,id=sev0,policy=0x1", "-qmp", f"unix:{SOCKET},server=on,wait=off"]


@pytest.fixture
def script(tmp_path: Path) -> Script:
    # Far deeper than a socket's address can be.
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    return Script(folder / "script.json")


@pytest.fixture
def qemu(script: Script) -> Iterator[Script]:
    with subprocess.Popen(
        [sys.executable, "-ISE", fake_qemu.__file__, str(script.path), *ARGUMENTS], cwd=script.path.parent
    ) as process:
        try:
            yield script
        finally:
            process.kill()


@asynccontextmanager
async def session(script: Script, limit: float = LONG) -> AsyncIterator[MonitorSession]:
    """A connection, once the program listens."""
    await until(lambda: any("listening" in entry for entry in script.journal))
    async with monitor(script.path.parent, SOCKET, limit=limit) as connected:
        yield connected


async def test_a_command_has_its_answer(qemu: Script) -> None:
    async with session(qemu) as connected:
        assert await connected.execute("query-status") == {"status": "prelaunch", "singlestep": False, "running": False}


async def test_only_the_agents_commands_can_be_said(qemu: Script) -> None:
    async with session(qemu) as connected:
        for command in ("human-monitor-command", "system_reset", "quit", "stop", "device_add", "qmp_capabilities", ""):
            with pytest.raises(ValueError, match="not a command"):
                await connected.execute(command)
    assert [entry["execute"] for entry in qemu.journal if "execute" in entry] == ["qmp_capabilities"]


async def test_the_list_of_commands_is_short() -> None:
    assert len(COMMANDS) == 7
    assert IRREVERSIBLE <= COMMANDS


@pytest.mark.parametrize(
    "action",
    [{"do": "events", "count": 100}, {"do": "split"}, {"do": "twice"}],
    ids=lambda action: action["do"],
)
async def test_an_odd_but_honest_monitor_is_understood(qemu: Script, action: dict[str, object]) -> None:
    qemu.set(on={"query-status": [action]})
    async with session(qemu) as connected:
        for _ in range(2):
            answer = await connected.execute("query-status")
            assert isinstance(answer, dict)
            assert answer["status"] == "prelaunch"


async def test_events_that_nobody_reads_are_not_kept(qemu: Script) -> None:
    qemu.set(on={"query-status": [{"do": "events", "count": 1000}]})
    async with session(qemu) as connected:
        await connected.execute("query-status")
        assert connected._client.events.empty()


async def test_a_process_that_is_out_of_descriptors_loses_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    before = open_descriptors()
    with monkeypatch.context() as patch:
        patch.setattr(socket, "socket", none_left)
        with pytest.raises(Unavailable):
            async with monitor(tmp_path, SOCKET, limit=LONG):
                pass
    assert open_descriptors() == before


BROKEN: list[dict[str, Any]] = [
    {"do": "close"},
    {"do": "cut"},
    {"do": "silence"},
    {"do": "wrong_id"},
    {"do": "text", "text": "hello"},
    {"do": "text", "text": "[]"},
    {"do": "text", "text": '{"error": {"class": "GenericError", "desc": "JSON parse error"}}'},
    {"do": "text", "text": '{"return": {}}'},
    {"do": "text", "text": '{"id": "$ID"}'},
    {"do": "text", "text": '{"id": "$ID", "error": "no"}'},
    {"do": "text", "text": '{"return": ' + "1" * 5000 + "}"},
    {"do": "long", "size": 2 << 20},
    {"do": "deep"},
]


@pytest.mark.parametrize("action", BROKEN, ids=[f"{a['do']}-{str(a.get('text', ''))[:16]}" for a in BROKEN])
@pytest.mark.parametrize(
    ("command", "kind"),
    [("query-status", Unavailable), ("cont", OutcomeUnknown), ("sev-inject-launch-secret", OutcomeUnknown)],
)
async def test_a_dishonest_monitor_ends_in_a_typed_error_and_the_connection_is_not_used_again(
    qemu: Script, action: dict[str, object], command: str, kind: type[SevattestError]
) -> None:
    qemu.set(on={command: [action]})
    limit = SHORT if action["do"] in {"silence", "wrong_id", "text"} else LONG
    async with session(qemu) as connected:
        connected._limit = limit
        with pytest.raises(kind):
            await connected.execute(command)
        with pytest.raises(ValueError, match="not used again"):
            await connected.execute("query-status")
    async with session(qemu) as connected:
        assert isinstance(await connected.execute("query-status"), dict)


async def test_an_answer_after_the_time_limit_reaches_nobody(qemu: Script) -> None:
    qemu.set(on={"query-status": [{"do": "silence"}]})
    async with session(qemu) as connected:
        connected._limit = SHORT
        with pytest.raises(Unavailable, match="no answer"):
            await connected.execute("query-status")
    async with session(qemu) as connected:
        assert await connected.execute("query-sev-launch-measure") != {}


@pytest.mark.parametrize("command", ["cont", "sev-inject-launch-secret", "query-status"])
async def test_an_answer_that_is_late_by_a_connection_is_not_believed(command: str) -> None:
    asked: list[object] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Keep the first client's answers for the second, which is refused what it asks."""
        late = [{"id": number, "return": {}} for number in asked]
        writer.write(json.dumps(GREETING).encode() + b"\r\n")
        while line := await reader.read(1 << 16):  # one message: the library waits for each answer
            message = json.loads(line)
            if message["execute"] == "qmp_capabilities":
                answers: list[object] = [{"return": {}}]
            else:
                asked.append(message["id"])
                answers = [*late, {"id": message["id"], "error": {"class": "GenericError", "desc": "no"}}]
                if not late:
                    break
            writer.write(b"".join(json.dumps(answer).encode() + b"\r\n" for answer in answers))
        writer.close()

    with short_folder() as folder:
        async with await asyncio.start_unix_server(serve, folder / SOCKET):
            async with monitor(folder, SOCKET, limit=LONG) as connected:
                with pytest.raises((OutcomeUnknown, Unavailable)):
                    await connected.execute(command)
            async with monitor(folder, SOCKET, limit=LONG) as connected:
                with pytest.raises(PlatformFailed, match=f"the machine refused {command}: no"):
                    await connected.execute(command)
    assert len(asked) == len(set(asked)) == 2


async def test_an_error_is_told_in_qemus_words(qemu: Script) -> None:
    qemu.set(on={"query-sev": [{"do": "error", "desc": "KVM not enabled\nat all"}]})
    async with session(qemu) as connected:
        with pytest.raises(PlatformFailed, match="the machine refused query-sev: KVM not enabled at all") as failure:
            await connected.execute("query-sev")
        assert failure.value.reason is Reason.HYPERVISOR_FAILED
        # An answered error breaks nothing.
        assert isinstance(await connected.execute("query-sev"), dict)


async def test_a_firmware_status_in_qemus_words_is_understood(qemu: Script) -> None:
    words = "SEV: failed to inject secret ret=-5 fw_error=11 'Bad measurement'"
    qemu.set(on={"sev-inject-launch-secret": [{"do": "error", "desc": words}]})
    async with session(qemu) as connected:
        with pytest.raises(Refused) as failure:
            await connected.execute("sev-inject-launch-secret", {"packet-header": "", "secret": ""})
    assert failure.value.reason is Reason.FIRMWARE_BAD_MEASUREMENT
    assert failure.value.fields["fw_error"] == "11"


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


@pytest.mark.parametrize("greeting", [b"{", b""], ids=["greets", "says nothing"])
async def test_who_only_asks_who_listens_does_not_leave_before_the_greeting(
    greeting: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qmp, "_GREETS", 1.0 if not greeting else LONG)
    left: list[bool] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(0.05):  # a QEMU that is still starting
                left.append(not await reader.read(1))
        writer.write(greeting)
        left.append(not await reader.read(1))
        writer.close()

    with short_folder() as folder:
        async with await asyncio.start_unix_server(serve, folder / "q"):
            assert await listening_pid(folder, "q", limit=LONG) == os.getpid()
            await until(lambda: bool(left))
    assert left == [True]  # and not before the greeting


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
