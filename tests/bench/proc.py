"""What a process has used, from /proc, and what no launch can do without."""

from __future__ import annotations

import os
import time
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


def cpu_seconds(pid: int) -> float:
    """CPU time of a process with all its threads, user's and kernel's; in steps of 10 ms."""
    # The second field, the program's name, stands in brackets and may hold anything; after it comes the third.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS  # utime, stime: the 14th and 15th


def resident_bytes(pid: int) -> int:
    """Memory of a process that is in RAM."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE


class Bound:
    """CPU time of the unavoidable for one launch: one P-384 key, and one ECDH with it."""

    def __init__(self) -> None:
        self._peer = ec.generate_private_key(ec.SECP384R1()).public_key()
        self._cpu, self._launches = 0.0, 0

    def measure(self, launches: int) -> None:
        """Do it for some launches more."""
        start = time.thread_time()
        for _ in range(launches):
            ec.generate_private_key(ec.SECP384R1()).exchange(ec.ECDH(), self._peer)
        self._cpu += time.thread_time() - start
        self._launches += launches

    @property
    def seconds(self) -> float:
        """For one launch, over all that was measured."""
        return self._cpu / self._launches
