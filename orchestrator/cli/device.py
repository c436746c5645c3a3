"""The host's SEV device for the commands that work on it, and their `--device`; no command itself."""

from __future__ import annotations

import argparse
import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from common.errors import PlatformFailed, Reason
from common.sev.certs.chain import PlatformChain
from common.sev.errors import ParseError

if TYPE_CHECKING:
    from host_agent.devices import AdministeredDevice, Device

_T = TypeVar("_T")
_ENVIRONMENT = "SEVATTEST_DEVICE"
_DEFAULT = "/dev/sev"
# The kernel gives the PSP 100 s (psp_cmd_timeout) and then says that it is dead, which a person should hear.
_TIMEOUT = 120.0

# Has the signed CEK of every chip.
AMD_KEY_SERVICE = "https://kdsintf.amd.com"


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """Declare `--device`."""
    parser.add_argument(
        "--device",
        metavar="PATH",
        type=Path,
        default=Path(os.environ.get(_ENVIRONMENT) or _DEFAULT),
        help=f"the SEV device, or a software platform's socket (%(default)s; {_ENVIRONMENT})",
    )


def ask(args: argparse.Namespace, question: Callable[[AdministeredDevice], Awaitable[_T]]) -> _T:
    """Open the device of `--device` and return what `question` makes of it.

    Raises:
        SevattestError: what the device's commands raise.
    """
    from host_agent.devices import open_administration

    async def run() -> _T:
        return await question(open_administration(args.device, timeout=_TIMEOUT))

    return asyncio.run(run())


def exported(args: argparse.Namespace) -> tuple[PlatformChain, bytes]:
    """The platform's certificates, the CEK unsigned, and the chip's id: 64 bytes, or none where it has none to tell.

    Raises:
        SevattestError: what the device's commands raise.
        PlatformFailed: `FIRMWARE_FAILED`; the firmware's certificates are none.
    """

    async def question(device: Device) -> tuple[bytes, bytes]:
        return await device.export_chain(), await device.chip_id()

    chain, chip_id = ask(args, question)
    try:
        return PlatformChain.parse(chain), chip_id
    except ParseError as error:
        raise not_understood(error) from error


def not_understood(error: ParseError) -> PlatformFailed:
    """The error for certificates of the platform's that are none: its fault, not that of whoever typed the command."""
    return PlatformFailed(Reason.FIRMWARE_FAILED, f"the SEV device's certificates make no sense: {error.message}")
