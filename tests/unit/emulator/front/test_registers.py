"""A save area against what a real QEMU says of its registers: every field that is compared shows when it differs."""

from __future__ import annotations

import re
import struct

import pytest

from emulator import vmsa
from emulator.errors import MachineDied
from emulator.front.registers import KVM_SETS, ap_differences, differences, reset_state, saved_state

# `info registers` of QEMU 7.2, pc-q35, EPYC-Rome, before its first instruction.
TOLD = """\
CPU#0
EAX=00000000 EBX=00000000 ECX=00000000 EDX=00830f10
ESI=00000000 EDI=00000000 EBP=00000000 ESP=00000000
EIP=0000fff0 EFL=00000002 [-------] CPL=0 II=0 A20=1 SMM=0 HLT=0
ES =0000 00000000 0000ffff 00009300
CS =f000 ffff0000 0000ffff 00009b00
SS =0000 00000000 0000ffff 00009300
DS =0000 00000000 0000ffff 00009300
FS =0000 00000000 0000ffff 00009300
GS =0000 00000000 0000ffff 00009300
LDT=0000 00000000 0000ffff 00008200
TR =0000 00000000 0000ffff 00008b00
GDT=     00000000 0000ffff
IDT=     00000000 0000ffff
CR0=60000010 CR2=00000000 CR3=00000000 CR4=00000000
DR0=0000000000000000 DR1=0000000000000000 DR2=0000000000000000 DR3=0000000000000000
DR6=00000000ffff0ff0 DR7=0000000000000400
EFER=0000000000000000
FCW=037f FSW=0000 [ST=0] FTW=00 MXCSR=00001f80
FPR0=0000000000000000 0000 FPR1=0000000000000000 0000
"""
ROME = vmsa.signature(23, 49, 0)


def pages(flavour: str = "legacy") -> list[bytes]:
    return list(vmsa.save_areas(vcpus=2, cpu_signature=ROME, reset_address=0x80B004, flavour=flavour))


@pytest.mark.parametrize("flavour", ["legacy", "legacy+debug-swap", "init2", "init2+debug-swap", "init2-ap-zero"])
def test_a_boot_processors_save_area_is_the_reset_state(flavour: str) -> None:
    assert list(differences(pages(flavour)[0], reset_state(TOLD))) == []


# In the text: the name of a field, and where its number stands.
SEGMENTS = ("ES", "CS", "SS", "DS", "FS", "GS", "LDT", "TR")
FIELDS = {f"{name}.{part}": (name, at) for name in SEGMENTS for at, part in enumerate(("selector", "base", "limit"))}
FIELDS |= {f"{name}.{part}": (name, at) for name in ("GDT", "IDT") for at, part in enumerate(("base", "limit"))}
FIELDS |= {name: (name, 0) for name in ("EIP", "EFL", "EDX", "DR6", "DR7")}


def changed(name: str, at: int) -> str:
    """The text with the lowest bit of one number changed."""
    found = re.search(rf"\b{name} ?= *((?:[0-9a-f]+ ?)+)", TOLD)
    assert found is not None
    numbers = found[1].split(" ")
    numbers[at] = f"{int(numbers[at], 16) ^ 1:0{len(numbers[at])}x}"
    return TOLD[: found.start(1)] + " ".join(numbers) + TOLD[found.end(1) :]


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_that_differs_is_named(field: str) -> None:
    (found,) = differences(pages()[0], reset_state(changed(*FIELDS[field])))
    assert found.startswith(f"{field} is 0x")


@pytest.mark.parametrize("name", SEGMENTS)
@pytest.mark.parametrize("bit", [8, 9, 12, 13, 15, 20, 21, 22, 23])
def test_every_bit_of_a_segments_attributes_counts(name: str, bit: int) -> None:
    found = re.search(rf"^{name} *=\S+ \S+ \S+ ([0-9a-f]+)", TOLD, re.MULTILINE)
    assert found is not None
    text = TOLD[: found.start(1)] + f"{int(found[1], 16) ^ 1 << bit:08x}" + TOLD[found.end(1) :]
    (difference,) = differences(pages()[0], reset_state(text))
    assert difference.startswith(f"{name}.attributes is 0x")


def test_the_fields_that_are_compared_are_these_and_no_fewer() -> None:
    names = set(FIELDS) | {f"{name}.attributes" for name in SEGMENTS}
    assert set(saved_state(pages()[0])) == names


def test_what_kvm_sets_differs_as_documented_and_is_not_compared() -> None:
    told = reset_state(TOLD)
    for flavour, fpu in (("legacy", (0, 0)), ("init2", (0x1F80, 0x37F))):
        page = pages(flavour)[0]
        saved = {name: int.from_bytes(page[at : at + size], "little") for name, (at, size) in KVM_SETS.items()}
        assert saved == {
            "CR0": told["CR0"] & ~0x60000000,
            "CR4": told["CR4"] | 0x40,
            "EFER": 0x1000,
            "MXCSR": fpu[0],
            "FCW": fpu[1],
        }
    for name in KVM_SETS:
        assert list(differences(pages()[0], reset_state(changed(name, 0)))) == []


def test_every_byte_of_a_save_area_that_has_a_compared_field_counts() -> None:
    page, told = pages()[0], reset_state(TOLD)
    places = {at for start in range(0, 0xA0, 16) for at in range(start, start + 16)}
    # Of the descriptor tables QEMU says neither selector nor attributes, for there are none.
    places -= {at for start in (0x60, 0x80) for at in range(start, start + 4)}
    places |= {at for start in (0x160, 0x168, 0x170, 0x178, 0x310) for at in range(start, start + 8)}
    for at in range(len(page)):
        flipped = page[:at] + bytes([page[at] ^ 0x80]) + page[at + 1 :]
        assert bool(list(differences(flipped, told))) == (at in places), hex(at)


def test_an_ap_starts_where_the_footer_says() -> None:
    boot, ap = pages()
    assert list(ap_differences(ap, 0x80B004)) == []
    assert len(list(ap_differences(ap, 0x81B005))) == 2
    assert len(list(ap_differences(boot, 0x80B004))) == 2


@pytest.mark.parametrize("name", ["EDX", "CS", "GDT", "EFER", "MXCSR", "DR7"])
def test_a_register_that_nobody_speaks_of_is_missed(name: str) -> None:
    with pytest.raises(MachineDied, match=f"says nothing of .*{name}"):
        reset_state(re.sub(rf"\b{name} ?=", "XX=", TOLD))


def test_the_text_is_of_the_processor_that_the_signature_names() -> None:
    assert reset_state(TOLD)["EDX"] == ROME
    assert struct.unpack_from("<Q", pages()[0], 0x310) == (ROME,)
