"""Where RAM ends below 4 GiB; the real QEMU's word on it is in tests/integration/test_platform_front_launch.py."""

from __future__ import annotations

import pytest

from emulator.front.layout import low_ram

GIB = 1 << 30


@pytest.mark.parametrize(
    ("total", "machine", "limit", "low"),
    [
        (GIB, "q35", None, GIB),
        (0xB0000000 - 8192, "q35", None, 0xB0000000 - 8192),
        (0xB0000000, "q35", None, 2 * GIB),
        (8 * GIB, "pc-q35-7.2", None, 2 * GIB),
        (8 * GIB, "q35", GIB, GIB),
        (GIB, "q35", 2 * GIB, GIB),
        (3 * GIB, "pc", None, 3 * GIB),
        (0xE0000000 - 8192, "", None, 0xE0000000 - 8192),
        (0xE0000000, "pc-i440fx-7.2", None, 3 * GIB),
        (8 * GIB, "pc", 2 * GIB, 2 * GIB),
    ],
)
def test_low_ram_is_qemus(total: int, machine: str, limit: int | None, low: int) -> None:
    assert low_ram(total, machine, limit) == low
