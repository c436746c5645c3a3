"""The `sevattest` command: one module a subcommand, found by name in `COMMANDS`.

Each module has `HELP` (one line), `add_arguments(parser)` and `run(args) -> int`; it is imported only to build its own
parser, so that starting one command does not pay for the others. `common.command` has the exit codes.

`-q` before the command, as sevctl has it: nothing on stderr, and `args.quiet` is true for the commands that report (a
tree, a list of checks); what a command was asked to print is printed. The exit code says the rest.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, suppress
from importlib import import_module
from pathlib import Path

from common.command import Parser, complain, run_command

# Subcommand -> (module, one line of help); the line stands here so that `--help` imports nothing.
COMMANDS: dict[str, tuple[str, str]] = {
    "launch": ("orchestrator.cli.launch", "launch one guest, attested end to end"),
    "owner": ("orchestrator.cli.owner.commands", "your verifier: documents, secrets, launches, audit log"),
    "export": ("orchestrator.cli.export", "write this host's certificates to a file, complete and verified"),
    "generate": ("orchestrator.cli.generate", "make an OCA certificate and its key"),
    "provision": ("orchestrator.cli.provision", "take ownership of this host's platform"),
    "reset": ("orchestrator.cli.reset", "reset this host's platform: forget its owner and keys"),
    "rotate": ("orchestrator.cli.rotate", "make a new Diffie-Hellman key for this host's platform"),
    "show": ("orchestrator.cli.show", "show what this host's platform says about itself"),
    "ok": ("orchestrator.cli.ok", "check whether this host can run encrypted guests"),
    "verify": ("orchestrator.cli.verify", "verify a platform's certificates and print them as a tree"),
    "receipt": ("orchestrator.cli.receipt", "verify a receipt and print what it says"),
    "pki": ("orchestrator.cli.pki", "make and renew the mutual-TLS identities"),
    "platform": ("orchestrator.cli.platform", "run the software SEV platform"),
    "demo": ("orchestrator.cli.demo", "show one attested launch on a software platform"),
}

PROGRAM = "sevattest"


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: sevattest COMMAND …",
            "",
            *lines,
            "",
            "sevattest COMMAND --help says more, sevattest -q COMMAND as little as it can.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; never a traceback for what a person did or a peer said."""
    words = list(sys.argv[1:] if argv is None else argv)
    quiet = False
    while words and words[0] in {"-q", "--quiet"}:
        quiet = True
        del words[0]
    if not quiet:
        return run_command(PROGRAM, lambda: _main(words, quiet=False))
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere, redirect_stderr(nowhere):
        return run_command(PROGRAM, lambda: _main(words, quiet=True))


def _main(words: list[str], *, quiet: bool) -> int:
    if words[:1] == ["help"]:
        words = [*words[1:], "--help"]
    if not words:
        with suppress(OSError):
            print(_overview(), file=sys.stderr)
        return 2
    if words[0] in {"-h", "--help"}:
        print(_overview())
        return 0
    if words[0] == "--version":
        from importlib.metadata import version

        print(f"sevattest {version('sevattest')}")
        return 0
    if words[0] not in COMMANDS:
        complain(PROGRAM, f"there is no command {words[0]!r}", hint="sevattest --help")
        return 2
    module = import_module(COMMANDS[words[0]][0])
    parser = Parser(prog=f"sevattest {words[0]}", description=COMMANDS[words[0]][1])
    module.add_arguments(parser)
    parser.set_defaults(quiet=quiet)
    code: int = module.run(parser.parse_args(words[1:]))
    return code
