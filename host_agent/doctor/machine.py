"""What a probe may ask of a machine. `this_machine.py` answers for the running one, `captured.py` from a folder.

Nothing here changes anything: files and devices are opened for reading, and the only programs that are run print what
they are. Paths are absolute and as on the machine itself (`/proc/cpuinfo`), wherever the answers come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol


class Registers(NamedTuple):
    """What CPUID gives, 32 bits each."""

    eax: int
    ebx: int
    ecx: int
    edx: int


class Unreadable(Exception):
    """Something that a machine has cannot be read here.

    Attributes:
        message: why, a sentence.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class Machine(Protocol):
    """A machine to look at."""

    def text(self, path: str) -> str:
        """A small text file.

        Raises:
            OSError: it is not there, or cannot be read.
        """
        ...

    def try_open(self, path: str) -> None:
        """Open a device for reading and close it again.

        Raises:
            OSError: it is not there, or cannot be opened.
        """
        ...

    def is_writable(self, path: str) -> bool:
        """Whether this user may write to a file or device; it is not opened."""
        ...

    def cpuid(self, leaf: int) -> Registers:
        """CPUID, subleaf 0.

        Raises:
            Unreadable: neither the kernel's device nor the instruction is to be had.
        """
        ...

    def msr(self, number: int) -> int:
        """A model-specific register of the first CPU, 64 bits.

        Raises:
            Unreadable: the kernel does not show it, or not to this user.
        """
        ...

    def kvm_api(self) -> int:
        """KVM_GET_API_VERSION.

        Raises:
            OSError: /dev/kvm is not there, cannot be opened, or is none.
        """
        ...

    def memlock(self) -> tuple[int, int]:
        """RLIMIT_MEMLOCK, soft and hard, in bytes; -1 is unlimited."""
        ...

    def clock_is_synchronised(self) -> bool | None:
        """Whether the kernel says that something keeps its clock right; None where it does not say."""
        ...

    def run(self, words: Sequence[str]) -> str:
        """What a program prints, stdout and stderr.

        Raises:
            Unreadable: it cannot be run, or does not end in time.
        """
        ...
