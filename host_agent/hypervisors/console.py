"""The file that takes a machine's stdout and stderr: bounded, and read for its last words.

A file and not a pipe, because the machine outlives the agent: nobody must be there to drain it. The bound is kept by
cutting the file where it grew too long; the machine writes in append mode and does not notice.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import BinaryIO

from common.errors import PlatformFailed, Reason
from host_agent.firmware_errors import find_firmware_error, printable

LOG = "machine.log"
_BOUND = 256 * 1024
_KEPT = 64 * 1024
_TAIL = 16 * 1024
_QEMU = re.compile(r"^(qemu[\w.+-]*|kvm): ")  # Proxmox VE's QEMU is called kvm
_SEV = re.compile(r"\bsev_\w+: ")  # a function of QEMU's target/i386/sev.c


def open_log(folder: Path) -> BinaryIO:
    """A fresh log in the launch's folder, private, in append mode.

    Raises:
        PlatformFailed: `HYPERVISOR_FAILED`; it cannot be written.
    """
    try:
        descriptor = os.open(
            folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
        )
    except OSError as error:
        raise PlatformFailed(
            Reason.HYPERVISOR_FAILED, f"the machine's log cannot be written: {error.strerror or error}"
        ) from error
    return open(descriptor, "ab", buffering=0)  # noqa: PTH123 -- from a descriptor, closed by the caller


def trim_log(folder: Path) -> None:
    """Cut the log to its last 64 KiB where it has more than 256 KiB. What arrives while it is cut may be lost."""
    try:
        with (folder / LOG).open("r+b") as file:
            size = file.seek(0, os.SEEK_END)
            if size <= _BOUND:
                return
            file.seek(size - _KEPT)
            kept = file.read(_KEPT)
            file.seek(0)
            file.truncate()
            file.write(kept)
    except OSError:
        return


def last_words(folder: Path, program: str) -> str:
    """The sentence that tells best why the machine died; empty if it said nothing.

    QEMU says what the firmware answered first, and then in more and more general terms that it gives up: a line with a
    firmware status counts more than another of its SEV code, that more than its last line ("failed to initialize kvm"),
    and QEMU's own more than that of whoever started it.
    """
    try:
        with (folder / LOG).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL))
            tail = file.read(_TAIL)
    except OSError:
        return ""
    lines = [line for raw in tail.decode("utf-8", "replace").splitlines() if (line := raw.strip())]
    if not lines:
        return ""
    by_weight = (
        [line for line in lines if find_firmware_error(line) is not None],
        [line for line in lines if _QEMU.match(line) and _SEV.search(line)],
        [line for line in lines if _QEMU.match(line)],
        lines,
    )
    words = next(kind for kind in by_weight if kind)[-1]
    # The program's own name in front, or the QEMU's behind it.
    return printable(_QEMU.sub("", words.removeprefix(f"{Path(program).name}: "), count=1))
