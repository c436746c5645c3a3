"""The processor: vendor, generation, what of SEV it has, which bit encrypts, and how its ASIDs are split.

Sources: AMD64 manual volume 3, appendix E (CPUID 8000001F: EAX bit 0 SME, 1 SEV, 2 page flush MSR, 3 SEV-ES, 4 SNP,
5 VMPL; EBX 5:0 C-bit, 11:6 physical address bits lost, 15:12 VMPLs; ECX guests at once; EDX lowest ASID of a guest
without SEV-ES), volume 2 section 15.34 (MSR C0010010: bit 23 memory encryption, 24 SNP, 25 VMPL); Linux
`arch/x86/kernel/cpu/amd.c`, which takes the flags out of /proc/cpuinfo where the BIOS has not set bit 23.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from common.sev.digest.cpus import CpuType, parse_cpu
from host_agent.doctor.findings import Finding, failed, passed, skipped, warned
from host_agent.doctor.machine import Machine, Registers, Unreadable

_ENCRYPTION_LEAF = 0x8000001F
_SYSCFG = 0xC0010010
SME, SEV, PAGE_FLUSH, SEV_ES, SNP, VMPL = range(6)  # bits of EAX
_FLAGS = {SME: "sme", SEV: "sev", SEV_ES: "sev_es", SNP: "sev_snp"}
SYSCFG_SME, SYSCFG_SNP, SYSCFG_VMPL = 23, 24, 25

# Family and models of the generations whose chips have a CEK; security.md 1.4, linux-firmware's file names.
_GENERATIONS: tuple[tuple[str, int, range], ...] = (
    ("naples", 0x17, range(0x10)),
    ("rome", 0x17, range(0x30, 0x40)),
    ("milan", 0x19, range(0x10)),
    ("genoa", 0x19, range(0x10, 0x20)),
    ("genoa", 0x19, range(0xA0, 0xB0)),
    ("turin", 0x1A, range(0x20)),
)


@dataclass(frozen=True, kw_only=True)
class Processor:
    """What is known of a processor.

    Attributes:
        vendor: `AuthenticAMD` or another.
        brand: its name.
        family: with the extended family added; None where not known.
        model: with the extended model.
        stepping: its revision.
        flags: of /proc/cpuinfo: what the kernel uses.
        encryption: CPUID 8000001F; None where CPUID cannot be read.
        syscfg: MSR C0010010; None where it cannot be read.
        blind: why CPUID, the MSR or both cannot be read; empty where both can.
    """

    vendor: str
    brand: str
    family: int | None
    model: int | None
    stepping: int | None
    flags: frozenset[str]
    encryption: Registers | None
    syscfg: int | None
    blind: str = ""

    @property
    def generation(self) -> str | None:
        """The EPYC generation, by the root that signs its chips; None for any other processor."""
        # Ryzen and Threadripper share families and models with EPYC.
        if self.vendor != "AuthenticAMD" or "EPYC" not in self.brand.upper() or self.model is None:
            return None
        return next((g for g, family, models in _GENERATIONS if self.family == family and self.model in models), None)

    @property
    def type(self) -> CpuType | None:
        """What a guest with `-cpu host` has for a processor; None where not known."""
        if self.family is None or self.model is None or self.stepping is None:
            return None
        return parse_cpu(f"{self.family}-{self.model}-{self.stepping}")

    def knows(self, bit: int) -> bool:
        """Whether anything tells of a bit of CPUID 8000001F EAX."""
        return self.encryption is not None or bit in _FLAGS

    def has(self, bit: int) -> bool:
        """Whether it has what a bit of CPUID 8000001F EAX says; by the kernel's word where CPUID cannot be read."""
        if self.encryption is not None:
            return bool(self.encryption.eax >> bit & 1)
        return _FLAGS.get(bit) in self.flags

    def switched_on(self, bit: int) -> bool | None:
        """Whether a bit of MSR C0010010 is set; None where nothing tells."""
        if self.syscfg is not None:
            return bool(self.syscfg >> bit & 1)
        # The kernel shows either flag only where the BIOS has switched memory encryption on.
        if bit == SYSCFG_SME and self.flags & {"sme", "sev"}:
            return True
        return None

    @property
    def c_bit(self) -> int | None:
        """Position of the encryption bit in page tables."""
        return None if self.encryption is None else self.encryption.ebx & 0x3F

    @property
    def es_asids(self) -> int | None:
        """How many guests with SEV-ES there can be: the ASIDs below the lowest that a guest without it may have."""
        return None if self.encryption is None else max(self.encryption.edx - 1, 0)


def look(machine: Machine) -> Processor:
    """The machine's processor, by CPUID, the MSR and /proc/cpuinfo, whichever can be read."""
    info = _cpuinfo(machine)
    flags = frozenset(info.get("flags", "").split())
    syscfg, blind = None, ""
    try:
        syscfg = machine.msr(_SYSCFG)
    except Unreadable as why:
        blind = why.message
    try:
        vendor = _letters(*(machine.cpuid(0)[at] for at in (1, 3, 2)))
        # Another vendor's processor answers for a leaf beyond its last with something else, not with nothing.
        last = machine.cpuid(0x80000000).eax
        encryption = machine.cpuid(_ENCRYPTION_LEAF) if last >= _ENCRYPTION_LEAF else Registers(0, 0, 0, 0)
        brand = _letters(*(register for leaf in range(0x80000002, 0x80000005) for register in machine.cpuid(leaf)))
        family, model, stepping = _signature(machine.cpuid(1).eax)
    except Unreadable as why:
        return Processor(
            vendor=info.get("vendor_id", ""),
            brand=info.get("model name", ""),
            family=_number(info.get("cpu family")),
            model=_number(info.get("model")),
            stepping=_number(info.get("stepping")),
            flags=flags,
            encryption=None,
            syscfg=syscfg,
            blind=f"{why.message}; {blind}" if blind else why.message,
        )
    return Processor(
        vendor=vendor,
        brand=brand,
        family=family,
        model=model,
        stepping=stepping,
        flags=flags,
        encryption=encryption,
        syscfg=syscfg,
        blind=blind,
    )


def probe(cpu: Processor, *, es: bool, c_bit: int | None) -> Iterator[Finding]:
    """What the processor means for launches.

    Args:
        cpu: what `look` found.
        es: whether guests with SEV-ES are to be launched; without it what they need only warns.
        c_bit: `qemu.cbitpos` of the agent's configuration; None without one.
    """
    if cpu.vendor != "AuthenticAMD":
        yield failed("cpu.vendor", f"{cpu.vendor or 'an unknown vendor'}", "SEV exists on AMD EPYC processors only")
        return
    yield passed("cpu.vendor", f"{cpu.vendor}, {cpu.brand.strip()}")
    yield _generation(cpu)
    yield _sme(cpu)
    yield _sev(cpu)
    yield _sev_es(cpu, es=es)
    if cpu.has(SEV):
        yield _asids(cpu, es=es)
        yield _c_bit(cpu, c_bit)


def _generation(cpu: Processor) -> Finding:
    numbers = "unknown family" if cpu.family is None else f"family {cpu.family:x}h model {cpu.model or 0:02x}h"
    if cpu.generation is None:
        advice = (
            "owners pin the roots of Naples, Rome, Milan, Genoa and Turin; another chip's certificates lead nowhere"
        )
        return warned("cpu.generation", f"{numbers} is no EPYC generation with SEV that is known here", advice)
    return passed("cpu.generation", f"{cpu.generation}, {numbers}")


def _sme(cpu: Processor) -> Finding:
    if not cpu.has(SME):
        return failed("cpu.sme", "the processor does not offer memory encryption", _absent(cpu))
    on = cpu.switched_on(SYSCFG_SME)
    if on is None:
        return skipped(
            "cpu.sme",
            f"offered; whether the BIOS has switched it on is not to be seen: {cpu.blind}",
            "`modprobe msr` and run this as root, or look for sme in /proc/cpuinfo",
        )
    if not on:
        return failed("cpu.sme", "offered, but not switched on", "enable SMEE (Secure Memory Encryption) in the BIOS")
    return passed("cpu.sme", "memory encryption is offered and switched on")


def _sev(cpu: Processor) -> Finding:
    if cpu.has(SEV):
        return passed("cpu.sev", "the processor offers SEV")
    return failed("cpu.sev", "the processor does not offer SEV", _absent(cpu))


def _sev_es(cpu: Processor, *, es: bool) -> Finding:
    if cpu.has(SEV_ES):
        return passed("cpu.sev_es", "the processor offers SEV-ES")
    complain = failed if es else warned
    return complain("cpu.sev_es", "the processor does not offer SEV-ES", _absent(cpu))


def _absent(cpu: Processor) -> str:
    if "hypervisor" in cpu.flags:
        return "this is a virtual machine: run it on the host itself, which is where guests are launched"
    return "this needs an EPYC 7001 (SEV-ES: 7002) or later, with SVM and SMEE enabled in the BIOS"


def _asids(cpu: Processor, *, es: bool) -> Finding:
    if cpu.encryption is None:
        return skipped("cpu.asids", f"not to be seen: {cpu.blind}", "run this as root, with the cpuid module loaded")
    total, lowest = cpu.encryption.ecx, cpu.encryption.edx
    encrypted_state = min(lowest - 1, total)
    plain = max(total - lowest + 1, 0)
    seen = f"{encrypted_state} for SEV-ES guests, {plain} for SEV guests"
    if lowest <= 1 and cpu.has(SEV_ES):
        complain = failed if es else warned
        advice = "raise the BIOS's `SEV-ES ASID Space Limit` from 1 to the number of SEV-ES guests wanted plus one"
        return complain("cpu.asids", f"0 for SEV-ES guests, {plain} for SEV guests", advice)
    if not plain and not es:
        return failed("cpu.asids", seen, "lower the BIOS's `SEV-ES ASID Space Limit`: it leaves none for SEV guests")
    return passed("cpu.asids", seen)


def _c_bit(cpu: Processor, configured: int | None) -> Finding:
    if cpu.c_bit is None:
        return skipped("cpu.c_bit", f"not to be seen: {cpu.blind}", "run this as root, with the cpuid module loaded")
    if configured is not None and configured != cpu.c_bit:
        return failed(
            "cpu.c_bit",
            f"{cpu.c_bit}, but qemu.cbitpos is {configured}",
            f"set qemu.cbitpos = {cpu.c_bit} in agent.toml",
        )
    return passed("cpu.c_bit", f"{cpu.c_bit}" if configured is None else f"{cpu.c_bit}, as in the configuration")


def _cpuinfo(machine: Machine) -> dict[str, str]:
    """The first processor's lines of /proc/cpuinfo."""
    with suppress(OSError):
        first = machine.text("/proc/cpuinfo").split("\n\n", 1)[0]
        pairs = (line.partition(":") for line in first.splitlines())
        return {key.strip(): value.strip() for key, _, value in pairs}
    return {}


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isascii() and text.isdigit() else None


def _letters(*registers: int) -> str:
    data = b"".join(register.to_bytes(4, "little") for register in registers)
    return data.decode("ascii", "replace").strip("\0 ")


def _signature(eax: int) -> tuple[int, int, int]:
    """Family, model and stepping of CPUID 1 EAX, for the families (0Fh and above) that have the extended fields."""
    return (eax >> 8 & 0xF) + (eax >> 20 & 0xFF), (eax >> 12 & 0xF0) | (eax >> 4 & 0xF), eax & 0xF
