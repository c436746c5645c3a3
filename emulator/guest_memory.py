"""A guest's physical memory: lazily committed RAM with a hole below 4 GiB, and the firmware image at its end.

Layout: QEMU, hw/i386/pc_q35.c. RAM starts at 0, leaves out what lies between the end of low memory and 4 GiB, and goes
on there; the pflash image ends at 4 GiB. Error texts: QEMU, monitor/misc.c `gpa2hva`.
"""

from __future__ import annotations

import mmap

from emulator.errors import MachineDied

_FOUR_GIB = 1 << 32
_LOW_MAX = 0xB0000000
_LOW_WHEN_MORE = 0x80000000
_MAP_NORESERVE = 0x4000  # linux/mman.h; Python names it from 3.13 on


class NotMapped(Exception):
    """QEMU's sentence about an address that cannot be written."""


class GuestMemory:
    """RAM of `size` bytes and one read-only image below 4 GiB; raises MachineDied when there is not so much.

    With `shared`, a descriptor of as large a file, the RAM is that of whoever else maps it. `low` is how much of it is
    below 4 GiB, where that is not as above.
    """

    def __init__(self, size: int, image: bytes = b"", *, shared: int = -1, low: int | None = None) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE if shared < 0 else mmap.MAP_SHARED
        try:
            self._ram = mmap.mmap(shared, size, flags=flags)
        except (OSError, OverflowError) as error:
            raise MachineDied("cannot set up guest memory 'pc.ram': Cannot allocate memory") from error
        self._low = min(size, low if low is not None else _LOW_WHEN_MORE if size >= _LOW_MAX else size)
        self._high = size - self._low
        self._image = image

    def read(self, address: int, size: int) -> bytes:
        """Bytes of RAM.

        Raises:
            NotMapped: not all of them are RAM.
        """
        start = self._offset(address, size)
        return self._ram[start : start + size]

    def write(self, address: int, data: bytes) -> None:
        """Put bytes into RAM.

        Raises:
            NotMapped: not all of the range is RAM.
        """
        start = self._offset(address, len(data))
        self._ram[start : start + len(data)] = data

    def check(self, address: int, size: int) -> None:
        """Whether the range is RAM.

        Raises:
            NotMapped: it is not, with QEMU's reason.
        """
        self._offset(address, size)

    def close(self) -> None:
        """Give the memory back."""
        self._ram.close()

    def _offset(self, address: int, size: int) -> int:
        if address < self._low:
            room, start = self._low - address, address
        elif _FOUR_GIB <= address < _FOUR_GIB + self._high:
            room, start = _FOUR_GIB + self._high - address, address - _FOUR_GIB + self._low
        elif _FOUR_GIB - len(self._image) <= address < _FOUR_GIB:
            raise NotMapped(f"Memory at address 0x{address:x} is not RAM")
        else:
            raise NotMapped(f"No memory is mapped at address 0x{address:x}")
        if size > room:
            raise NotMapped(f"Size of memory region at 0x{address:x} exceeded.")
        return start
