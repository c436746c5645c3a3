"""Another process's memory: tried on this one's, whose addresses are known."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from emulator.errors import KernelRefused
from emulator.intercept.memory import Memory

PAGE = mmap.PAGESIZE
_PROT_NONE = 0


@pytest.fixture
def memory() -> Memory:
    return Memory(os.getpid())


@pytest.fixture
def page() -> Iterator[tuple[mmap.mmap, int]]:
    """A page and its address; the page behind it cannot be read."""
    pages = mmap.mmap(-1, 2 * PAGE)
    view = ctypes.c_char.from_buffer(pages)
    address = ctypes.addressof(view)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    assert libc.mprotect(address + PAGE, PAGE, _PROT_NONE) == 0
    yield pages, address
    del view
    pages.close()


def fault(action: Callable[[], object]) -> int:
    with pytest.raises(KernelRefused) as caught:
        action()
    return caught.value.errno


def test_what_is_written_is_read(memory: Memory) -> None:
    buffer = ctypes.create_string_buffer(b"before", 6)
    at = ctypes.addressof(buffer)
    assert memory.read(at, 6) == b"before"
    memory.write(at, b"after!")
    assert buffer.raw == b"after!"


def test_nothing_can_be_read_and_written_anywhere(memory: Memory) -> None:
    assert memory.read(0, 0) == b""
    memory.write(0, b"")


@pytest.mark.parametrize("address", [0, 1, 1 << 47, (1 << 64) - 1])
def test_an_address_that_is_nobodys_is_a_fault(memory: Memory, address: int) -> None:
    assert fault(lambda: memory.read(address, 4)) == errno.EFAULT
    assert fault(lambda: memory.write(address, b"data")) == errno.EFAULT


def test_what_reaches_into_a_page_that_is_not_there_is_a_fault(memory: Memory, page: tuple[mmap.mmap, int]) -> None:
    pages, address = page
    end = address + PAGE
    pages[PAGE - 4 : PAGE] = b"last"
    assert memory.read(end - 4, 4) == b"last"
    assert fault(lambda: memory.read(end - 4, 5)) == errno.EFAULT
    assert fault(lambda: memory.write(end - 4, b"12345")) == errno.EFAULT


def test_a_process_that_is_gone_is_a_fault() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert fault(lambda: Memory(gone.pid).read(1 << 20, 1)) == errno.EFAULT


@pytest.mark.parametrize(
    ("content", "path"),
    [
        (b"/dev/sev\0", b"/dev/sev"),
        (b"/dev/sev\0more", b"/dev/sev"),
        (b"\0/dev/sev", b""),
        (b"/" * 4095, b"/" * 4095),
        (b"/" * 4096, None),
    ],
)
def test_a_path_ends_at_its_first_nul_and_is_no_longer_than_the_kernel_takes(
    memory: Memory, content: bytes, path: bytes | None
) -> None:
    buffer = ctypes.create_string_buffer(content)
    assert memory.path(ctypes.addressof(buffer)) == path


@pytest.mark.parametrize("path", [b"/dev/sev", b"/tmp", b"/", b"", b"/" * 300])
def test_a_path_may_end_where_the_memory_does(memory: Memory, page: tuple[mmap.mmap, int], path: bytes) -> None:
    pages, address = page
    pages[PAGE - len(path) - 1 : PAGE] = path + b"\0"
    assert memory.path(address + PAGE - len(path) - 1) == path


def test_a_path_may_lie_on_two_pages(memory: Memory) -> None:
    pages = mmap.mmap(-1, 2 * PAGE)
    view = ctypes.c_char.from_buffer(pages)
    pages[PAGE - 3 : PAGE + 6] = b"/dev/sev\0"
    assert memory.path(ctypes.addressof(view) + PAGE - 3) == b"/dev/sev"
    del view
    pages.close()


def test_a_path_that_is_cut_off_by_the_memory_is_none(memory: Memory, page: tuple[mmap.mmap, int]) -> None:
    pages, address = page
    pages[PAGE - 8 : PAGE] = b"/dev/sev"
    assert memory.path(address + PAGE - 8) is None
    assert memory.path(0) is None
