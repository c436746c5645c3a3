"""What /proc says of another process: whose a thread is, and what its descriptors are. Source: proc(5)."""

from __future__ import annotations

import os
from pathlib import Path


def process_of(thread: int) -> int | None:
    """The process that a thread belongs to; None when it is gone."""
    found = _field(f"/proc/{thread}/status", "Tgid:")
    return None if found is None else int(found)


def name_of(thread: int, descriptor: int) -> str:
    """What a descriptor is a link to (`anon_inode:kvm-vm`); empty when there is no such descriptor."""
    try:
        return os.readlink(f"/proc/{thread}/fd/{descriptor}")  # noqa: PTH115 -- the target is no path
    except OSError:
        return ""


def inode_of(thread: int, descriptor: int) -> tuple[int, int] | None:
    """Device and inode of the file behind a descriptor; None when there is no such descriptor."""
    try:
        status = Path(f"/proc/{thread}/fd/{descriptor}").stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def is_closed(thread: int, descriptor: int) -> bool:
    """Whether there is no such descriptor; False where /proc does not let us see it."""
    try:
        Path(f"/proc/{thread}/fd/{descriptor}").lstat()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return False


def access_of(thread: int, descriptor: int) -> int:
    """How a descriptor was opened: O_RDONLY, O_WRONLY or O_RDWR; O_RDONLY when there is no such descriptor."""
    found = _field(f"/proc/{thread}/fdinfo/{descriptor}", "flags:")
    return os.O_RDONLY if found is None else int(found, 8) & os.O_ACCMODE


def children_of(process: int) -> list[int]:
    """Its children (of its first thread); none where the kernel does not tell."""
    try:
        return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:
        return []


def _field(file: str, name: str) -> str | None:
    try:
        with open(file, encoding="ascii", errors="replace") as lines:  # noqa: PTH123 -- asked at each call
            return next((line.split()[1] for line in lines if line.startswith(name)), None)
    except OSError:
        return None
