"""The relay's part of a launch: what is replaced, what is held back, and what is never passed on."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from emulator.front.channels import Client
from emulator.front.relay import Message, Relay


class Launch:
    """Answers with what the real QEMU said, and `finish` as it was told to."""

    def __init__(self, *, finishes: bool = True) -> None:
        self.runs = False
        self.replies: list[Message] = []
        self._finishes = finishes

    async def finish(self) -> bool:
        self.runs = True
        return self._finishes

    async def answer(self, command: str, arguments: dict[str, Any], reply: Message) -> Message:
        self.replies.append(reply)
        return reply if "error" in reply else {"return": {"asked": command, "with": arguments}}


@asynccontextmanager
async def conversation(launch: Launch) -> AsyncIterator[tuple[Client, Client]]:
    """A client and a machine with the relay between them."""
    pairs = [socket.socketpair() for _ in range(2)]
    (client, near), (machine, far) = [
        [Client(*await asyncio.open_connection(sock=end)) for end in pair] for pair in pairs
    ]
    relay = asyncio.create_task(Relay(launch, near, machine, pretty=False).run())
    try:
        async with asyncio.timeout(30):
            yield client, far
    finally:
        for end in (client, far, near):
            end.writer.close()
        await relay


async def one(machine: Client) -> dict[str, Any]:
    """The next line that the machine hears."""
    message: dict[str, Any] = json.loads(await machine.reader.readline())
    return message


async def nothing_more(reader: asyncio.StreamReader) -> bool:
    """Whether nothing is there, after all that could have come has had its turns."""
    for _ in range(20):
        await asyncio.sleep(0)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(reader.read(1), 0.05)
    return True


async def test_an_answer_is_replaced_among_the_events_of_its_moment() -> None:
    launch = Launch()
    async with conversation(launch) as (client, machine):
        client.writer.write(b'{"execute": "query-sev", "id": 7}{"execute": "query-name"}\n')
        asked = await one(machine)
        assert asked["execute"] == "query-sev"
        assert await nothing_more(machine.reader)  # what follows waits
        machine.writer.write(
            b'{"event": "A"}\r\n{"return": {}, "id": "%s"}\r\n{"event": "B"}\r\n' % asked["id"].encode()
        )
        lines = [json.loads(await client.reader.readline()) for _ in range(3)]
        assert lines == [
            {"event": "A"},
            {"return": {"asked": "query-sev", "with": {}}, "id": 7},
            {"event": "B"},
        ]
        assert await machine.reader.readuntil(b"\n") == b'{"execute": "query-name"}\n'


async def test_an_error_keeps_the_clients_id_in_front() -> None:
    async with conversation(Launch()) as (client, machine):
        client.writer.write(b'{"execute": "query-sev", "id": "x"}')
        asked = await one(machine)
        machine.writer.write(b'{"id": "%s", "error": {"class": "C", "desc": "d"}}\r\n' % asked["id"].encode())
        assert await client.reader.readline() == b'{"id": "x", "error": {"class": "C", "desc": "d"}}\r\n'


async def test_a_client_that_guesses_at_our_ids_is_passed_on() -> None:
    async with conversation(Launch()) as (client, machine):
        client.writer.write(b'{"execute": "query-name", "id": "sevattest-0123456789abcdef"}\n')
        line = await machine.reader.readline()
        assert line == b'{"execute": "query-name", "id": "sevattest-0123456789abcdef"}\n'
        machine.writer.write(b'{"return": {}, "id": "sevattest-0123456789abcdef"}\r\n')
        assert await client.reader.readline() == b'{"return": {}, "id": "sevattest-0123456789abcdef"}\r\n'


async def test_cont_reaches_the_machine_after_the_launch_is_finished_and_only_then() -> None:
    launch = Launch()
    async with conversation(launch) as (client, machine):
        client.writer.write(b'{"execute": "cont", "id": 1}')
        asked = await one(machine)
        assert (asked["execute"], launch.runs) == ("query-version", False)
        assert await nothing_more(machine.reader)
        machine.writer.write(b'{"return": {}, "id": "%s"}\r\n' % asked["id"].encode())
        assert await machine.reader.readexactly(28) == b'{"execute": "cont", "id": 1}'
        assert launch.runs
        client.writer.write(b'{"execute": "cont", "id": 2}')
        assert await machine.reader.readexactly(28) == b'{"execute": "cont", "id": 2}'
        assert await nothing_more(client.reader)  # of our own question nothing is heard


async def test_a_launch_that_cannot_be_finished_keeps_cont_from_the_machine() -> None:
    async with conversation(Launch(finishes=False)) as (client, machine):
        client.writer.write(b'{"execute": "cont"}{"execute": "query-name"}')
        asked = await one(machine)
        machine.writer.write(b'{"return": {}, "id": "%s"}\r\n' % asked["id"].encode())
        assert await nothing_more(machine.reader)


async def test_a_client_that_has_not_negotiated_finishes_nothing() -> None:
    launch = Launch()
    async with conversation(launch) as (client, machine):
        client.writer.write(b'{"execute": "cont"}')
        asked = await one(machine)
        machine.writer.write(
            b'{"id": "%s", "error": {"class": "CommandNotFound", "desc": "d"}}\r\n' % asked["id"].encode()
        )
        assert await machine.reader.readexactly(19) == b'{"execute": "cont"}'
        assert not launch.runs
