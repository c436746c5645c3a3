"""What KVM pins of a SEV guest, and whether this process and the machines that it starts may lock that much.

Source: Linux, arch/x86/kvm/svm/sev.c, `sev_pin_memory`: what a machine has pinned counts against RLIMIT_MEMLOCK,
machine by machine, unless the process has CAP_IPC_LOCK; beyond it ENOMEM. QEMU registers its RAM and its flash with
KVM, so both are pinned while the guest lives. What is read of /proc comes in as text.
"""

from __future__ import annotations

import re
import resource
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

from common.errors import InvalidInput, Reason
from host_agent.hypervisors.options import Options

# Bytes that may be locked; None where nothing limits them.
LockLimit: TypeAlias = Callable[[], int | None]

ADVICE = "set LimitMEMLOCK=infinity in the agent's unit, or memlock in limits.conf"
_CAP_IPC_LOCK = 14  # linux/capability.h
_STATUS = Path("/proc/self/status")


def pinned(options: Options, firmware_size: int) -> int | None:
    """Bytes that are pinned at least: RAM and flash. None where the size of the RAM is not understood.

    Args:
        options: the guest's.
        firmware_size: bytes of its firmware image.
    """
    ram = options.memory
    return None if ram is None else ram + firmware_size


def limit_of(soft: int, status: str) -> int | None:
    """What a process may lock.

    Args:
        soft: its RLIMIT_MEMLOCK in bytes; negative is unlimited.
        status: its /proc/PID/status.

    Returns:
        Bytes; None where nothing limits them.
    """
    found = re.search(r"^CapEff:\s*([0-9a-fA-F]+)$", status, re.MULTILINE)
    may_lock = found is not None and bool(int(found[1], 16) >> _CAP_IPC_LOCK & 1)
    return None if soft < 0 or may_lock else soft


def own_limit() -> int | None:
    """What this process may lock now, and so the machines that it starts; None where nothing limits them."""
    try:
        status = _STATUS.read_text(encoding="utf-8")
    except OSError:
        status = ""
    return limit_of(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0], status)


def check(guest: str, args: Sequence[str], firmware: Path, limit: int | None) -> None:
    """Refuse a guest that could not be pinned: better said now than by a dying QEMU.

    Args:
        guest: its name, for the message.
        args: QEMU's arguments.
        firmware: its image; one that cannot be read is for others to complain of.
        limit: bytes that may be locked; None where nothing limits them.

    Raises:
        InvalidInput: `INVALID_CONFIGURATION`; its hint says what to set.
    """
    if limit is None:
        return
    size = firmware.stat().st_size if firmware.is_file() else 0
    wanted = pinned(Options(args), size)
    if wanted is not None and wanted > limit:
        raise InvalidInput(
            Reason.INVALID_CONFIGURATION,
            f"guests.{guest}: KVM pins a SEV guest's memory, here {wanted >> 10} KiB of RAM and flash, and the agent"
            f" may lock {limit >> 10} KiB (RLIMIT_MEMLOCK, LimitMEMLOCK= of its unit)",
            hint=ADVICE,
        )
