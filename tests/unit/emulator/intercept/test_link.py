"""Connections to the platform: what goes wrong with them, in the kernel's numbers."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from common.sev.abi import DeviceCommand
from emulator.errors import KernelRefused
from emulator.intercept.link import Link, in_kernel_numbers
from tests.support.platform import running_platform

STATUS = DeviceCommand.PLATFORM_STATUS


def refusal(link: Link) -> int:
    with pytest.raises(KernelRefused) as caught:
        link.issue(STATUS, b"", writable=True)
    return caught.value.errno


def test_a_platform_that_comes_back_is_found_again(tmp_path: Path) -> None:
    link = Link(tmp_path / "p" / "sev.sock")
    assert refusal(link) == errno.ENODEV
    for _ in range(2):
        with running_platform(tmp_path / "p"):
            assert len(link.issue(STATUS, b"", writable=True)) == 12
        assert refusal(link) == errno.ENODEV
    link.close()


def test_one_connection_is_enough_for_many_commands(tmp_path: Path) -> None:
    with running_platform(tmp_path / "p", options=["--no-init"]) as served:
        link = Link(served.socket)
        for _ in range(50):
            link.issue(STATUS, b"", writable=True)
            link.issue(STATUS, b"", writable=False)
        assert len(link._devices) == 2
        link.close()
        assert not link._devices


@pytest.mark.parametrize(
    ("error", "number"),
    [(TimeoutError(), errno.ETIMEDOUT), (ConnectionResetError(), errno.ENODEV), (OSError(), errno.ENODEV)],
)
def test_a_broken_connection_is_the_kernels_error(error: OSError, number: int) -> None:
    with pytest.raises(KernelRefused) as caught, in_kernel_numbers():
        raise error
    assert caught.value.errno == number
