"""QEMU's monitor (QMP): few commands, a time limit on everything, and no doubt about what is in doubt.

Built on the `qemu.qmp` library, which matches replies by id and drops those that nobody waits for. What it does not do
is here: ids that no other connection has used (a late answer to a client that left may reach the next one), a fixed
list of commands, time limits (also on the greeting: a monitor serves one client, a second one connects and hears
nothing), a bound on lines, a check of who listens, and the difference between "not sent" and "outcome unknown".

A connection lives for one step and is never used again after anything went wrong with it. Facts about QEMU's behaviour
come from runs of QEMU 7.2 and 10.0; when QEMU exits, its client may see ECONNRESET where it expects the end of file.
While a client is still leaving, the next one may be sent away, or greeted and then not heard (about one in five hundred
that follow at once). Nothing of ours was said by then, so whoever comes begins again. A client that comes while QEMU
10.0 is starting and leaves before it was greeted kills it (SIGSEGV, or an assertion in char-socket.c; 5 of 24,000
starts): the monitor is on its way from one thread to another. So nobody of ours leaves before the greeting, or before
a second has gone by without one.

Time limits are `asyncio.timeout`: `asyncio.wait_for` of Python 3.11 drops a cancellation that comes with a result.
"""

from __future__ import annotations

import asyncio
import errno
import os
import secrets
import socket
import struct
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from itertools import count
from pathlib import Path

from qemu.qmp import ConnectError, ExecuteError, QMPClient, QMPError

from common.errors import OutcomeUnknown, Reason, SevattestError, Unavailable
from common.rpc.steps import shielded
from host_agent.firmware_errors import hypervisor_failure

# Everything that the agent ever says to a machine; QEMU 7.2 has 216 commands, `human-monitor-command` among them.
COMMANDS = frozenset(
    {
        "query-status",
        "query-sev",
        "query-sev-capabilities",
        "query-sev-launch-measure",
        "query-sev-attestation-report",
        "sev-inject-launch-secret",
        "cont",
    }
)
# After these, silence means that nobody knows what happened.
IRREVERSIBLE = frozenset({"sev-inject-launch-secret", "cont"})

_LINE_MAX = 1 << 20  # bytes; the longest answer to a command of ours is some 500
_DISCONNECT = 5.0  # seconds for the library to let go of a closed socket
_GREETS = 1.0  # seconds that a monitor has to greet whom it serves
_RETRY = 0.02  # seconds between attempts on a socket with a full backlog, or whose monitor sent us away
_ATTEMPTS_MAX = 5  # to be greeted; each may take twice as long as the last, and the last one all that is left
_FIRST_ATTEMPT = 1.0  # seconds
_RUN, _NUMBERS = secrets.token_hex(8), count()  # make a command's id; not even two runs of the agent share one
_PEERCRED = struct.Struct("iii")  # struct ucred: pid, uid, gid


class _Client(QMPClient):
    """The library's client, but for its ids: those begin anew with each connection."""

    def _get_exec_id(self) -> str:
        return f"{_RUN}-{next(_NUMBERS)}"


class MonitorSession:
    """One connection to a machine's monitor, greeted and negotiated.

    Attributes:
        broken: something went wrong with it; it is not used again.
    """

    def __init__(self, client: QMPClient, limit: float) -> None:
        self._client = client
        self._limit = limit
        self.broken = False

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> object:
        """Run one command and return its `return` value.

        Raises:
            Refused: the machine's words carry a firmware status that is a verdict.
            PlatformFailed: the machine answered with an error.
            Unavailable: no answer to a command that can be repeated.
            OutcomeUnknown: no answer to a command that cannot.
        """
        if command not in COMMANDS:
            raise ValueError(f"{command} is not a command of the agent's")
        if self.broken:
            raise ValueError("a broken monitor connection is not used again")
        try:
            async with asyncio.timeout(self._limit):
                return await self._client.execute(command, arguments)
        except ExecuteError as error:
            raise hypervisor_failure(f"the machine refused {command}", str(error)) from error
        except TimeoutError:
            self.broken = True
            raise _lost(command, f"had no answer in {self._limit:g} s") from None
        except QMPError as error:
            # The connection ended, or what came was not QMP. The library keeps the cause; it may quote the line.
            self.broken = True
            raise _lost(command, "was cut short: the monitor closed, or sent what is not QMP") from error
        except BaseException:
            self.broken = True
            raise


@asynccontextmanager
async def monitor(
    folder: Path, name: str, *, limit: float, listener: int | None = None
) -> AsyncIterator[MonitorSession]:
    """A connection to the monitor at `folder/name`, closed at the end whatever happens.

    Args:
        folder: the launch's folder; its path may be longer than a socket's address can be.
        name: the socket's name.
        limit: seconds for connecting and greeting together, and again for each command.
        listener: pid of the process that must be listening; None for whichever does.

    Raises:
        Unavailable: nobody greets; nothing was sent.
    """
    client, connection = await _greeted(folder, name, limit, listener)
    session = MonitorSession(client, limit)
    try:
        yield session
        session_failed = session.broken
    except BaseException:
        session_failed = True
        raise
    finally:
        await _leave(client, connection, politely=not session_failed)


async def _greeted(folder: Path, name: str, limit: float, listener: int | None) -> tuple[_Client, socket.socket]:
    """A client that was greeted and has negotiated, and its socket."""
    clock = asyncio.get_running_loop().time
    ends = clock() + limit
    for attempt in range(_ATTEMPTS_MAX):
        connection, _ = await _reached(folder, name, ends - clock(), listener)
        client = _Client(readbuflen=_LINE_MAX)
        # Nobody reads events here, and a machine can send them without end.
        client.events.event_filter = _no_event
        left = ends - clock()
        is_last = attempt == _ATTEMPTS_MAX - 1
        try:
            await _greet(client, connection, left if is_last else min(left, _FIRST_ATTEMPT * 2**attempt))
        except Unavailable:
            await _leave(client, connection, politely=False)
            if is_last or ends - clock() <= _RETRY:
                raise
            await asyncio.sleep(_RETRY)
        except BaseException:
            await _leave(client, connection, politely=False)
            raise
        else:
            return client, connection
    raise AssertionError  # the last attempt returns or raises


async def _leave(client: _Client, connection: socket.socket, *, politely: bool) -> None:
    """Let go of a connection; whoever is cancelled meanwhile has let go of it too."""
    if not politely:
        # Ends both directions: the library must not wait until a peer that hangs has read the rest.
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
    await shielded(_disconnect(client, connection))


def _no_event(_event: object) -> bool:
    return False


async def is_taken(folder: Path, name: str) -> bool:
    """Whether a process listens at `folder/name`, whoever it is. Nothing is said to it."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    with connection:
        try:
            _open(connection, folder, name)
        except BlockingIOError:  # its backlog is full
            return True
        except OSError as error:
            return error.errno not in {errno.ENOENT, errno.ECONNREFUSED, errno.ENOTDIR}
        await _linger(connection, _GREETS)
    return True


async def listening_pid(folder: Path, name: str, *, limit: float) -> int:
    """The pid of the process that listens at `folder/name`, under our own user; it need not greet.

    Raises:
        Unavailable: nobody does, or another user.
    """
    connection, pid = await _reached(folder, name, limit, None)
    with connection:
        await _linger(connection, min(limit, _GREETS))
    return pid


async def _linger(connection: socket.socket, limit: float) -> None:
    """Whether it greets says nothing; who leaves before it does may kill it."""
    with suppress(OSError, TimeoutError):
        async with asyncio.timeout(limit):
            await asyncio.get_running_loop().sock_recv(connection, 1)


async def _reached(folder: Path, name: str, limit: float, listener: int | None) -> tuple[socket.socket, int]:
    try:
        async with asyncio.timeout(limit):
            return await _connect(folder, name, listener)
    except TimeoutError:
        raise _unreachable("takes no connection") from None
    except OSError as error:
        raise _unreachable(f"cannot be reached: {error.strerror or error}") from error


async def _connect(folder: Path, name: str, listener: int | None) -> tuple[socket.socket, int]:
    """A connected socket whose listener runs under our own user, and that process's pid."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        while True:
            try:
                _open(connection, folder, name)
                break
            except BlockingIOError:  # EAGAIN: the backlog is full
                await asyncio.sleep(_RETRY)
        try:
            peer = _checked_listener(connection, listener)
        except PermissionError:
            await _linger(connection, _GREETS)
            raise
    except BaseException:
        connection.close()
        raise
    return connection, peer


def _open(connection: socket.socket, folder: Path, name: str) -> None:
    connection.settimeout(0)
    directory = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # An address holds 107 bytes; this one is short wherever the folder is.
        connection.connect(f"/proc/self/fd/{directory}/{name}")
    finally:
        os.close(directory)


def _checked_listener(connection: socket.socket, listener: int | None) -> int:
    """The pid of who listens; refuses a monitor that somebody else put in the machine's place."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size)
    pid, uid, _ = _PEERCRED.unpack(credentials)
    if uid != os.geteuid():
        raise PermissionError(errno.EPERM, "its listener belongs to another user")
    if listener is not None and pid != listener:
        raise PermissionError(errno.EPERM, "its listener is another process than the machine")
    return int(pid)


async def _greet(client: QMPClient, connection: socket.socket, limit: float) -> None:
    try:
        async with asyncio.timeout(limit):
            await client.connect(connection)
    except TimeoutError:
        raise _unreachable("does not greet; another client may hold it") from None
    except ConnectError as error:
        raise _unreachable("closed before its greeting, or greets in another protocol") from error


async def _disconnect(client: QMPClient, connection: socket.socket) -> None:
    # It raises again whatever ended its reader; that was reported where it mattered.
    with connection, suppress(Exception):
        async with asyncio.timeout(_DISCONNECT):
            await client.disconnect()


def _lost(command: str, what: str) -> SevattestError:
    if command in IRREVERSIBLE:
        return OutcomeUnknown(Reason.OUTCOME_UNKNOWN, f"{command} {what}; nobody knows whether it was done")
    return _unreachable(f"gives no answer: {command} {what}")


def _unreachable(what: str) -> Unavailable:
    return Unavailable(Reason.PLATFORM_UNAVAILABLE, f"the machine's monitor {what}")
