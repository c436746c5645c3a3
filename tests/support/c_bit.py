"""The encryption bit that QEMU takes the real processor's for, as its own check of `cbitpos` asks for it."""

from __future__ import annotations

from host_agent.doctor.this_machine import ThisMachine


def c_bit_of_this_machine() -> int:
    """EBX 5:0 of CPUID leaf 8000001F, read without a look at which leaves there are (target/i386/sev.c, `host_cpuid`).

    AMD's processors say 0 where they have no SEV. Intel's answer a leaf beyond their last with the highest basic one,
    so there it is any number.
    """
    return ThisMachine().cpuid(0x8000001F).ebx & 0x3F
