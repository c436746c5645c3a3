"""The register pages (VMSA) of an SEV-ES guest as they are measured: one for the boot CPU, one for each of the others.

Sources: AMD64 manual volume 2, table B-4 (offsets); QEMU `x86_cpu_reset` and KVM's `sev_es_sync_vmsa` (values);
formats.md section 7, notes A13 and A14. QEMU guests only: no other machine monitor's pages are confirmed for SEV-ES.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from enum import StrEnum

from common.errors import InvalidInput, Reason
from common.sev.abi import VMSA_SIZE
from common.sev.digest.cpus import CpuType

VCPUS_MAX = 64

_DEBUG_SWAP = 0x20  # sev_features: the CPU swaps debug registers
_BOOT_ADDRESS = 0xFFFFFFF0

_SEGMENT = struct.Struct("<HHIQ")  # selector, attributes, limit, base
_SEGMENTS: tuple[tuple[int, int, int], ...] = (  # offset, selector, attributes; CS is set apart
    (0x000, 0, 0x93),  # ES
    (0x020, 0, 0x93),  # SS
    (0x030, 0, 0x93),  # DS
    (0x040, 0, 0x93),  # FS
    (0x050, 0, 0x93),  # GS
    (0x060, 0, 0x00),  # GDTR
    (0x070, 0, 0x82),  # LDTR
    (0x080, 0, 0x00),  # IDTR
    (0x090, 0, 0x8B),  # TR
)
_CS_OFFSET = 0x010
_RIP_OFFSET = 0x178
_RDX_OFFSET = 0x310
_SEV_FEATURES_OFFSET = 0x3B0
_REGISTERS: tuple[tuple[int, int], ...] = (  # offset, 64-bit value
    (0x0D0, 0x1000),  # EFER: KVM sets SVME
    (0x148, 0x40),  # CR4: KVM sets MCE
    (0x158, 0x10),  # CR0
    (0x160, 0x400),  # DR7
    (0x168, 0xFFFF0FF0),  # DR6
    (0x170, 0x2),  # RFLAGS
    (0x268, 0x0007040600070406),  # PAT
    (0x3E8, 0x1),  # XCR0
)
_MXCSR_OFFSET, _MXCSR = 0x408, 0x1F80  # 32 bits
_FCW_OFFSET, _FCW = 0x410, 0x037F  # 16 bits


class Flavour(StrEnum):
    """Which pages the host's kernel and QEMU make of the same guest. The owner pins one; none is guessed.

    `legacy` comes from KVM_SEV_ES_INIT, `init2` from KVM_SEV_INIT2, which also takes over the FPU's control words;
    `debug-swap` is the kernel's option of that name; `init2-ap-zero` is what QEMU 10.1 may make: FPU words for the
    boot CPU only.
    """

    LEGACY = "legacy"
    LEGACY_DEBUG_SWAP = "legacy+debug-swap"
    INIT2 = "init2"
    INIT2_DEBUG_SWAP = "init2+debug-swap"
    INIT2_AP_ZERO = "init2-ap-zero"


_DEBUG_SWAPPED = frozenset({Flavour.LEGACY_DEBUG_SWAP, Flavour.INIT2_DEBUG_SWAP})
_BOOT_FPU = frozenset({Flavour.INIT2, Flavour.INIT2_DEBUG_SWAP, Flavour.INIT2_AP_ZERO})
_AP_FPU = frozenset({Flavour.INIT2, Flavour.INIT2_DEBUG_SWAP})


def boot_page(*, cpu: CpuType, flavour: Flavour) -> bytes:
    """The boot CPU's page, 4096 bytes."""
    return _page(cpu=cpu, address=_BOOT_ADDRESS, flavour=flavour, fpu=flavour in _BOOT_FPU)


def ap_page(*, cpu: CpuType, flavour: Flavour, reset_address: int) -> bytes:
    """The page of every other CPU, 4096 bytes; `reset_address` is the firmware's, from its footer."""
    return _page(cpu=cpu, address=reset_address, flavour=flavour, fpu=flavour in _AP_FPU)


def vmsa_pages(*, vcpus: int, cpu: CpuType, flavour: Flavour, reset_address: int | None) -> Iterator[bytes]:
    """The pages in the order in which they are measured, 4096 bytes each.

    Args:
        vcpus: how many, 1 to 64.
        cpu: the CPU type that the guest sees.
        flavour: how the host's kernel and QEMU make the pages.
        reset_address: from the firmware's footer; needed for more than one vCPU.

    Raises:
        InvalidInput: the number is out of range, or the address is missing.
    """
    require_vcpus(vcpus, reset_address)
    return _pages(vcpus, cpu, flavour, reset_address)


def require_vcpus(vcpus: int, reset_address: int | None) -> None:
    """Refuse a number of vCPUs that cannot be measured.

    Raises:
        InvalidInput: it is not 1 to 64, or there is more than one and no reset address.
    """
    if not 1 <= vcpus <= VCPUS_MAX:
        raise InvalidInput(Reason.INVALID_ARGUMENT, f"a guest has 1 to {VCPUS_MAX} vCPUs, not {vcpus}")
    if vcpus > 1 and reset_address is None:
        raise InvalidInput(
            Reason.INVALID_ARGUMENT,
            "the firmware says no SEV-ES reset address, which more than one vCPU needs",
        )


def _pages(vcpus: int, cpu: CpuType, flavour: Flavour, reset_address: int | None) -> Iterator[bytes]:
    yield boot_page(cpu=cpu, flavour=flavour)
    if reset_address is not None:
        page = ap_page(cpu=cpu, flavour=flavour, reset_address=reset_address)
        for _ in range(vcpus - 1):
            yield page


def _page(*, cpu: CpuType, address: int, flavour: Flavour, fpu: bool) -> bytes:
    page = bytearray(VMSA_SIZE)
    for offset, selector, attributes in _SEGMENTS:
        _SEGMENT.pack_into(page, offset, selector, attributes, 0xFFFF, 0)
    _SEGMENT.pack_into(page, _CS_OFFSET, 0xF000, 0x9B, 0xFFFF, address & 0xFFFF0000)
    for offset, value in _REGISTERS:
        struct.pack_into("<Q", page, offset, value)
    struct.pack_into("<Q", page, _RIP_OFFSET, address & 0xFFFF)
    struct.pack_into("<Q", page, _RDX_OFFSET, cpu.signature)
    if flavour in _DEBUG_SWAPPED:
        struct.pack_into("<Q", page, _SEV_FEATURES_OFFSET, _DEBUG_SWAP)
    if fpu:
        struct.pack_into("<I", page, _MXCSR_OFFSET, _MXCSR)
        struct.pack_into("<H", page, _FCW_OFFSET, _FCW)
    return bytes(page)
