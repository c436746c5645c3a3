"""The real QEMU's process, and monitors on it that only the front can reach.

Nothing of it is on disk: RAM, the kernel's copy and what a command writes are memfds, and a monitor's socket has no
name by the time QEMU runs. So whatever ends the front leaves nothing behind; QEMU itself dies with it (prctl(2),
PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import signal
import socket
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from emulator.errors import CommandError, MachineDied

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_CHUNK = 1 << 16
_LINE_LIMIT = 64 << 20  # QEMU's own answers; query-qmp-schema alone is 200 KiB
_prctl = ctypes.CDLL(None, use_errno=True).prctl


class Door:
    """A listening unix socket without a name: QEMU inherits it, and the front alone can connect to it."""

    def __init__(self, resources: contextlib.ExitStack) -> None:
        """Make it; `resources` closes it."""
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        resources.callback(self.listener.close)
        folder = Path(tempfile.mkdtemp(prefix="sevattest-"))
        path = folder / "q"
        try:
            self.listener.bind(str(path))
            self.listener.listen(1)
            # A descriptor of the name, by which it can be connected to when the name is gone.
            self._name = os.open(path, os.O_PATH | os.O_CLOEXEC)
            resources.callback(os.close, self._name)
        finally:
            with contextlib.suppress(OSError):
                path.unlink()
            folder.rmdir()

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection to what QEMU has behind it."""
        return await asyncio.open_unix_connection(f"/proc/self/fd/{self._name}", limit=_LINE_LIMIT)

    def hand_over(self) -> None:
        """Leave the listening end to QEMU alone: when it has ended, nobody can connect."""
        self.listener.close()


class RealQemu:
    """The process.

    Attributes:
        process: it.
    """

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        outputs = ((process.stdout, 1), (process.stderr, 2))
        self._copies = [asyncio.create_task(_copy(pipe, to)) for pipe, to in outputs if pipe]

    @classmethod
    async def start(
        cls,
        program: str,
        words: Sequence[str],
        *,
        inherits: Sequence[int],
        with_stdin: bool = True,
        through_us: bool = False,
    ) -> RealQemu:
        """Start it. It inherits standard output and error, and every descriptor that the front itself inherited.

        Args:
            program: name or path.
            words: its arguments.
            inherits: descriptors of the front's own that the words name.
            with_stdin: whether it gets our standard input, or an empty one.
            through_us: whether its output goes where ours does at the moment, since a daemon lets go of its streams.

        Raises:
            MachineDied: it cannot be started.
        """
        output = asyncio.subprocess.PIPE if through_us else None
        try:
            for descriptor in inherits:
                os.set_inheritable(descriptor, True)  # noqa: FBT003 -- its only parameter
            process = await asyncio.create_subprocess_exec(
                program,
                *words,
                stdin=None if with_stdin else asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                close_fds=False,
                preexec_fn=die_with_parent,
            )
        except OSError as error:
            raise MachineDied(f"{program}: {error.strerror}") from error
        return cls(process)

    async def ended(self) -> int:
        """Its exit code, negative for a signal's number, when it has ended and all that it said is said."""
        code = await self.process.wait()
        await asyncio.gather(*self._copies)
        return code

    def send(self, number: int) -> None:
        """Send it a signal."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)


class Control:
    """The front's own monitor on the machine.

    Attributes:
        version: QEMU's, major and minor.
        on_event: told of each event's name.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.version = (0, 0)
        self.on_event: Callable[[str], None] = lambda _name: None
        self._reader = reader
        self._writer = writer
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._next = 0
        self._reading: asyncio.Task[None] | None = None

    @classmethod
    async def open(cls, door: Door) -> Control:
        """Connect, be greeted, negotiate.

        Raises:
            ConnectionError: QEMU ended before it greeted.
        """
        control = cls(*await door.connect())
        greeting = await control._reader.readline()
        if not greeting:
            raise ConnectionResetError
        about = json.loads(greeting)["QMP"]["version"]["qemu"]
        control.version = (about["major"], about["minor"])
        control._reading = asyncio.create_task(control._read())
        await control.execute("qmp_capabilities")
        return control

    async def execute(self, command: str, **arguments: object) -> Any:
        """What QEMU answers.

        Raises:
            CommandError: it refuses; with its words.
            ConnectionError: it has ended.
        """
        self._next += 1
        number = self._next
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        message = {"execute": command, "arguments": arguments, "id": number}
        self._writer.write(json.dumps(message).encode() + b"\n")
        if self._reading is None or self._reading.done():
            answer.cancel()
            raise ConnectionResetError
        reply = await answer
        if "error" in reply:
            raise CommandError(str(reply["error"]["desc"]))
        return reply["return"]

    async def close(self) -> None:
        """Hang up."""
        self._writer.close()
        if self._reading is not None:
            self._reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reading

    async def _read(self) -> None:
        with contextlib.suppress(ConnectionError):
            while line := await self._reader.readline():
                message = json.loads(line)
                if "event" in message:
                    self.on_event(message["event"])
                elif (waiting := self._waiting.pop(message.get("id"), None)) and not waiting.done():
                    waiting.set_result(message)
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(ConnectionResetError())


async def _copy(pipe: asyncio.StreamReader, to: int) -> None:
    while data := await pipe.read(_CHUNK):
        with contextlib.suppress(OSError):
            os.write(to, data)


def die_with_parent() -> None:
    """Let the kernel end this process when its parent's thread ends; for a child, before it becomes its program."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def become(program: str, words: Sequence[str]) -> NoReturn:
    """Run the real QEMU in this process's place.

    Raises:
        MachineDied: it cannot be run.
    """
    try:
        os.execvp(program, [program, *words])  # noqa: S606 -- what this command is for
    except OSError as error:
        raise MachineDied(f"{program}: {error.strerror}") from error
