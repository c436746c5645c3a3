"""A guest's serial line as people may read it, and the few lines of a boot that tell its story."""

from __future__ import annotations

import re
from collections.abc import Iterator

_ESCAPES = re.compile(r"\x1b(?:\[[0-9;=?]*[A-Za-z]|[()][A-Za-z0-9])|[\x00-\x08\x0b-\x1f\x7f]")
_WIDTH = 104
_COMPILERS = re.compile(r"(?<=Linux version )(\S+) \(.*", re.DOTALL)  # who built a kernel, and with what
# From power-on to the secret: the firmware hands over, Linux starts, finds firmware and processors, runs our program.
_TELLING = re.compile(
    r"^(EFI stub: |BdsDxe: |guest: |disk: |secret |no secret area|"
    r"\[ *[0-9.]+\] (Linux version |Command line: |efi: EFI |smp: Brought up |Run /init |Kernel panic ))"
)


def lines(said: str) -> Iterator[str]:
    """The whole lines of what a guest wrote, without a terminal's escape sequences; an unfinished one waits."""
    for line in said.split("\n")[:-1]:
        yield _ESCAPES.sub("", line.rstrip("\r"))


def telling(said: str) -> list[str]:
    """The lines that tell the story of a boot, each cut to one row of a terminal."""
    return [_cut(line) for line in lines(said) if _TELLING.match(line)]


def _cut(line: str) -> str:
    line = _COMPILERS.sub(r"\1", line)
    return line if len(line) <= _WIDTH else f"{line[: _WIDTH - 1]}…"
