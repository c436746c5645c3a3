"""What a machine hands to its firmware over fw_cfg, read as the firmware reads it: by the DMA of a device on the bus.

QEMU's own test protocol (`-qtest`) pokes the ports; no processor runs. Sources: QEMU, docs/specs/fw_cfg.rst and
softmmu/qtest.c.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

from tests.support.qmp import TIMEOUT, QmpClient

_SETUP_SIZE, _SETUP_DATA, _KERNEL_SIZE, _KERNEL_DATA, _FILE_DIR = 0x17, 0x18, 0x08, 0x11, 0x19
_READ, _SELECT = 0x02, 0x08
_REQUEST_AT, _DATA_AT = 0x100000, 0x200000  # RAM that nothing else is in


class FwCfg:
    """The device of a machine that stands still."""

    def __init__(self, bus: socket.socket, client: QmpClient, folder: Path) -> None:
        self._bus = bus.makefile("rwb")
        self._client = client
        self._folder = folder

    def kernel(self) -> bytes:
        """The kernel as firmware without a newer way sees it: its setup part and the rest."""
        setup, rest = (int.from_bytes(self._item(key, 4), "little") for key in (_SETUP_SIZE, _KERNEL_SIZE))
        return self._item(_SETUP_DATA, setup) + self._item(_KERNEL_DATA, rest)

    def file(self, name: str) -> bytes | None:
        """A file of fw_cfg; None where there is none of that name."""
        count = int.from_bytes(self._item(_FILE_DIR, 4), "big")
        directory = self._item(_FILE_DIR, 4 + 64 * count)[4:]
        for size, key, _, raw in struct.iter_unpack(">IHH56s", directory):
            if raw.rstrip(b"\0").decode() == name:
                return self._item(key, size)
        return None

    def _item(self, key: int, size: int) -> bytes:
        request = struct.pack(">IIQ", key << 16 | _SELECT | _READ, size, _DATA_AT)
        self._tell(f"write {_REQUEST_AT:#x} {len(request):#x} 0x{request.hex()}")
        # The address goes in big-endian, high half first; the low half starts the transfer.
        self._tell("outl 0x514 0x0")
        self._tell(f"outl 0x518 {int.from_bytes(_REQUEST_AT.to_bytes(4, 'big'), 'little'):#x}")
        return read_memory(self._client, _DATA_AT, size, self._folder)

    def _tell(self, line: str) -> None:
        self._bus.write(line.encode() + b"\n")
        self._bus.flush()
        while not (answer := self._bus.readline()).startswith(b"OK"):
            assert answer.startswith(b"IRQ"), answer


@contextlib.contextmanager
def fw_cfg(path: Path, client: QmpClient) -> Iterator[FwCfg]:
    """The device of the machine with `-qtest unix:PATH,server=on,wait=off` and this monitor."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as bus:
        bus.settimeout(TIMEOUT)
        bus.connect(str(path))
        yield FwCfg(bus, client, path.parent)


def read_memory(client: QmpClient, address: int, size: int, folder: Path) -> bytes:
    """Guest physical memory, as QEMU itself shows it."""
    file = folder / "memory"
    client.ask("pmemsave", val=address, size=size, filename=str(file))
    try:
        return file.read_bytes()
    finally:
        file.unlink()
