"""`sevattest show flags|guests|identifier|version`: what the platform says about itself, in sevctl's words.

flags        `owned` where the platform has an owner, `es` where SEV-ES is on; a line each
guests       how many guests the firmware knows
identifier   the chip's id, 128 upper-case hex digits
version      firmware API and build: `1.55.24`
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from common.errors import PlatformFailed, Reason
from orchestrator.cli.device import add_device_argument, ask

if TYPE_CHECKING:
    from host_agent.devices import Device

HELP = "show what the platform says about itself"
_SUBJECTS = ("flags", "guests", "identifier", "version")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("what", metavar="WHAT", choices=_SUBJECTS, help=", ".join(_SUBJECTS))
    add_device_argument(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of plain lines")


def run(args: argparse.Namespace) -> int:
    """Print it; returns 0."""

    async def question(device: Device) -> str | int | list[str]:
        return await _found(device, args.what)

    found = ask(args, question)
    if args.json:
        print(json.dumps({args.what: found}))
        return 0
    for line in found if isinstance(found, list) else [found]:
        print(line)
    return 0


async def _found(device: Device, what: str) -> str | int | list[str]:
    if what == "identifier":
        chip_id = await device.chip_id()
        if not chip_id:
            raise PlatformFailed(Reason.FIRMWARE_FAILED, "the platform does not tell its identifier")
        return chip_id.hex().upper()
    status = await device.status()
    if what == "version":
        return str(status.firmware)
    if what == "guests":
        assert status.guest_count is not None  # noqa: S101 -- /dev/sev tells it, and no other device comes here
        return status.guest_count
    flags = {"owned": status.externally_owned, "es": status.es_enabled}
    return [name for name, is_set in flags.items() if is_set]
