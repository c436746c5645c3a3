"""One client's conversation with the real QEMU's monitor, passed on as it is, with our answers in their places.

How an answer gets into its place: the client's SEV command goes to the real QEMU too, under an id of ours. QEMU checks
its arguments and answers it in its turn, after the replies to all that came before and among the events of its moment.
That answer is then ours to replace: an error about the arguments is passed on in QEMU's own words, an error that says
"no SEV here" becomes what the software PSP answers. Until that is done nothing that follows is passed to QEMU, so that
a `cont` behind a secret never overtakes it.

`cont` itself is passed on as it is, after LAUNCH_FINISH, which QEMU runs before the first instruction of the guest.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeGuard

from emulator.front.channels import Client
from emulator.qmp_json import JsonStream, Stray, Value, dump

_CHUNK = 1 << 16

Message = dict[str, Any]


class SevSide(Protocol):
    """What the relay asks of whoever holds the launch."""

    @property
    def runs(self) -> bool:
        """Whether the launch is finished."""
        ...

    async def finish(self) -> bool:
        """LAUNCH_FINISH, before the machine runs; false: it must not."""
        ...

    async def answer(self, command: str, arguments: dict[str, Any], reply: Message) -> Message:
        """Our reply (`return` or `error` alone) in the place of the real QEMU's."""
        ...


# What a QEMU without SEV cannot answer.
SEV_COMMANDS = frozenset(
    {
        "query-sev",
        "query-sev-attestation-report",
        "query-sev-capabilities",
        "query-sev-launch-measure",
        "sev-inject-launch-secret",
    }
)


@dataclass
class _Pending:
    """A command of the client's that waits for the real QEMU's answer."""

    mark: str
    request: Message
    done: asyncio.Event = field(default_factory=asyncio.Event)


class Relay:
    """One client, from its greeting to the end of either side."""

    def __init__(self, sev: SevSide, client: Client, machine: Client, *, pretty: bool) -> None:
        self._sev = sev
        self._client = client
        self._machine = machine
        self._pretty = pretty
        self._pending: _Pending | None = None

    async def run(self) -> None:
        """Pass on both ways until the machine hangs up, as it does when it has answered a client that has."""
        questions = asyncio.create_task(_quietly(self._questions))
        answers = asyncio.create_task(_quietly(self._answers))
        try:
            await asyncio.wait({questions, answers}, return_when=asyncio.FIRST_COMPLETED)
            if questions.done():
                self._machine.writer.write_eof()
                await asyncio.wait({answers})
        finally:
            for task in (questions, answers):
                task.cancel()
            await asyncio.wait({questions, answers})
            self._machine.writer.close()
        for task in (questions, answers):
            if not task.cancelled():
                task.result()

    async def _questions(self) -> None:
        stream, held, passed = JsonStream(), bytearray(), 0
        while data := await self._client.reader.read(_CHUNK):
            held += data
            for found in stream.feed(data):
                size = stream.consumed - passed
                raw = bytes(held[:size])
                del held[:size]
                passed += size
                await self._question(found, raw)
            if held.isspace():
                await self._ask(bytes(held))
                passed += len(held)
                held.clear()
        await self._ask(bytes(held))

    async def _question(self, found: Value | Stray, raw: bytes) -> None:
        request = found.value if isinstance(found, Value) else None
        if not _is_command(request):
            return await self._ask(raw)
        pending = _Pending(f"sevattest-{secrets.token_hex(8)}", request)
        if request["execute"] in SEV_COMMANDS:
            await self._ask_marked(pending, raw, request)
            return None
        if request["execute"] == "cont" and not request.get("arguments") and not self._sev.runs:
            # Any command would do: its answer says that everything before it is done.
            await self._ask_marked(pending, raw, {"execute": "query-version"})
            raw = raw[raw.index(b"{") :]
        return await self._ask(raw)

    async def _ask_marked(self, pending: _Pending, raw: bytes, request: Message) -> None:
        self._pending = pending
        # What stands before the object is no part of it: garbage that QEMU's lexer skips, or blanks.
        await self._ask(raw[: raw.index(b"{")] + dump({**request, "id": pending.mark}))
        await pending.done.wait()

    async def _ask(self, data: bytes) -> None:
        self._machine.writer.write(data)
        await self._machine.writer.drain()

    async def _answers(self) -> None:
        async for raw in _messages(self._machine.reader):
            pending = self._pending
            if pending is not None and pending.mark.encode() in raw:
                reply = json.loads(raw)
                if reply.pop("id", None) == pending.mark:
                    self._pending = None
                    if await self._replace(pending, reply):
                        pending.done.set()
                    continue
            await self._tell(raw)

    async def _replace(self, pending: _Pending, reply: Message) -> bool:
        """Act on the real QEMU's answer to what was marked; false: nothing that follows is to reach it."""
        request = pending.request
        if request["execute"] == "cont":
            # An error means that the client has not negotiated, and QEMU will refuse its `cont` as well.
            return "error" in reply or await self._sev.finish()
        answer = await self._sev.answer(request["execute"], request.get("arguments", {}), reply)
        identity = {"id": request["id"]} if "id" in request else {}
        # QEMU writes the id first in an error, last otherwise.
        message = identity | answer if "error" in answer else answer | identity
        await self._tell(dump(message, pretty=self._pretty))
        return True

    async def _tell(self, data: bytes) -> None:
        self._client.writer.write(data)
        await self._client.writer.drain()


def _is_command(request: object) -> TypeGuard[Message]:
    """Whether it may be one that we answer; QEMU will complain of all else, and had better see its very bytes."""
    if not isinstance(request, dict) or not request.keys() <= {"execute", "arguments", "id"}:
        return False
    arguments = request.get("arguments", {})
    return (
        isinstance(request.get("execute"), str)
        and isinstance(arguments, dict)
        and all(isinstance(argument, str | int) for argument in arguments.values())
    )


async def _messages(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """QEMU's messages as it wrote them: a line each, or several when it writes them pretty."""
    raw = b""
    while line := await reader.readline():
        raw += line
        # The last line of a pretty message is its closing brace alone; in a string there are no line ends.
        if not line.endswith(b"\n") or line[:1] == b"}" or (raw == line and line.rstrip().endswith(b"}")):
            yield raw
            raw = b""
    if raw:
        yield raw


async def _quietly(work: Callable[[], Awaitable[None]]) -> None:
    # Either side may hang up at any moment.
    with contextlib.suppress(ConnectionError):
        await work()
