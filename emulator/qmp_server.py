"""The stand-in machine's QMP socket and its event loop: one client at a time, events before replies.

A second client's connect() succeeds and then nothing comes, not even the greeting, until the first one leaves; what it
sent in the meantime is carried out then. That is QEMU's listen backlog of one, and here it is the same backlog.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from emulator.device_client import CommandFailed
from emulator.errors import MachineDied
from emulator.machine import Machine
from emulator.qemu_options import MachineOptions, parse
from emulator.qemu_words import complain
from emulator.qmp_commands import VERSIONS, Commands, Session
from emulator.qmp_json import JsonStream, Value, dump
from emulator.sev_launch import Processor, no_platform

_READ_SIZE = 1 << 16
_SOCKET_PATH_MAX = 107


class Monitor:
    """The socket of one machine."""

    def __init__(self, machine: Machine, version: str) -> None:
        self._machine = machine
        self._commands = Commands(machine, version, self.power_off)
        self._ended = asyncio.Event()
        self._session: Session | None = None
        self._outgoing = bytearray()
        machine.emit = self._emit

    def power_off(self) -> None:
        """End the machine after what is already on its way out."""
        self._ended.set()

    async def run(self, listener: socket.socket | None) -> None:
        """Serve clients, one after the other, until the machine ends.

        Raises:
            MachineDied: a command ended the machine as it would end QEMU.
        """
        if listener is None:
            await self._ended.wait()
            return
        serving = asyncio.create_task(self._serve(listener))
        ended = asyncio.create_task(self._ended.wait())
        try:
            await asyncio.wait({serving, ended}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ended.cancel()
            if not serving.done():
                serving.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await serving

    async def _serve(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while not self._ended.is_set():
            client, _ = await loop.sock_accept(listener)
            with client:
                client.settimeout(0)
                with contextlib.suppress(ConnectionError, BrokenPipeError):
                    await self._converse(loop, client)
            self._session = None
            self._outgoing.clear()

    async def _converse(self, loop: asyncio.AbstractEventLoop, client: socket.socket) -> None:
        self._session = session = Session()
        stream = JsonStream()
        await loop.sock_sendall(client, dump(self._commands.greeting()))
        try:
            while data := await loop.sock_recv(client, _READ_SIZE):
                # A client that is faster than this loop would keep signals and the guest waiting for ever: neither
                # sock_recv nor sock_sendall gives way while the socket is ready.
                await asyncio.sleep(0)
                for found in stream.feed(data):
                    if isinstance(found, Value):
                        reply = self._commands.dispatch(session, found.value)
                    else:
                        reply = {"error": {"class": "GenericError", "desc": found.text}}
                    self._outgoing += dump(reply)
                    await self._flush(loop, client)
                    if self._ended.is_set():
                        return
        except asyncio.CancelledError:
            # The machine ends from outside (a signal): its last event still goes out.
            with contextlib.suppress(OSError):
                client.send(self._outgoing)
            raise

    async def _flush(self, loop: asyncio.AbstractEventLoop, client: socket.socket) -> None:
        waiting, self._outgoing = bytes(self._outgoing), bytearray()
        await loop.sock_sendall(client, waiting)

    def _emit(self, name: str, data: dict[str, object] | None) -> None:
        if self._session is None or not self._session.negotiated:
            return
        now = time.time_ns() // 1000
        event: dict[str, object] = {
            "timestamp": {"seconds": now // 1_000_000, "microseconds": now % 1_000_000},
            "event": name,
        }
        if data is not None:
            event["data"] = data
        self._outgoing += dump(event)


def run_machine(words: Sequence[str], *, state: Path, qemu_version: str, flavour: str) -> int:
    """Run a machine with QEMU's words until it ends; returns QEMU's exit code.

    Args:
        words: QEMU's own arguments.
        state: the platform's folder.
        qemu_version: whose QMP it speaks, "7.2" or "10.0".
        flavour: which save areas SEV-ES guests start with (see `vmsa`).
    """
    try:
        options = parse(words)
        machine = _machine(options, state=state, qemu_version=qemu_version, flavour=flavour)
        try:
            machine.launch()
            with _listener(options) as listener:
                asyncio.run(_run(machine, qemu_version, listener))
        finally:
            machine.close()
    except MachineDied as death:
        for line in death.lines:
            complain(line)
        return 1
    return 0


async def _run(machine: Machine, version: str, listener: socket.socket | None) -> None:
    loop = asyncio.get_running_loop()
    monitor = Monitor(machine, version)
    machine.schedule = loop.call_soon

    def terminate(number: int) -> None:
        complain(f"terminating on signal {number}")
        machine.emit("SHUTDOWN", {"guest": False, "reason": "host-signal"})
        monitor.power_off()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, terminate, number)
    await monitor.run(listener)


def _machine(options: MachineOptions, *, state: Path, qemu_version: str, flavour: str) -> Machine:
    platform = state / "sev.sock"
    version = VERSIONS[qemu_version][:2]
    try:
        processor = Processor.of(platform)
    except (CommandFailed, OSError) as error:
        raise no_platform(platform, error, version) from error
    return Machine(options, platform=platform, processor=processor, flavour=flavour, version=version)


@contextlib.contextmanager
def _listener(options: MachineOptions) -> Iterator[socket.socket | None]:
    if options.qmp is None:
        yield None
        return
    path = str(options.qmp)
    if len(os.fsencode(path)) > _SOCKET_PATH_MAX:
        raise MachineDied(
            f"-qmp unix:{path}: UNIX socket path '{path}' is too long", "Path must be less than 108 bytes"
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.settimeout(0)
        try:
            options.qmp.unlink(missing_ok=True)
        except OSError as error:
            raise MachineDied(f"-qmp unix:{path}: Failed to unlink socket {path}: {error.strerror}") from error
        try:
            listener.bind(path)
        except OSError as error:
            raise MachineDied(f"-qmp unix:{path}: Failed to bind socket to {path}: {error.strerror}") from error
        listener.listen(1)
        try:
            yield listener
        finally:
            options.qmp.unlink(missing_ok=True)
