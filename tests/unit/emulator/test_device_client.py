"""The device's client: an answer that comes too late is nobody's."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from emulator.device_client import Device


@contextlib.contextmanager
def platform_that_answers_late(path: Path, gone: threading.Event) -> Iterator[None]:
    """A platform that answers OPEN, and the command after it once `gone` is set."""

    def serve() -> None:
        with listener.accept()[0] as peer, contextlib.suppress(ConnectionError):
            peer.recv(12, socket.MSG_WAITALL)
            peer.sendall(struct.pack("<iII", 0, 0, 0))
            peer.recv(8, socket.MSG_WAITALL)
            gone.wait(30)
            peer.sendall(struct.pack("<iII", 0, 0, 4) + b"late")

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen(1)
        thread = threading.Thread(target=serve)
        thread.start()
        yield
        gone.set()
        thread.join()


def test_after_a_time_out_no_later_command_gets_the_late_answer(tmp_path: Path) -> None:
    gone = threading.Event()
    with platform_that_answers_late(tmp_path / "s", gone), Device(tmp_path / "s") as device:
        device._socket.settimeout(0.2)  # which opening need not keep on a slow machine
        with pytest.raises(TimeoutError):
            device.issue(1)
        gone.set()
        with pytest.raises(OSError, match="Bad file descriptor"):
            device.issue(1)
