"""`sevattest ok [sev|es|snp]`: whether this host can run encrypted guests, as a tree, in sevctl's words.

A line each, `[ PASS ] - name: message`; FAIL and SKIP likewise. Exit code 0 when nothing failed, else 1. Colours on a
terminal only. `sev-host-agent doctor` looks at more, and says what to do.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from common.command import complain

HELP = "check whether this host can run encrypted guests"
_GENERATIONS = ("sev", "es", "snp")
_COLOURS = {"PASS": 32, "SKIP": 33, "FAIL": 31}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument(
        "generation",
        metavar="GENERATION",
        nargs="?",
        choices=_GENERATIONS,
        help="sev, es or snp: what to look for; what this processor can have when left out",
    )
    # For captured machines; see host_agent/doctor/captured.py.
    parser.add_argument("--root", metavar="DIR", type=Path, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Look and print; 0 if nothing failed, 1 if something did."""
    from host_agent.doctor import Generation, Outcome, examine, open_machine

    asked = None if args.generation is None else Generation[args.generation.upper()]
    lines = [*examine(open_machine(args.root), asked)]
    if not args.quiet:
        colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        for line in lines:
            print(_coloured(str(line)) if colour else line)
    if all(line.outcome is not Outcome.FAIL for line in lines):
        return 0
    # The tree comes first, also where both streams end in one file.
    sys.stdout.flush()
    complain(
        "sevattest", "One or more tests in sevctl-ok reported a failure", hint="sev-host-agent doctor says what to do"
    )
    return 1


def _coloured(line: str) -> str:
    verdict, number = line[2:6], _COLOURS[line[2:6]]
    return f"[ \x1b[{number}m{verdict}\x1b[0m ]{line[8:]}"
