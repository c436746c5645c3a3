"""A raw QMP client for tests: a socket, bytes, and no library that could share the server's opinions."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_ACCEPTS = "00010000"  # __SO_ACCEPTCON, linux/net.h
TIMEOUT = 30.0  # seconds; a reply takes milliseconds, a loaded machine longer


class QmpClient:
    """One connection. Events are kept in `events`, in order."""

    def __init__(self, path: Path) -> None:
        self.events: list[dict[str, Any]] = []
        self._socket = _connected(path)
        self._socket.settimeout(TIMEOUT)
        self._buffer = b""

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def line(self) -> bytes:
        """One line, or nothing at the end of the connection."""
        while b"\r\n" not in self._buffer:
            try:
                data = self._socket.recv(1 << 16)
            except ConnectionResetError:
                data = b""
            if not data:
                return b""
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\r\n", 1)
        return line

    def is_silent(self, seconds: float) -> bool:
        """Whether nothing arrives within `seconds`."""
        self._socket.settimeout(seconds)
        try:
            self._buffer += self._socket.recv(1 << 16)
        except TimeoutError:
            return not self._buffer
        finally:
            self._socket.settimeout(TIMEOUT)
        return False

    def reply(self) -> dict[str, Any]:
        """The next message that is no event."""
        while True:
            message: dict[str, Any] = json.loads(self.line())
            if "event" not in message:
                return message
            self.events.append(message)

    def negotiate(self) -> dict[str, Any]:
        """Greeting and capabilities; returns the greeting."""
        greeting: dict[str, Any] = json.loads(self.line())
        assert self.ask("qmp_capabilities") == {}
        return greeting

    def ask(self, command: str, **arguments: Any) -> Any:
        """What a command returns; it must succeed."""
        message = self.execute(command, **arguments)
        assert "return" in message, message
        return message["return"]

    def refusal(self, command: str, **arguments: Any) -> str:
        """Why a command failed; it must fail."""
        message = self.execute(command, **arguments)
        assert "error" in message, message
        return str(message["error"]["desc"])

    def execute(self, command: str, **arguments: Any) -> dict[str, Any]:
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        self.send(json.dumps({"execute": command, "arguments": named}).encode())
        return self.reply()

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _connected(path: Path) -> socket.socket:
    """A connection; between QEMU's bind() and listen() the file is there and refuses."""
    deadline = time.monotonic() + TIMEOUT
    while True:
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            client.connect(str(path))
        except ConnectionRefusedError:
            client.close()
            if time.monotonic() > deadline:
                raise
        else:
            return client


def is_listening(path: Path) -> bool:
    """Whether somebody listens at a socket; nobody is connected to."""
    # Num RefCount Protocol Flags Type St Inode Path: net/unix/af_unix.c, unix_seq_show.
    sockets = (line.split(maxsplit=7) for line in Path("/proc/net/unix").read_text().splitlines())
    return any(len(words) == 8 and words[3] == _ACCEPTS and words[7] == str(path) for words in sockets)


@contextmanager
def running_machine(words: Sequence[str], qmp: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a machine, wait until its QMP socket listens, and end it in any case."""
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + TIMEOUT
        # Both: a machine before it, which was killed, may be listening for a moment at a place that is no more.
        while not (qmp.exists() and is_listening(qmp)):
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                raise AssertionError(f"the machine did not start: {process.communicate()}")
            time.sleep(0.005)
        yield process
    finally:
        process.kill()
        process.communicate()
