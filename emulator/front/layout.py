"""Where the RAM of QEMU's PCs lies: how much of it is below 4 GiB. Pure code.

Sources: QEMU, hw/i386/pc_q35.c and hw/i386/pc_piix.c, machine types from 2.0 on.
"""

from __future__ import annotations

_FOUR_GIB = 1 << 32
_Q35_ALL, _Q35_SPLIT = 0xB0000000, 0x80000000  # RAM of so many bytes ends there instead
_I440FX_ALL, _I440FX_SPLIT = 0xE0000000, 0xC0000000
_I440FX = ("pc", "pc-i440fx-")


def low_ram(total: int, machine: str, limit: int | None) -> int:
    """Bytes of RAM from address 0 on; what is more begins at 4 GiB.

    Args:
        total: bytes of RAM.
        machine: the machine type; empty for QEMU's default.
        limit: `max-ram-below-4g`; None where it is not given.
    """
    if machine in {"", _I440FX[0]} or machine.startswith(_I440FX[1]):
        end = limit or _I440FX_ALL
        if total >= end:
            end = min(end, _I440FX_SPLIT)
    else:
        end = min(_Q35_SPLIT if total >= _Q35_ALL else _Q35_ALL, limit or _FOUR_GIB)
    return min(total, end)
