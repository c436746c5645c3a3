"""Connections to the served platform, with everything that can go wrong in the kernel's numbers."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from emulator.device_client import Device
from emulator.errors import KernelRefused


@contextmanager
def in_kernel_numbers() -> Iterator[None]:
    """Turn a platform that hangs into ETIMEDOUT and one that went away into ENODEV, as its driver would.

    Raises:
        KernelRefused: one of the two.
    """
    try:
        yield
    except TimeoutError as error:
        raise KernelRefused(errno.ETIMEDOUT) from error
    except OSError as error:
        raise KernelRefused(errno.ENODEV) from error


class Link:
    """What every open /dev/sev shares: one connection that may write and one that may not.

    Device commands leave nothing behind on a connection, so that two are enough for all. Each is made when it is first
    needed, and made again after it broke.
    """

    def __init__(self, socket: Path) -> None:
        self._socket = socket
        self._devices: dict[bool, Device] = {}

    def connect(self, *, writable: bool = True) -> Device:
        """A connection of its own, which holds a guest.

        Raises:
            KernelRefused: ENODEV or ETIMEDOUT; nobody serves the platform.
        """
        with in_kernel_numbers():
            return Device(self._socket, writable=writable)

    def issue(self, command: int, payload: bytes, *, writable: bool) -> bytes:
        """What the platform answers to a device command.

        Raises:
            CommandFailed: its refusal.
            KernelRefused: ENODEV or ETIMEDOUT; there was no answer.
        """
        device = self._devices.get(writable) or self.connect(writable=writable)
        self._devices[writable] = device
        try:
            with in_kernel_numbers():
                return device.issue(command, payload)
        except KernelRefused:
            self._devices.pop(writable).close()
            raise

    def close(self) -> None:
        """Close both connections."""
        while self._devices:
            self._devices.popitem()[1].close()
