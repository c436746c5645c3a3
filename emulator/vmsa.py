"""SEV-ES save areas as KVM builds them for QEMU's reset state, written apart from `common.sev.digest`.

One 4096-byte page a vCPU; AMD64 APM volume 2, table B-4 gives the places. Flavours differ in what KVM copies:

    legacy             KVM_SEV_ES_INIT: FPU control words stay zero
    legacy+debug-swap  the same with the debug-swap feature (kernels 6.6 to 6.8 had it on)
    init2              KVM_SEV_INIT2: MXCSR and FCW carry their reset values
    init2+debug-swap   the same with the debug-swap feature
    init2-ap-zero      INIT2 with a QEMU that leaves them zero for APs
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from common.sev.abi import VMSA_SIZE

_DEBUG_SWAP = 0x20
_CODE_BASE = 0xFFFF0000
# offset: (attributes, base); selector 0 and limit 0xffff everywhere, except for CS's selector
_SEGMENTS = {
    0x000: 0x93,  # ES
    0x020: 0x93,  # SS
    0x030: 0x93,  # DS
    0x040: 0x93,  # FS
    0x050: 0x93,  # GS
    0x060: 0,  # GDTR
    0x070: 0x82,  # LDTR
    0x080: 0,  # IDTR
    0x090: 0x8B,  # TR
}
_QUADS = {
    0x0D0: 0x1000,  # EFER: SVME, which KVM sets
    0x148: 0x40,  # CR4: MCE, which KVM sets
    0x158: 0x10,  # CR0
    0x160: 0x400,  # DR7
    0x168: 0xFFFF0FF0,  # DR6
    0x170: 0x2,  # RFLAGS
    0x268: 0x0007040600070406,  # PAT
    0x3E8: 0x1,  # XCR0
}


def signature(family: int, model: int, stepping: int) -> int:
    """CPUID leaf 1 EAX, which is in RDX at reset."""
    low = stepping & 0xF | (model & 0xF) << 4 | (model >> 4) << 16
    return low | (family << 8 if family <= 0xF else 0xF00 | (family - 0xF) << 20)


def save_areas(*, vcpus: int, cpu_signature: int, reset_address: int, flavour: str) -> Iterator[bytes]:
    """The pages in the order in which KVM measures them: boot CPU, then every AP.

    Args:
        vcpus: how many.
        cpu_signature: see `signature`.
        reset_address: where APs start, from the firmware's reset block.
        flavour: one of the names above.
    """
    kind, _, extra = flavour.partition("+")
    features = _DEBUG_SWAP if extra == "debug-swap" else 0
    boot_fpu, ap_fpu = kind != "legacy", kind == "init2"
    yield _page(_CODE_BASE, 0xFFF0, cpu_signature, features, fpu=boot_fpu)
    ap = _page(reset_address & 0xFFFF0000, reset_address & 0xFFFF, cpu_signature, features, fpu=ap_fpu)
    for _ in range(1, vcpus):
        yield ap


def _page(code_base: int, rip: int, cpu_signature: int, features: int, *, fpu: bool) -> bytes:
    page = bytearray(VMSA_SIZE)
    for at, attributes in _SEGMENTS.items():
        struct.pack_into("<HHIQ", page, at, 0, attributes, 0xFFFF, 0)
    struct.pack_into("<HHIQ", page, 0x010, 0xF000, 0x9B, 0xFFFF, code_base)  # CS
    for at, value in _QUADS.items():
        struct.pack_into("<Q", page, at, value)
    struct.pack_into("<Q", page, 0x178, rip)
    struct.pack_into("<Q", page, 0x310, cpu_signature)
    struct.pack_into("<Q", page, 0x3B0, features)
    if fpu:
        struct.pack_into("<I", page, 0x408, 0x1F80)  # MXCSR
        struct.pack_into("<H", page, 0x410, 0x037F)  # FCW
    return bytes(page)
