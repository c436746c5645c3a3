"""`sev-host-agent doctor`: every probe, a line each, with a sentence of advice where one does not pass.

Exit code 0: nothing stops launches (there may be warnings and skips). 1: something does. 2: the command itself cannot
be used. Nothing is changed, and the network is left alone unless `--kds` names a key service.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument(
        "--config", metavar="FILE", type=Path, help="agent.toml; without it the host alone is looked at"
    )
    parser.add_argument(
        "--for",
        dest="kind",
        choices=("sev", "es"),
        default="es",
        help="which guests are to be launched: with sev, what only SEV-ES guests need warns (%(default)s)",
    )
    parser.add_argument("--kds", metavar="URL|DIR", help="look there for the chip's signed CEK (default: nowhere)")
    parser.add_argument("--ca", metavar="FILE", type=Path, help="ASK and ARK to trust in place of AMD's built-in ones")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    # For captured machines; see host_agent/doctor/captured.py.
    parser.add_argument("--root", metavar="DIR", type=Path, help=argparse.SUPPRESS)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Look and print; 0 if nothing stops launches, 1 if something does."""
    from common.amd.kds import key_service
    from host_agent.doctor import open_machine
    from host_agent.doctor.examination import Question, examine
    from host_agent.doctor.findings import stops_launches, summary
    from host_agent.doctor.roots import trusted

    roots = trusted(args.ca)
    question = Question(
        machine=open_machine(args.root),
        config_file=args.config,
        environ=os.environ,
        captured=args.root is not None,
        es=args.kind == "es",
        key_service=None if args.kds is None else key_service(args.kds, roots=roots),
        roots=roots,
    )
    findings = asyncio.run(examine(question))
    code = 1 if stops_launches(findings) else 0
    if args.json:
        print(json.dumps({"ready": code == 0, "findings": [finding.as_json() for finding in findings]}, indent=2))
        return code
    for finding in findings:
        for line in finding.lines:
            print(line)
    print(f"{'guests cannot be launched' if code else 'nothing stops a launch'}: {summary(findings)}")
    return code
