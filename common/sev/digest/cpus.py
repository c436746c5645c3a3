"""CPU types: what a VMSA says about the processor, by QEMU's model names.

Sources: QEMU `target/i386/cpu.c`, `builtin_x86_defs` (names and numbers); AMD document 25481, CPUID Fn0000_0001_EAX
(the signature). With `-cpu host` it is the chip's own family, model and stepping.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from common.sev.errors import ParseError

_FAMILY_MAX = 0xF + 0xFF
_MODEL_MAX = 0xFF
_STEPPING_MAX = 0xF
_NUMBERS = re.compile(r"(\d{1,3})-(\d{1,3})-(\d{1,2})", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class CpuType:
    """A processor as the measurement knows it.

    Attributes:
        name: QEMU's model name, or `family-model-stepping`.
        family: 0 to 270.
        model: 0 to 255.
        stepping: 0 to 15.

    Raises:
        ParseError: a number is out of its range.
    """

    name: str
    family: int
    model: int
    stepping: int

    def __post_init__(self) -> None:
        for what, value, most in (
            ("family", self.family, _FAMILY_MAX),
            ("model", self.model, _MODEL_MAX),
            ("stepping", self.stepping, _STEPPING_MAX),
        ):
            if not 0 <= value <= most:
                raise ParseError(f"a CPU's {what} is 0 to {most}, not {value}")

    @property
    def signature(self) -> int:
        """What CPUID function 1 returns in EAX; a guest starts with it in RDX."""
        base, extended = min(self.family, 0xF), max(self.family - 0xF, 0)
        return extended << 20 | self.model >> 4 << 16 | base << 8 | (self.model & 0xF) << 4 | self.stepping

    def __str__(self) -> str:
        numbers = f"{self.family}-{self.model}-{self.stepping}"
        return self.name if self.name == numbers else f"{self.name} ({numbers})"


# Model names of one line share their numbers.
_MODELS: tuple[tuple[tuple[str, ...], tuple[int, int, int]], ...] = (
    (("EPYC", "EPYC-v1", "EPYC-v2", "EPYC-IBPB", "EPYC-v3", "EPYC-v4", "EPYC-v5"), (23, 1, 2)),
    (
        ("EPYC-Rome", "EPYC-Rome-v1", "EPYC-Rome-v2", "EPYC-Rome-v3", "EPYC-Rome-v4", "EPYC-Rome-v5"),
        (23, 49, 0),
    ),
    (("EPYC-Milan", "EPYC-Milan-v1", "EPYC-Milan-v2", "EPYC-Milan-v3"), (25, 1, 1)),
    (("EPYC-Genoa", "EPYC-Genoa-v1", "EPYC-Genoa-v2"), (25, 17, 0)),
    (("EPYC-Turin", "EPYC-Turin-v1"), (26, 0, 0)),
)

CPU_TYPES: dict[str, CpuType] = {
    name: CpuType(name=name, family=numbers[0], model=numbers[1], stepping=numbers[2])
    for names, numbers in _MODELS
    for name in names
}


def parse_cpu(text: str) -> CpuType:
    """The CPU type that a model name (`EPYC-Rome`) or three decimal numbers (`23-49-0`) spell.

    Raises:
        ParseError: the name is not known, or a number is out of its range.
    """
    known = CPU_TYPES.get(text)
    if known is not None:
        return known
    match = _NUMBERS.fullmatch(text)
    if match is None:
        raise ParseError("a CPU is one of QEMU's EPYC models or family-model-stepping in decimal, as in 23-49-0")
    family, model, stepping = (int(number) for number in match.groups())
    return CpuType(name=f"{family}-{model}-{stepping}", family=family, model=model, stepping=stepping)
