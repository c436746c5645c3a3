"""`sevattest platform`: the software SEV platform, which lives in `emulator` and is imported when it is run."""

from __future__ import annotations

import argparse

HELP = "run the software SEV platform"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `serve`, `qemu`, `run`, `firmware` and `show`."""
    from emulator import cli

    cli.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the chosen one; returns the exit code."""
    from emulator import cli

    return cli.run(args)
