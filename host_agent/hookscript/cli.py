"""`sev-host-agent proxmox-hookscript`: print Proxmox VE's hookscript, or put it where a storage has its snippets."""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path

from common.errors import InvalidInput, Reason
from host_agent.hookscript import NAME, SNIPPETS, install, script


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument(
        "--install",
        metavar="DIR",
        type=Path,
        nargs="?",
        const=SNIPPETS,
        help=f"write it there, executable (without DIR: {SNIPPETS}); otherwise it is printed",
    )
    parser.add_argument("--replace", action="store_true", help="replace another file of its name, such as an older one")
    parser.add_argument(
        "--program",
        metavar="FILE",
        type=Path,
        default=Path(sysconfig.get_path("scripts")) / "sevattest",
        help="the `sevattest` that it runs (%(default)s)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print or install; 0 if that is done."""
    program: Path = args.program
    if not program.is_absolute():
        raise InvalidInput(Reason.INVALID_ARGUMENT, f"--program {program}: must be an absolute path")
    text = script(program)
    if args.install is None:
        print(text, end="")
        return 0
    if not program.is_file():
        raise InvalidInput(
            Reason.INVALID_ARGUMENT,
            f"{program}: not there, and every machine's start would fail",
            hint="name the installed `sevattest` with --program",
        )
    print(install(text, args.install, replace=args.replace))
    storage = "local" if args.install == SNIPPETS else "STORAGE"
    print(f"for each machine: qm set VMID --hookscript {storage}:snippets/{NAME}")
    return 0
