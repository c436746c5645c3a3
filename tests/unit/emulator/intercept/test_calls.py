"""An answer to a call whose caller is gone: its number may be a stranger's by now. Tried on this process's memory."""

from __future__ import annotations

import ctypes
import os
import queue
from dataclasses import dataclass, field
from typing import cast

import pytest

from common.sev.abi import DeviceCommand
from emulator.intercept.calls import Calls
from emulator.intercept.filter import SYS_IOCTL
from emulator.intercept.link import Link
from emulator.intercept.psp_sev import ISSUE_CMD, SEV_ISSUE_CMD
from emulator.intercept.seccomp import Listener, Notification

STATUS = bytes(range(1, 13))
BEFORE = bytes(12)


@dataclass
class FakeListener:
    """One caller, who may be killed."""

    waits: bool = True
    answers: queue.SimpleQueue[int] = field(default_factory=queue.SimpleQueue)

    def is_valid(self, _call: Notification) -> bool:
        return self.waits

    def answer(self, _call: Notification, error: int = 0) -> None:
        self.answers.put(error)


@dataclass
class FakeLink:
    """A platform that answers a command after its caller was killed, or while it waits."""

    listener: FakeListener
    kills: bool

    def issue(self, command: int, _payload: bytes, *, writable: bool) -> bytes:
        assert (command, writable) == (DeviceCommand.PLATFORM_STATUS, True)
        self.listener.waits = not self.kills
        return STATUS

    def close(self) -> None:
        pass


@pytest.mark.parametrize("killed", [False, True])
def test_an_answer_is_written_to_nobody_else_than_who_waits_for_it(*, killed: bool) -> None:
    listener = FakeListener()
    link = FakeLink(listener, kills=killed)
    calls = Calls(cast("Listener", listener), cast("Link", link), flavour="legacy")
    data = ctypes.create_string_buffer(BEFORE, len(BEFORE))
    block = ISSUE_CMD.pack(DeviceCommand.PLATFORM_STATUS, ctypes.addressof(data), 0x55)
    issued = ctypes.create_string_buffer(block, len(block))
    descriptor = calls._file.open(os.O_RDWR)
    try:
        arguments = (descriptor, SEV_ISSUE_CMD, ctypes.addressof(issued), 0, 0, 0)
        calls.take(Notification(1, os.getpid(), SYS_IOCTL, arguments))
        listener.answers.get(timeout=10)
    finally:
        os.close(descriptor)
        calls.close()
    assert data.raw == (BEFORE if killed else STATUS)
    assert (issued.raw == block) == killed
