"""The processor: the instruction itself, the kernel's word where it cannot be had, and what the bits mean."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from host_agent.doctor import instruction, processor
from host_agent.doctor.captured import CapturedMachine
from host_agent.doctor.findings import Outcome
from host_agent.doctor.machine import Registers, Unreadable
from host_agent.doctor.processor import SEV, SEV_ES, SME, SNP, SYSCFG_SME, Processor, look
from host_agent.doctor.this_machine import ThisMachine
from tests.support.hosts import changed, host

X86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="CPUID is an instruction of x86-64 processors")


def of_the_kernel() -> dict[str, str]:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


@X86
def test_the_instruction_says_what_the_kernel_says() -> None:
    known = of_the_kernel()
    vendor = instruction.execute(0)
    text = b"".join(register.to_bytes(4, "little") for register in (vendor.ebx, vendor.edx, vendor.ecx))
    assert text.decode() == known["vendor_id"]
    cpu = look(ThisMachine())
    assert (cpu.family, cpu.model, cpu.stepping) == tuple(
        int(known[key]) for key in ("cpu family", "model", "stepping")
    )
    assert cpu.brand == known["model name"]


@X86
def test_the_instruction_says_what_the_kernels_device_says() -> None:
    try:
        descriptor = os.open("/dev/cpu/0/cpuid", os.O_RDONLY)
    except OSError as error:
        pytest.skip(f"/dev/cpu/0/cpuid: {error.strerror}; root, and the module cpuid, have it")
    try:
        for leaf in (0, 0x80000000, 0x80000002, 0x80000003, 0x80000004, 0x8000001F):
            data = os.pread(descriptor, 16, leaf)
            assert instruction.execute(leaf) == Registers(
                *(int.from_bytes(data[at : at + 4], "little") for at in range(0, 16, 4))
            )
    finally:
        os.close(descriptor)


@X86
def test_without_executable_memory_there_is_a_sentence_and_no_crash() -> None:
    # prctl(PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN): as under systemd's MemoryDenyWriteExecute. Linux 6.3.
    program = """
import ctypes, sys
from host_agent.doctor import instruction
from host_agent.doctor.machine import Unreadable
if ctypes.CDLL(None).prctl(65, 1, 0, 0, 0) != 0:
    sys.exit(77)
try:
    instruction.execute(0)
except Unreadable as why:
    print(why.message)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    if done.returncode == 77:
        pytest.skip("this kernel cannot forbid executable memory (PR_SET_MDWE, Linux 6.3)")
    assert (done.returncode, done.stderr) == (0, "")
    assert "forbids executable memory" in done.stdout


def test_another_architecture_has_no_such_instruction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    instruction._function.cache_clear()
    with pytest.raises(Unreadable, match="aarch64"):
        instruction.execute(0)
    instruction._function.cache_clear()


def cpu_of(family: int, model: int, brand: str = "AMD EPYC 7302 16-Core Processor") -> Processor:
    return Processor(
        vendor="AuthenticAMD",
        brand=brand,
        family=family,
        model=model,
        stepping=0,
        flags=frozenset(),
        encryption=None,
        syscfg=None,
    )


@pytest.mark.parametrize(
    ("family", "model", "generation"),
    [
        (0x17, 0x01, "naples"),
        (0x17, 0x31, "rome"),
        (0x19, 0x01, "milan"),
        (0x19, 0x11, "genoa"),
        (0x19, 0xA0, "genoa"),
        (0x1A, 0x02, "turin"),
        (0x17, 0x18, None),
        (0x17, 0x40, None),
        (0x19, 0x21, None),
        (0x15, 0x02, None),
    ],
)
def test_family_and_model_tell_the_generation(family: int, model: int, generation: str | None) -> None:
    assert cpu_of(family, model).generation == generation


def test_a_desktop_processor_of_the_same_family_is_none_of_them() -> None:
    assert cpu_of(0x17, 0x31, "AMD Ryzen 9 3900X 12-Core Processor").generation is None


def test_the_kernels_flags_stand_in_for_a_msr_that_cannot_be_read(tmp_path: Path) -> None:
    root = changed(tmp_path, "rome-sev-es", {}, facts={"0xc0010010": None})
    cpu = look(CapturedMachine(root))
    assert cpu.syscfg is None
    assert cpu.switched_on(SYSCFG_SME) is True


def test_without_the_msr_and_the_flags_nobody_knows(tmp_path: Path) -> None:
    root = changed(tmp_path, "rome-sme-off", {}, facts={"0xc0010010": None})
    cpu = look(CapturedMachine(root))
    assert cpu.has(SME)
    assert cpu.switched_on(SYSCFG_SME) is None
    found = {finding.probe: finding for finding in processor.probe(cpu, es=True, c_bit=None)}
    assert found["cpu.sme"].outcome is Outcome.SKIP
    assert "/dev/cpu/0/msr" in found["cpu.sme"].seen


def test_without_cpuid_the_kernel_tells_vendor_generation_and_features() -> None:
    cpu = look(host("rome-unprivileged"))
    assert (cpu.vendor, cpu.generation) == ("AuthenticAMD", "rome")
    assert [cpu.has(bit) for bit in (SME, SEV, SEV_ES, SNP)] == [True, True, True, False]
    assert (cpu.c_bit, cpu.es_asids) == (None, None)


def test_a_leaf_beyond_the_last_is_not_believed() -> None:
    # An Intel processor answers for it with its last basic leaf.
    assert look(host("intel")).encryption == Registers(0, 0, 0, 0)


@pytest.mark.parametrize(("configured", "outcome"), [(47, Outcome.PASS), (51, Outcome.FAIL), (None, Outcome.PASS)])
def test_the_configured_c_bit_must_be_the_processors(configured: int | None, outcome: Outcome) -> None:
    findings = processor.probe(look(host("rome-sev-es")), es=True, c_bit=configured)
    assert next(finding.outcome for finding in findings if finding.probe == "cpu.c_bit") is outcome
