"""The file behind /dev/sev: by which names it is known, and that nobody leaves anything in it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from emulator.intercept.dev_sev import DeviceFile, is_path


@pytest.fixture
def opened() -> Iterator[int]:
    """A descriptor as a program gets it."""
    file = DeviceFile()
    descriptor = file.open(os.O_RDWR)
    try:
        assert file.is_behind(os.getpid(), descriptor)
        yield descriptor
    finally:
        os.close(descriptor)
        file.close()


@pytest.mark.parametrize("path", ["/dev/sev", "//dev/sev", "/dev//sev", "/dev/./sev", "/./dev/.//./sev"])
def test_a_path_that_says_nothing_else_is_the_device(path: str) -> None:
    assert is_path(path.encode())


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/",
        "sev",
        "dev/sev",
        "./dev/sev",
        "/dev",
        "/dev/sev/",
        "/dev/sev/.",
        "/dev/sevv",
        "/dev/../dev/sev",
        "/dev/.../sev",
        "/dev/sev/sev",
        "/proc/self/root/dev/sev",
    ],
)
def test_a_path_that_may_lead_elsewhere_is_not(path: str) -> None:
    assert not is_path(path.encode())


@pytest.mark.parametrize(
    "write",
    [
        lambda descriptor: os.write(descriptor, b"secret"),
        lambda descriptor: os.ftruncate(descriptor, 1 << 26),
        lambda descriptor: os.posix_fallocate(descriptor, 0, 1 << 26),
    ],
    ids=["write", "ftruncate", "fallocate"],
)
def test_nobody_leaves_anything_in_it_for_another(opened: int, write: Callable[[int], object]) -> None:
    with pytest.raises(PermissionError):
        write(opened)
    assert os.fstat(opened).st_size == 0
    assert os.read(opened, 1) == b""
