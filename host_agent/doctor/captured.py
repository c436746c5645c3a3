"""A machine from a folder: its files where they were on the machine, and `machine.toml` for what is no file.

proc/cpuinfo, proc/cmdline, sys/module/kvm_amd/parameters/sev, …    as read on the machine
machine.toml
    kvm_api = 12                              # absent: /dev/kvm is not there
    memlock = [8388608, -1]
    clock_synchronised = true                 # absent: not known
    [cpuid]                                   # leaf = [eax, ebx, ecx, edx]; no table: CPUID cannot be read
    [msr]                                     # number = value; no table: they cannot be read
    [devices]                                 # "/dev/sev" = "rw", "r", or why it cannot be opened: "EACCES"
    [programs]                                # "qemu-system-x86_64 -version" = "what it prints"
"""

from __future__ import annotations

import errno
import os
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.errors import InvalidInput, Reason
from host_agent.doctor.machine import Registers, Unreadable


class CapturedMachine:
    """A machine as somebody wrote it down.

    Args:
        root: the folder.

    Raises:
        InvalidInput: `INVALID_ARGUMENT`; its `machine.toml` cannot be read.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        file = root / "machine.toml"
        try:
            self._facts: dict[str, Any] = tomllib.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise InvalidInput(Reason.INVALID_ARGUMENT, f"{file}: {error.strerror}") from error
        except ValueError as error:
            raise InvalidInput(Reason.INVALID_ARGUMENT, f"{file}: is not TOML: {error}") from error

    def text(self, path: str) -> str:
        """See `Machine`."""
        return (self._root / path.lstrip("/")).read_text(encoding="utf-8", errors="replace")

    def try_open(self, path: str) -> None:
        """See `Machine`."""
        rights = self._device(path)
        if not rights.startswith("r"):
            raise _os_error(rights, path)

    def is_writable(self, path: str) -> bool:
        """See `Machine`."""
        return self._device(path).endswith("w")

    def cpuid(self, leaf: int) -> Registers:
        """See `Machine`."""
        if "cpuid" not in self._facts:
            raise Unreadable("the system forbids executable memory, which the CPUID instruction needs")
        # As AMD's processors answer for a leaf that they do not have.
        return Registers(*_numbered(self._facts["cpuid"]).get(leaf, (0, 0, 0, 0)))

    def msr(self, number: int) -> int:
        """See `Machine`."""
        known = _numbered(self._facts.get("msr", {}))
        if number not in known:
            raise Unreadable("/dev/cpu/0/msr cannot be read (No such file or directory)")
        return int(known[number])

    def kvm_api(self) -> int:
        """See `Machine`."""
        if "kvm_api" not in self._facts:
            raise _os_error("ENOENT", "/dev/kvm")
        return int(self._facts["kvm_api"])

    def memlock(self) -> tuple[int, int]:
        """See `Machine`."""
        soft, hard = self._facts["memlock"]
        return soft, hard

    def clock_is_synchronised(self) -> bool | None:
        """See `Machine`."""
        return self._facts.get("clock_synchronised")

    def run(self, words: Sequence[str]) -> str:
        """See `Machine`."""
        printed = self._facts.get("programs", {}).get(" ".join(words))
        if printed is None:
            raise Unreadable(f"{words[0]} cannot be run: No such file or directory")
        return str(printed)

    def _device(self, path: str) -> str:
        return str(self._facts.get("devices", {}).get(path, "ENOENT"))


def _numbered(table: dict[str, Any]) -> dict[int, Any]:
    """A table whose keys are numbers, as TOML cannot say."""
    return {int(key, 0): value for key, value in table.items()}


def _os_error(name: str, path: str) -> OSError:
    number = next((code for code, known in errno.errorcode.items() if known == name), errno.EIO)
    return OSError(number, os.strerror(number), path)
