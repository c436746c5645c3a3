"""The machine that this runs on; see `Machine`."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import resource
import subprocess
from collections.abc import Sequence
from pathlib import Path

from host_agent.doctor import instruction
from host_agent.doctor.machine import Registers, Unreadable

_KVM_GET_API_VERSION = 0xAE00  # linux/kvm.h
_TEXT_MAX = 4 << 20  # bytes; /proc/net/unix of a busy host has some hundred kilobytes
_OUTPUT_MAX = 1 << 20
_PATIENCE = 15.0  # seconds for a program to say what it is
_TIMEX_SIZE = 208  # struct timex of linux/timex.h on 64-bit machines; zero asks and changes nothing
_TIME_ERROR = 5  # adjtimex(2): the clock is not synchronised


class ThisMachine:
    """The running machine."""

    def text(self, path: str) -> str:
        """See `Machine`."""
        with Path(path).open("rb") as file:
            return file.read(_TEXT_MAX).decode("utf-8", "replace")

    def try_open(self, path: str) -> None:
        """See `Machine`."""
        os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))

    def is_writable(self, path: str) -> bool:
        """See `Machine`."""
        return os.access(path, os.W_OK, effective_ids=True)

    def cpuid(self, leaf: int) -> Registers:
        """See `Machine`."""
        try:
            data = _pread("/dev/cpu/0/cpuid", 16, leaf)
        except OSError:
            return instruction.execute(leaf)
        return Registers(*(int.from_bytes(data[at : at + 4], "little") for at in range(0, 16, 4)))

    def msr(self, number: int) -> int:
        """See `Machine`."""
        try:
            return int.from_bytes(_pread("/dev/cpu/0/msr", 8, number), "little")
        except OSError as error:
            raise Unreadable(f"/dev/cpu/0/msr cannot be read ({error.strerror})") from None

    def kvm_api(self) -> int:
        """See `Machine`."""
        descriptor = os.open("/dev/kvm", os.O_RDONLY | os.O_CLOEXEC)
        try:
            return fcntl.ioctl(descriptor, _KVM_GET_API_VERSION, 0)
        finally:
            os.close(descriptor)

    def memlock(self) -> tuple[int, int]:
        """See `Machine`."""
        return resource.getrlimit(resource.RLIMIT_MEMLOCK)

    def clock_is_synchronised(self) -> bool | None:
        """See `Machine`."""
        state: int = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(_TIMEX_SIZE))
        return None if state < 0 else state != _TIME_ERROR

    def run(self, words: Sequence[str]) -> str:
        """See `Machine`."""
        try:
            done = subprocess.run(  # noqa: S603 -- the words are the operator's, from the agent's configuration
                list(words),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=_PATIENCE,
                check=False,
            )
        except OSError as error:
            raise Unreadable(f"{words[0]} cannot be run: {error.strerror}") from None
        except subprocess.TimeoutExpired:
            raise Unreadable(f"{words[0]} did not end in {_PATIENCE:g} s") from None
        return done.stdout[:_OUTPUT_MAX].decode("utf-8", "replace")


def _pread(path: str, size: int, offset: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = os.pread(descriptor, size, offset)
    finally:
        os.close(descriptor)
    if len(data) != size:
        raise OSError(errno.EIO, os.strerror(errno.EIO), path)
    return data
