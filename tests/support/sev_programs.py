"""Programs for `platform run` that ask /dev/sev by raw calls; each returns what it saw, for a test to judge."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
import sys
import threading
from pathlib import Path
from typing import Any

from tests.support import raw_sev
from tests.support.raw_sev import CSR, EXPORT, GET_ID, GET_ID2, IMPORT, Memory, ReadOnlyPage, issue, one_buffer

_NOWHERE = 16  # nothing is mapped there
_LIMIT = 0x4000
# What a host with SEV carries out on its processor.
SEV_REQUESTS = (
    raw_sev.SEV_ISSUE_CMD,
    raw_sev.KVM_MEMORY_ENCRYPT_OP,
    raw_sev.KVM_MEMORY_ENCRYPT_REG_REGION,
    raw_sev.KVM_MEMORY_ENCRYPT_UNREG_REGION,
)


def _device(flags: int = os.O_RDWR) -> int:
    return os.open("/dev/sev", flags | os.O_CLOEXEC)


def answers() -> dict[str, Any]:
    """What every reading command returns."""
    device = _device()
    status, pdh, chain = Memory(12), Memory(2084), Memory(6252)
    csr, both_ids, one_id = Memory(2084), Memory(128), Memory(64)
    said = [
        issue(device, raw_sev.STATUS, status.at),
        raw_sev.two_buffers(device, EXPORT, pdh.at, 2084, chain.at, 6252),
        one_buffer(device, CSR, csr.at, 2084),
        issue(device, GET_ID, both_ids.at),
        one_buffer(device, GET_ID2, one_id.at, 64),
    ]
    contents = [status, pdh, chain, csr, both_ids, one_id]
    return {"said": said, "contents": [content.bytes.hex() for content in contents]}


def lengths() -> dict[str, Any]:
    """Questions for lengths, and buffers that are too small or larger than needed."""
    device = _device()
    room, more = Memory(_LIMIT), Memory(_LIMIT)
    export = {
        str(given): raw_sev.two_buffers(device, EXPORT, *given)
        for given in (
            (0, 0, 0, 0),
            (0, 2084, more.at, 6252),
            (room.at, 0, more.at, 6252),
            (room.at, 2084, 0, 6252),
            (room.at, 2084, more.at, 0),
            (room.at, 2083, more.at, 6252),
            (room.at, 2084, more.at, 6251),
        )
    }
    return {
        "export": list(export.values()),
        "csr": [one_buffer(device, CSR, *given) for given in ((0, 0), (0, 2084), (room.at, 0), (room.at, 2083))],
        "id": [one_buffer(device, GET_ID2, *given) for given in ((0, 0), (0, 64), (room.at, 0), (room.at, 63))],
        "untouched": room.bytes == more.bytes == bytes(_LIMIT),
        "large": [
            raw_sev.two_buffers(device, EXPORT, room.at, _LIMIT, more.at, _LIMIT),
            one_buffer(device, CSR, room.at, _LIMIT),
            one_buffer(device, GET_ID2, room.at, 128),
        ],
    }


def bad_arguments() -> dict[str, Any]:
    """Pointers that lead nowhere, lengths beyond the limit, commands that do not exist."""
    device = _device()
    room, fixed = Memory(_LIMIT + 1), ReadOnlyPage(struct.pack("<QI", 0, 0))
    good = 2084
    return {
        "argument": [raw_sev.ioctl(device, raw_sev.SEV_ISSUE_CMD, at) for at in (0, _NOWHERE, (1 << 64) - 8)],
        "read-only argument": raw_sev.ioctl(
            device, raw_sev.SEV_ISSUE_CMD, ReadOnlyPage(struct.pack("<IQI", raw_sev.STATUS, room.at, 0))
        ),
        "data": [
            issue(device, command, _NOWHERE) for command in (raw_sev.STATUS, CSR, EXPORT, IMPORT, GET_ID, GET_ID2)
        ],
        "read-only data": issue(device, CSR, fixed),
        "destinations": [
            one_buffer(device, CSR, _NOWHERE, good)[:2],
            one_buffer(device, GET_ID2, _NOWHERE, 64)[:2],
            raw_sev.two_buffers(device, EXPORT, _NOWHERE, good, room.at, 6252)[:2],
            raw_sev.two_buffers(device, EXPORT, room.at, good, _NOWHERE, 6252)[:2],
        ],
        "sources": [
            raw_sev.two_buffers(device, IMPORT, _NOWHERE, good, room.at, good)[:2],
            raw_sev.two_buffers(device, IMPORT, room.at, good, _NOWHERE, good)[:2],
        ],
        "too long": [
            one_buffer(device, CSR, room.at, _LIMIT + 1)[:2],
            raw_sev.two_buffers(device, EXPORT, room.at, _LIMIT + 1, room.at, 6252)[:2],
            raw_sev.two_buffers(device, EXPORT, room.at, good, room.at, _LIMIT + 1)[:2],
        ],
        "import": [
            raw_sev.two_buffers(device, IMPORT, *given)[:2]
            for given in (
                (0, good, room.at, good),
                (room.at, 0, room.at, good),
                (room.at, good, 0, good),
                (room.at, good, room.at, 0),
                (room.at, _LIMIT + 1, room.at, good),
                (room.at, good, room.at, _LIMIT + 1),
            )
        ],
        "junk": raw_sev.two_buffers(device, IMPORT, room.at, good, room.at, good)[:2],
        "unknown": [issue(device, command, room.at) for command in (9, 10, 11, 12, 255, 0xFFFFFFFF)],
    }


def read_only() -> dict[str, Any]:
    """What a descriptor that may not write can and cannot do."""
    reader, writer = _device(os.O_RDONLY), _device(os.O_WRONLY)
    room = Memory(_LIMIT)
    changers = [
        issue(reader, raw_sev.RESET),
        issue(reader, raw_sev.PEK_GEN),
        issue(reader, raw_sev.PDH_GEN),
        one_buffer(reader, CSR, room.at, 2084)[:2],
        raw_sev.two_buffers(reader, IMPORT, room.at, 2084, room.at, 2084)[:2],
        issue(reader, CSR, _NOWHERE),
        issue(reader, IMPORT, _NOWHERE),
    ]
    return {
        "changers": changers,
        "state": raw_sev.state(reader),
        "export": raw_sev.two_buffers(reader, EXPORT, room.at, 2084, room.at + 4096, 6252)[:2],
        "write-only": one_buffer(writer, CSR, room.at, 2084)[:2],
    }


def implicit_init(command: int) -> list[Any]:
    """State before and after one command, and what it said."""
    device = _device()
    before = raw_sev.state(device)
    room = Memory(_LIMIT)
    if command == CSR:
        said = one_buffer(device, command, room.at, 2084)[:2]
    elif command in {EXPORT, IMPORT}:
        said = raw_sev.two_buffers(device, command, room.at, 2084, room.at + 4096, 6252)[:2]
    else:
        said = issue(device, command, room.at)
    return [before, said, raw_sev.state(device)]


def reset() -> tuple[str, int]:
    """FACTORY_RESET."""
    return issue(_device(), raw_sev.RESET)


def opened() -> dict[str, Any]:
    """Ways to open it, and names that are not its."""
    plain = raw_sev.syscall(257, -100, b"/dev/sev\0", os.O_RDWR, 0)
    closing = raw_sev.syscall(2, b"/dev/sev\0", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK, 0)

    def refusal(name: str, flags: int) -> str:
        try:
            os.close(os.open(name, flags))
        except OSError as error:
            return errno.errorcode[error.errno or 0]
        return "ok"

    return {
        "cloexec": [fcntl.fcntl(number, fcntl.F_GETFD) for number in (plain, closing)],
        "flags": [fcntl.fcntl(number, fcntl.F_GETFL) & (os.O_ACCMODE | os.O_NONBLOCK) for number in (plain, closing)],
        "work": [raw_sev.state(number) for number in (plain, closing)],
        "create": refusal("/dev/sev", os.O_RDWR | os.O_CREAT),
        "exclusive": refusal("/dev/sev", os.O_RDWR | os.O_CREAT | os.O_EXCL),
        "folder": refusal("/dev/sev", os.O_RDONLY | os.O_DIRECTORY),
        "others": [refusal(name, os.O_RDONLY) for name in ("/dev/sevv", "/dev/se", "/dev/null")],
        "nowhere": raw_sev.syscall(257, -100, 0, os.O_RDWR, 0),
    }


def spelled() -> dict[str, Any]:
    """Other spellings of its name and other calls that open it; the platform's state as each tells it."""

    def how(flags: int, resolve: int = 0) -> bytes:
        return struct.pack("<QQQ", flags, 0, resolve)

    def openat2(name: bytes, block: bytes) -> int:
        return raw_sev.syscall(437, -100, name + b"\0", block, len(block))

    creator = raw_sev.syscall(85, b"/dev/sev\0", 0o600)
    names = [b"/dev//sev", b"/dev/./sev", b"//dev/sev", b"/./dev/.//sev"]
    new = [openat2(name, how(os.O_RDWR)) for name in (b"/dev/sev", b"/dev//sev")]
    return {
        "names": [raw_sev.state(os.open(name, os.O_RDWR)) for name in names],
        "creat": [fcntl.fcntl(creator, fcntl.F_GETFL) & os.O_ACCMODE, raw_sev.state(creator)],
        "openat2": [raw_sev.state(number) for number in new],
        "strict": raw_sev.state(openat2(b"/dev/sev", how(os.O_RDONLY, resolve=0x06))),
        "beneath": openat2(b"/dev/sev", how(os.O_RDONLY, resolve=0x08)),
        "short": openat2(b"/dev/sev", how(os.O_RDONLY)[:16]),
        "nowhere": raw_sev.syscall(437, -100, b"/dev/sev\0", _NOWHERE, 24),
        "other": openat2(b"/dev/null", how(os.O_RDONLY)) >= 0,
    }


def strangers(path: str) -> list[str]:
    """What SEV's requests on a descriptor of another file say."""
    descriptor = os.open(path, os.O_RDONLY)
    return [raw_sev.ioctl(descriptor, request, Memory(64)) for request in SEV_REQUESTS]


def strangers_of_another_abi(path: str) -> list[int]:
    """The same in the calls of a program of 32 bits."""
    descriptor = os.open(path, os.O_RDONLY)
    return [raw_sev.ioctl_of_32_bits(descriptor, request) for request in SEV_REQUESTS]


def left_by_another() -> list[Any]:
    """What one open device sees of what was written into another."""

    def tried(action: Any, *arguments: Any) -> str:
        try:
            action(*arguments)
        except OSError as error:
            return errno.errorcode[error.errno or 0]
        return "ok"

    writer, reader = _device(), _device()
    return [
        tried(os.write, writer, b"secret"),
        tried(os.ftruncate, writer, 1 << 26),
        os.read(reader, 6).decode(),
        os.fstat(reader).st_size,
        raw_sev.state(writer),
    ]


def descriptors() -> dict[str, Any]:
    """A descriptor's copies and its end."""
    device = _device()
    copy = os.dup(device)
    reader = _device(os.O_RDONLY)
    ours, theirs = socket.socketpair()
    socket.send_fds(ours, [b"x"], [device])
    passed = socket.recv_fds(theirs, 1, 1)[1][0]
    os.close(device)
    closed = issue(device, raw_sev.STATUS)[0]
    end, start = os.pipe()
    child = os.fork()
    if not child:
        os.write(start, bytes([raw_sev.state(copy)]))
        os._exit(0)
    os.waitpid(child, 0)
    inherited = os.read(end, 1)[0]
    fake = os.memfd_create("sev")
    null = os.open("/dev/null", os.O_RDWR)
    after_exec = os.dup2(copy, 99, inheritable=True)
    code = f"from tests.support import raw_sev; print(raw_sev.state({after_exec}))"
    import subprocess

    ran = subprocess.run(
        [sys.executable, "-c", code], pass_fds=(after_exec,), capture_output=True, text=True, check=True
    )
    return {
        "closed": closed,
        "copies": [raw_sev.state(copy), raw_sev.state(passed), inherited, int(ran.stdout)],
        "reader": issue(reader, raw_sev.PDH_GEN)[0],
        "strangers": [issue(number, raw_sev.STATUS) for number in (fake, null)],
    }


def come_and_go(times: int) -> dict[str, Any]:
    """Open, ask and close; how many descriptors there are before and after, here and in the supervisor."""

    def count() -> list[int]:
        return [len(list(Path(f"/proc/{process}/fd").iterdir())) for process in (os.getpid(), os.getppid())]

    raw_sev.state(_device())
    before = count()
    for _ in range(times):
        device = _device()
        raw_sev.state(device)
        os.close(device)
    return {"before": before, "after": count()}


def many_threads(threads: int, times: int) -> list[int]:
    """How many right answers each thread got."""
    right = [0] * threads

    def ask(number: int) -> None:
        device = _device()
        for _ in range(times):
            room = Memory(64)
            right[number] += one_buffer(device, GET_ID2, room.at, 64) == ("ok", 0, 64) and any(room.bytes)
            Path("/proc/self/stat").read_text(encoding="ascii")

    running = [threading.Thread(target=ask, args=(number,)) for number in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return right


def alarmed() -> list[Any]:
    """One command while an alarm rings every few milliseconds; how often it rang, and what the command said."""
    import signal

    rung = []
    signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
    signal.siginterrupt(signal.SIGALRM, False)  # noqa: FBT003 -- SA_RESTART, as most programs have it; no keywords
    device = _device()
    room = Memory(12)
    signal.setitimer(signal.ITIMER_REAL, 0.005, 0.005)
    said = issue(device, raw_sev.STATUS, room.at)
    signal.setitimer(signal.ITIMER_REAL, 0)
    return [len(rung), said]


def opens_while_it_hangs() -> list[Any]:
    """How many files another thread opens while a command takes its time."""
    device = _device()
    room = Memory(12)
    ended = threading.Event()
    opened = 0

    def ask() -> None:
        issue(device, raw_sev.STATUS, room.at)
        ended.set()

    asking = threading.Thread(target=ask)
    asking.start()
    while not ended.is_set():
        Path("/proc/self/stat").read_text(encoding="ascii")
        opened += 1
    asking.join()
    return [opened]


def hardened() -> list[Any]:
    """A process that has made itself unreadable, as our services do."""
    from common.hardening import harden_process

    harden_process({})
    return [raw_sev.state(_device())]


def ask_when_told() -> str:
    """A status, once standard input says so."""
    device = _device()
    print("ready", flush=True)  # noqa: T201 -- what the test waits for
    sys.stdin.readline()
    room = Memory(12)
    return issue(device, raw_sev.STATUS, room.at)[0]
