"""`sevattest owner secret put|list|delete`: what the verifier keeps and no command reads back."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from common.errors import InvalidInput, Reason, WrongState
from orchestrator.cli.owner.connection import connected
from orchestrator.cli.owner.files import SECRET_MAX, read, wrong
from orchestrator.cli.owner.text import as_json, table, when

if TYPE_CHECKING:
    from orchestrator.drivers.admin import VerifierAdmin


def add_put(parser: argparse.ArgumentParser) -> None:
    """The command line of `secret put`. The value is no argument: any process of the machine could read it there."""
    parser.add_argument("name", metavar="NAME", help="of the secret; a new version if there is one")
    parser.add_argument("stdin", nargs="?", type=_dash, metavar="-", help="read its bytes from standard input")
    parser.add_argument("--file", metavar="FILE", help="read its bytes from a file, as they are")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a line")


def _dash(text: str) -> str:
    if text != "-":
        # Not repeated: it may be the secret, and this text may end in somebody's log.
        raise argparse.ArgumentTypeError("a secret is no argument: pipe it in with -, or use --file FILE")
    return text


def run_put(args: argparse.Namespace) -> int:
    """Store a new version of a secret."""
    if (args.file is None) == (args.stdin is None):
        raise InvalidInput(Reason.INVALID_ARGUMENT, "give either --file FILE, or - for standard input")
    if args.stdin and sys.stdin.isatty():
        raise InvalidInput(
            Reason.INVALID_ARGUMENT,
            "standard input is a terminal, which would show what is typed",
            hint="pipe the secret in, or use --file",
        )
    name = args.file or "-"
    value = read(name, SECRET_MAX)
    if not value:
        raise wrong(name, "is empty")
    if value.endswith(b"\n") and value.count(b"\n") == 1:
        print("warning: the secret ends with a line's end, which is part of it", file=sys.stderr)

    async def work(admin: VerifierAdmin) -> int:
        version = await admin.put_secret(args.name, value)
        if args.json:
            print(as_json({"name": args.name, "version": version, "size": len(value)}))
        else:
            print(f"secret {args.name}: version {version}, {len(value)} bytes")
        return 0

    return connected(args, work)


def add_list(parser: argparse.ArgumentParser) -> None:
    """The command line of `secret list`."""
    parser.add_argument("--json", action="store_true", help="print a JSON array instead of a table")


def run_list(args: argparse.Namespace) -> int:
    """List names and versions."""

    async def work(admin: VerifierAdmin) -> int:
        found = await admin.secrets()
        if args.json:
            print(as_json(found))
        else:
            rows = [[each.name, str(each.version), str(each.size), when(each.create_time)] for each in found]
            print("\n".join(table(["NAME", "VERSION", "BYTES", "STORED"], rows)))
        return 0

    return connected(args, work)


def add_delete(parser: argparse.ArgumentParser) -> None:
    """The command line of `secret delete`."""
    parser.add_argument("name", metavar="NAME", help="of the secret")
    parser.add_argument("--allow-used", action="store_true", help="erase it though a workload on file names it")


def run_delete(args: argparse.Namespace) -> int:
    """Erase a secret."""

    async def work(admin: VerifierAdmin) -> int:
        try:
            versions = await admin.delete_secret(args.name, allow_used=args.allow_used)
        except WrongState as error:
            hint = "withdraw those workloads first; --allow-used erases it all the same, and no command brings it back"
            raise WrongState(error.reason, error.message, hint=hint) from error
        print(f"secret {args.name}: erased, with all its versions ({versions})")
        return 0

    return connected(args, work)
