"""A save area held against the reset state that the real QEMU reports. Pure code.

What both must say alike: selectors, bases, limits and attributes of the segments, limits of the descriptor tables, RIP,
RFLAGS, RDX (the processor's signature), DR6 and DR7. Some fields are KVM's, not QEMU's, and differ by design:

    CR0     KVM clears CD and NW (KVM_X86_QUIRK_CD_NW_CLEARED)
    CR4     KVM sets MCE
    EFER    KVM sets SVME, without which no save area is valid
    MXCSR   and FCW: zero in the legacy flavour, reset values in the others (see `vmsa`)

Sources: AMD64 APM volume 2, table B-4; QEMU, target/i386/cpu-dump.c.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping

from common.sev.abi import VMSA_SIZE
from emulator.errors import MachineDied

KVM_SETS = {"CR0": (0x158, 8), "CR4": (0x148, 8), "EFER": (0x0D0, 8), "MXCSR": (0x408, 4), "FCW": (0x410, 2)}
_SEGMENTS = {
    "ES": 0x000,
    "CS": 0x010,
    "SS": 0x020,
    "DS": 0x030,
    "FS": 0x040,
    "GS": 0x050,
    "LDT": 0x070,
    "TR": 0x090,
}
_TABLES = {"GDT": 0x060, "IDT": 0x080}
_SEGMENT = struct.Struct("<HHIQ")  # selector, attributes, limit, base
_NUMBERS = {"EIP": (0x178, 8), "EFL": (0x170, 8), "EDX": (0x310, 8), "DR6": (0x168, 8), "DR7": (0x160, 8)}
_TOLD_SEGMENT = re.compile(
    r"^(ES|CS|SS|DS|FS|GS|LDT|TR) *= *([0-9a-f]{4}) ([0-9a-f]+) ([0-9a-f]{8}) ([0-9a-f]{8})", re.MULTILINE
)
_TOLD_TABLE = re.compile(r"^(GDT|IDT)= +([0-9a-f]+) ([0-9a-f]{8})", re.MULTILINE)
_TOLD_NUMBER = re.compile(r"\b(EIP|EFL|EDX|DR6|DR7|CR0|CR4|EFER|MXCSR|FCW)=([0-9a-f]+)")


def reset_state(told: str) -> dict[str, int]:
    """The registers in what `info registers` says of one processor, by name (`CS.base`, `EDX`, …).

    Raises:
        MachineDied: one is missing.
    """
    state: dict[str, int] = {}
    for name, selector, base, limit, flags in _TOLD_SEGMENT.findall(told):
        # The descriptor's second word: type, S, DPL and P from bit 8 on, the rest from bit 20 on.
        word = int(flags, 16)
        attributes = word >> 8 & 0xFF | word >> 12 & 0xF00
        state |= _segment(name, int(selector, 16), attributes, int(limit, 16), int(base, 16))
    for name, base, limit in _TOLD_TABLE.findall(told):
        state |= {f"{name}.base": int(base, 16), f"{name}.limit": int(limit, 16)}
    for name, value in _TOLD_NUMBER.findall(told):
        state.setdefault(name, int(value, 16))
    missing = sorted(({*saved_state(bytes(VMSA_SIZE)), *KVM_SETS}) - state.keys())
    if missing:
        raise MachineDied(f"info registers says nothing of {', '.join(missing)}")
    return state


def saved_state(page: bytes) -> dict[str, int]:
    """The same registers in a save area (4096 bytes), without those that KVM sets."""
    state: dict[str, int] = {}
    for name, at in _SEGMENTS.items():
        selector, attributes, limit, base = _SEGMENT.unpack_from(page, at)
        state |= _segment(name, selector, attributes, limit, base)
    for name, at in _TABLES.items():
        _, _, limit, base = _SEGMENT.unpack_from(page, at)
        state |= {f"{name}.base": base, f"{name}.limit": limit}
    return state | {name: _number(page, at, size) for name, (at, size) in _NUMBERS.items()}


def differences(page: bytes, told: Mapping[str, int]) -> Iterator[str]:
    """What a boot processor's save area and the machine say differently, one sentence each."""
    for name, value in saved_state(page).items():
        if told[name] != value:
            yield f"{name} is 0x{value:x} in the save area and 0x{told[name]:x} in the machine"


def ap_differences(page: bytes, reset_address: int) -> Iterator[str]:
    """What an AP's save area and the firmware's reset block say differently."""
    state = saved_state(page)
    for name, value in (("CS.base", reset_address & 0xFFFF0000), ("EIP", reset_address & 0xFFFF)):
        if state[name] != value:
            yield f"an AP's {name} is 0x{state[name]:x} in the save area and 0x{value:x} in the firmware's footer"


def _segment(name: str, selector: int, attributes: int, limit: int, base: int) -> dict[str, int]:
    return {
        f"{name}.selector": selector,
        f"{name}.attributes": attributes,
        f"{name}.limit": limit,
        f"{name}.base": base,
    }


def _number(page: bytes, at: int, size: int) -> int:
    return int.from_bytes(page[at : at + size], "little")
