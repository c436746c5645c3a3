"""QEMU's monitor over a fake that misbehaves: every case ends in a typed error, in time, with nothing left behind."""

from __future__ import annotations

import asyncio
import errno
import json
import socket
from pathlib import Path
from typing import Any

import pytest

from common.errors import OutcomeUnknown, PlatformFailed, Reason, Refused, SevattestError, Unavailable
from host_agent.hypervisors.qmp import COMMANDS, IRREVERSIBLE, monitor
from tests.support.agent import Script, open_descriptors
from tests.support.fake_monitor import GREETING, LONG, SHORT, SOCKET, qemu, script, session
from tests.support.stages import short_folder

__all__ = ["qemu", "script"]  # fixtures


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
