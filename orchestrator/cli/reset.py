"""`sevattest reset`: forget the platform's owner and keys (FACTORY_RESET); it makes new ones when they are needed.

Certificates and sessions from before are good for nothing afterwards. Not while guests run. Prints nothing.
"""

from __future__ import annotations

import argparse

from orchestrator.cli.device import add_device_argument, ask

HELP = "reset the platform: forget its owner and keys"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add_device_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Reset; returns 0."""
    ask(args, lambda device: device.factory_reset())
    return 0
