"""A host that edits QEMU's words on their way: stands before a machine's program, or before the real QEMU below it.

    dishonest.py EDIT=VALUE … -- PROGRAM WORDS …

becomes PROGRAM with other WORDS. What the agent wrote, and what it was told, stays as it was: only the program that
runs learns of the edit.

    kernel=FILE, initrd=FILE, append=TEXT, smp=N, cpu=MODEL     another value of that option
    firmware=FILE                                               another image in the firmware's flash drive
    policy-without=BITS                                         the guest policy without these bits
    kernel-hashes=off                                           the hashes of what is booted are not measured
    monitor=PATH                                                the agent's QMP socket, somewhere else

Runs by path, without this distribution's packages.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

_OPTIONS = frozenset({"kernel", "initrd", "append", "smp", "cpu"})


def edited(words: Sequence[str], edits: Sequence[str]) -> list[str]:
    """QEMU's words after all edits.

    Args:
        words: options and values as the agent wrote them.
        edits: `NAME=VALUE` each, as in the module's table.

    Raises:
        ValueError: there is no such edit, or nothing for it to change: a host that meant to cheat must not be honest.
    """
    result = list(words)
    for edit in edits:
        name, _, value = edit.partition("=")
        before = list(result)
        result = _apply(result, name, value)
        if result == before:
            raise ValueError(f"{edit}: nothing was changed in {' '.join(words)}")
    return result


def _apply(words: Sequence[str], name: str, value: str) -> list[str]:
    pairs = zip(["", *words], words, strict=False)
    if name in _OPTIONS:
        return [value if before == f"-{name}" else word for before, word in pairs]
    if name == "firmware":
        return [_property(word, "file", value) if "if=pflash" in word else word for word in words]
    if name == "monitor":
        return [f"unix:{value},server=on,wait=off" if before == "-qmp" else word for before, word in pairs]
    if name == "kernel-hashes":
        return [_property(word, name, value) if word.startswith("sev-guest,") else word for word in words]
    if name == "policy-without":
        return [_lowered(word, int(value, 0)) if word.startswith("sev-guest,") else word for word in words]
    raise ValueError(f"{name}: there is no such edit")


def _property(text: str, name: str, value: str) -> str:
    """`text` with another value for one of its `name=value` parts."""
    return ",".join(f"{name}={value}" if part.startswith(f"{name}=") else part for part in text.split(","))


def _lowered(text: str, bits: int) -> str:
    policy = next(part.partition("=")[2] for part in text.split(",") if part.startswith("policy="))
    return _property(text, "policy", f"{int(policy, 0) & ~bits:#x}")


if __name__ == "__main__":
    _at = sys.argv.index("--")
    _program, *_words = sys.argv[_at + 1 :]
    # The machine's own leading arguments come before QEMU's, and no edit knows them.
    os.execvp(_program, [_program, *edited(_words, sys.argv[1:_at])])  # noqa: S606 -- this is what it is for
