"""The checks of `sevctl ok` (0.6.2): the same tree, names, messages and verdicts.

One thing differs: what cannot be read here (CPUID or MSRs) is skipped and says why, where sevctl calls it a failure.
A row is skipped without being looked at when the row above it does not pass, or when it is about a later generation
than the one that was asked for, or than the processor's own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

from host_agent.doctor import processor
from host_agent.doctor.findings import Outcome
from host_agent.doctor.kernel import KVM_PARAMETERS
from host_agent.doctor.machine import Machine, Registers
from host_agent.doctor.processor import Processor

DEVICE = "/dev/sev"
KVM = "/dev/kvm"


class Generation(IntEnum):
    """What a row is about; each includes the ones before."""

    SEV = 0
    ES = 1
    SNP = 2


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of the report.

    Attributes:
        outcome: PASS, FAIL or SKIP.
        depth: how deep in the tree, from 0.
        name: what was checked.
        message: what was seen; may be empty.
    """

    outcome: Outcome
    depth: int
    name: str
    message: str = ""

    def __str__(self) -> str:
        text = f"[ {self.outcome} ] {'  ' * self.depth}- {self.name}"
        return f"{text}: {self.message}" if self.message else text


_Result = tuple[Outcome, str, str]  # verdict, name, message


@dataclass(frozen=True, kw_only=True)
class _Row:
    """A check, and those that make sense only when it passes.

    Attributes:
        name: as the row is called when it is skipped.
        about: the generation that has it.
        check: looks.
        rows: below it.
    """

    name: str
    check: Callable[[Machine, Processor], _Result]
    about: Generation = Generation.SEV
    rows: tuple[_Row, ...] = ()


def examine(machine: Machine, asked: Generation | None) -> Iterator[Line]:
    """The report, line by line.

    Args:
        machine: to look at.
        asked: the generation to look for; the processor's own when None.
    """
    cpu = processor.look(machine)
    yield from _walk(_ROWS, 0, machine, cpu, _own_generation(cpu) if asked is None else asked)


def _walk(rows: Sequence[_Row], depth: int, machine: Machine, cpu: Processor, asked: Generation) -> Iterator[Line]:
    for row in rows:
        if row.about > asked:
            yield from _skipped((row,), depth)
            continue
        outcome, name, message = row.check(machine, cpu)
        yield Line(outcome=outcome, depth=depth, name=name, message=message)
        if outcome is Outcome.PASS:
            yield from _walk(row.rows, depth + 1, machine, cpu, asked)
        else:
            yield from _skipped(row.rows, depth + 1)


def _skipped(rows: Sequence[_Row], depth: int) -> Iterator[Line]:
    for row in rows:
        yield Line(outcome=Outcome.SKIP, depth=depth, name=row.name)
        yield from _skipped(row.rows, depth + 1)


def _own_generation(cpu: Processor) -> Generation:
    """By family and model, as sevctl has it: everything is looked for where they are not known."""
    if cpu.family == 0x17 and cpu.model is not None:
        if 0x01 <= cpu.model <= 0x30:
            return Generation.SEV
        if 0x31 <= cpu.model <= 0x3F:
            return Generation.ES
    return Generation.SNP


def _verdict(good: bool, name: str, message: str = "") -> _Result:  # noqa: FBT001 -- reads as a sentence where it is used
    return Outcome.PASS if good else Outcome.FAIL, name, message


def _vendor(_: Machine, cpu: Processor) -> _Result:
    return _verdict(cpu.vendor == "AuthenticAMD", "AMD CPU")


def _brand(_: Machine, cpu: Processor) -> _Result:
    return _verdict("EPYC" in cpu.brand.upper(), "Microcode support")


def _switch(name: str, feature: int, switch: int) -> Callable[[Machine, Processor], _Result]:
    """A feature that the processor must have and the BIOS or the kernel must have switched on."""

    def check(_: Machine, cpu: Processor) -> _Result:
        on = cpu.switched_on(switch)
        if not cpu.knows(feature) or (cpu.has(feature) and on is None):
            return Outcome.SKIP, name, cpu.blind
        return _verdict(cpu.has(feature) and bool(on), name)

    return check


def _feature(name: str, bit: int) -> Callable[[Machine, Processor], _Result]:
    def check(_: Machine, cpu: Processor) -> _Result:
        return _verdict(cpu.has(bit), name)

    return check


def _number(name: str, read: Callable[[Registers], int]) -> Callable[[Machine, Processor], _Result]:
    def check(_: Machine, cpu: Processor) -> _Result:
        if cpu.encryption is None:
            return Outcome.SKIP, name, cpu.blind
        return Outcome.PASS, name, str(read(cpu.encryption))

    return check


def _page_flush(_: Machine, cpu: Processor) -> _Result:
    if not cpu.knows(processor.PAGE_FLUSH):
        return Outcome.SKIP, "Page flush MSR", cpu.blind
    # Information, not a requirement: hardware without it lacks nothing that a guest needs.
    state = "ENABLED" if cpu.has(processor.PAGE_FLUSH) else "DISABLED"
    return Outcome.PASS, f"Page flush MSR: {state}", ""


def _parameter(name: str, parameter: str) -> Callable[[Machine, Processor], _Result]:
    path = f"{KVM_PARAMETERS}/{parameter}"

    def check(machine: Machine, _: Processor) -> _Result:
        try:
            value = machine.text(path).strip()
        except FileNotFoundError:
            return Outcome.FAIL, name, f"Error - {path} does not exist"
        except OSError as error:
            return Outcome.FAIL, name, f"Error - (unable to read {path}): {_rust(error)}"
        if value in {"1", "Y"}:
            return Outcome.PASS, name, "enabled"
        return Outcome.FAIL, name, f"Error - contents read from {path}: {value}"

    return check


def _readable(machine: Machine, _: Processor) -> _Result:
    name = "Reading /dev/sev"
    try:
        machine.try_open(DEVICE)
    except OSError as error:
        return Outcome.FAIL, name, f"{DEVICE} not readable: {_rust(error)}"
    return Outcome.PASS, name, f"{DEVICE} readable"


def _writable(machine: Machine, _: Processor) -> _Result:
    name = "Writing /dev/sev"
    if machine.is_writable(DEVICE):
        return Outcome.PASS, name, f"{DEVICE} writable"
    # It is not opened for writing, so the reason is put together: no device, or no right.
    error: OSError = PermissionError(13, os.strerror(13))
    try:
        machine.try_open(DEVICE)
    except PermissionError:
        pass
    except OSError as why:
        error = why
    return Outcome.FAIL, name, f"{DEVICE} not writable: {_rust(error)}"


def _kvm(machine: Machine, _: Processor) -> _Result:
    name = "KVM supported"
    try:
        machine.try_open(KVM)
    except OSError as error:
        return Outcome.FAIL, name, f"Error reading {KVM}: ({_rust(error)})"
    try:
        return Outcome.PASS, name, f"API version: {machine.kvm_api()}"
    except OSError:
        return Outcome.FAIL, name, "Error - accessing KVM device node failed"


def _memlock(machine: Machine, _: Processor) -> _Result:
    # As rlim_t has them: unlimited is the largest number.
    soft, hard = (limit & 0xFFFFFFFFFFFFFFFF for limit in machine.memlock())
    return Outcome.PASS, "Memlock resource limit", f"Soft: {soft} | Hard: {hard}"


def _rust(error: OSError) -> str:
    """An error of the system as sevctl's language spells it."""
    return f"{os.strerror(error.errno or 0)} (os error {error.errno})"


_VMPLS = _Row(
    name="Number of VMPLs",
    about=Generation.SNP,
    check=_number("Number of VMPLs", lambda registers: registers.ebx >> 12 & 0xF),
)
_PERMISSION_LEVELS = _Row(
    name="VM Permission Levels",
    about=Generation.SNP,
    check=_switch("VM Permission Levels", processor.VMPL, processor.SYSCFG_VMPL),
    rows=(_VMPLS,),
)
_SEV_ROWS = (
    _Row(
        name="Encrypted State (SEV-ES)",
        about=Generation.ES,
        check=_feature("Encrypted State (SEV-ES)", processor.SEV_ES),
    ),
    _Row(
        name="Secure Nested Paging (SEV-SNP)",
        about=Generation.SNP,
        check=_switch("Secure Nested Paging (SEV-SNP)", processor.SNP, processor.SYSCFG_SNP),
        rows=(_PERMISSION_LEVELS,),
    ),
    _Row(
        name="Physical address bit reduction",
        check=_number("Physical address bit reduction", lambda registers: registers.ebx >> 6 & 0x3F),
    ),
    _Row(name="C-bit location", check=_number("C-bit location", lambda registers: registers.ebx & 0x3F)),
    _Row(
        name="Number of encrypted guests supported simultaneously",
        check=_number("Number of encrypted guests supported simultaneously", lambda registers: registers.ecx),
    ),
    _Row(
        name="Minimum ASID value for SEV-enabled, SEV-ES disabled guest",
        check=_number("Minimum ASID value for SEV-enabled, SEV-ES disabled guest", lambda registers: registers.edx),
    ),
    _Row(name="SEV enabled in KVM", check=_parameter("SEV enabled in KVM", "sev")),
    _Row(name="SEV-ES enabled in KVM", about=Generation.ES, check=_parameter("SEV-ES enabled in KVM", "sev_es")),
    _Row(name="/dev/sev readable", check=_readable),
    _Row(name="/dev/sev writable", check=_writable),
)
_ROWS = (
    _Row(
        name="AMD CPU",
        check=_vendor,
        rows=(
            _Row(name="Microcode support", check=_brand),
            _Row(
                name="Secure Memory Encryption (SME)",
                check=_switch("Secure Memory Encryption (SME)", processor.SME, processor.SYSCFG_SME),
            ),
            _Row(
                name="Secure Encrypted Virtualization (SEV)",
                check=_feature("Secure Encrypted Virtualization (SEV)", processor.SEV),
                rows=_SEV_ROWS,
            ),
            _Row(name="Page flush MSR", check=_page_flush),
        ),
    ),
    _Row(name="KVM Support", check=_kvm),
    _Row(name="memlock limit", check=_memlock),
)
