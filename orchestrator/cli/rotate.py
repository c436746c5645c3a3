"""`sevattest rotate`: a new Diffie-Hellman key for the platform (PDH_GEN), under the same PEK.

Sessions that were made for the key before are good for nothing afterwards. Prints nothing.
"""

from __future__ import annotations

import argparse

from orchestrator.cli.device import add_device_argument, ask

HELP = "make a new Diffie-Hellman key for the platform"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add_device_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Rotate; returns 0."""
    ask(args, lambda device: device.pdh_gen())
    return 0
