"""The guest policy: the 32-bit word that the owner sets, the session binds and the measurement covers.

Source: AMD document 55766, guest policy structure. Bits 0 to 5 are flags, 6 to 15 must be zero, bits 16 to 23 hold the
lowest API major and bits 24 to 31 the lowest API minor version that the firmware may have. The exact word goes into the
session's MAC and into the measurement, so it is kept as it came, never narrowed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Self

from common.sev.abi import PolicyBit
from common.sev.errors import ParseError

_RESERVED = 0xFFC0
_FLAGS = 0x3F
_WORD_MAX = 0xFFFFFFFF
_BYTE_MAX = 0xFF


@dataclass(frozen=True, kw_only=True)
class GuestPolicy:
    """A guest policy that firmware would accept in form.

    Attributes:
        value: the word, 0 to 2^32-1, with bits 6 to 15 zero.

    Raises:
        ParseError: a reserved bit is set, or the value is no 32-bit word.
    """

    value: int

    def __post_init__(self) -> None:
        if not 0 <= self.value <= _WORD_MAX:
            raise ParseError("guest policy does not fit into 32 bits")
        if self.value & _RESERVED:
            raise ParseError(f"guest policy 0x{self.value:08x} sets reserved bits")

    @classmethod
    def parse(cls, value: int) -> Self:
        """The policy that a word spells.

        Raises:
            ParseError: a reserved bit is set, or the value is no 32-bit word.
        """
        return cls(value=value)

    @classmethod
    def build(cls, bits: PolicyBit, minimum_api: tuple[int, int] = (0, 0)) -> Self:
        """The policy with these bits and this lowest API version (major, minor).

        Raises:
            ParseError: a bit is none of the six, or a version number is not 0 to 255.
        """
        major, minor = minimum_api
        if not (0 <= major <= _BYTE_MAX and 0 <= minor <= _BYTE_MAX):
            raise ParseError(f"minimum API {major}.{minor} does not fit into two bytes")
        if not 0 <= int(bits) <= _FLAGS:
            raise ParseError(f"guest policy bits 0x{int(bits):x} go beyond the six that exist")
        return cls(value=int(bits) | major << 16 | minor << 24)

    @cached_property
    def bits(self) -> PolicyBit:
        """The flags, bits 0 to 5."""
        return PolicyBit(self.value & _FLAGS)

    @property
    def minimum_api(self) -> tuple[int, int]:
        """The lowest API version (major, minor) that the firmware may have; (0, 0) asks for none."""
        return self.value >> 16 & _BYTE_MAX, self.value >> 24

    @property
    def requires_es(self) -> bool:
        """Whether the guest's registers are encrypted too (SEV-ES), and so its VMSAs measured."""
        return PolicyBit.ES in self.bits

    def to_bytes(self) -> bytes:
        """The word as MACs and measurements cover it: 4 bytes, little-endian."""
        return self.value.to_bytes(4, "little")

    @cached_property
    def _text(self) -> str:
        names = [str(bit.name) for bit in PolicyBit if bit in self.bits]
        major, minor = self.minimum_api
        if (major, minor) != (0, 0):
            names.append(f"API>={major}.{minor}")
        return f"0x{self.value:08x} ({' '.join(names) or 'nothing is forbidden'})"

    def __str__(self) -> str:
        return self._text
