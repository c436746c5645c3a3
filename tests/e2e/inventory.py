"""Gathers what the run's guests are made of: from the folder that `make guest` made, or from what is installed."""

from __future__ import annotations

import secrets
from dataclasses import replace
from pathlib import Path

import pytest

from common.errors import InvalidInput
from emulator.firmware_image import build_image
from orchestrator.demo.artefacts import CURRENT
from orchestrator.demo.guest.initramfs import build
from orchestrator.demo.guest.parts import QEMU, GuestParts, find_parts, is_amdsev
from tests.e2e.bench import Parts
from tests.e2e.luks import make_volume
from tests.e2e.workloads import OTHER, WITH_DISK

DISK_CONTENT = b"only who was attested reads this\n"
# In the folder: the distribution's own build of OVMF, which reserves nothing for secrets and hashes.
STOCK = "stock.fd"
_COCO = "/sys/kernel/security/secrets/coco"


class Missing(Exception):
    """What is missing on this machine, and which packages have it."""


def gathered(config: pytest.Config, folder: Path) -> Parts:
    """The parts, and a disk that was made for this run.

    Args:
        config: with the options of `conftest.py`.
        folder: where what is made here goes.

    Raises:
        Missing: a guest cannot be made here.
    """
    made: Path = config.getoption("--guest")
    foreign = made / STOCK if (made / STOCK).is_file() and not is_amdsev(made / STOCK) else None
    if config.getoption("--builtin"):
        return _stand_ins(folder, foreign)
    try:
        parts = find_parts(made, qemu=config.getoption("--qemu"), firmware=config.getoption("--ovmf"))
        newer = made / "qemu" / "usr" / "bin" / QEMU
        real = _real(parts, folder, foreign, efi_secret=config.getoption("--efi-secret"))
        return replace(real, newer=newer if newer.is_file() else None)
    except InvalidInput as error:
        raise Missing(error.message) from error


def _real(parts: GuestParts, folder: Path, foreign: Path | None, *, efi_secret: bool) -> Parts:
    initrds = {version: build(parts, label=f"version {version}", efi_secret=efi_secret) for version in (CURRENT, OTHER)}
    disk, passphrase = None, None
    if parts.cryptsetup is not None and parts.disk_modules:
        # Longer than a block of the hash: HMAC pads a shorter key with NULs, and one more would make no difference.
        disk, passphrase = folder / "disk", secrets.token_urlsafe(64).encode()
        make_volume(disk, passphrase, DISK_CONTENT, cryptsetup=parts.cryptsetup)
        initrds[WITH_DISK] = build(parts, label="with disk", disk=True, efi_secret=efi_secret)
    return Parts(
        firmware=parts.firmware,
        kernel=parts.kernel,
        initrds=initrds,
        qemu=parts.qemu,
        disk=disk,
        passphrase=passphrase,
        foreign=foreign,
        source=_COCO if efi_secret else "/dev/mem",
    )


def _stand_ins(folder: Path, foreign: Path | None) -> Parts:
    """What the stand-in machine measures and never runs."""
    firmware, kernel = folder / "firmware", folder / "kernel"
    firmware.write_bytes(build_image("end-to-end"))
    kernel.write_bytes(b"kernel" * 1000)
    initrds = {version: f"initrd {version}".encode() for version in (CURRENT, OTHER)}
    return Parts(firmware=firmware, kernel=kernel, initrds=initrds, qemu=None, foreign=foreign)
