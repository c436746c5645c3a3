"""The `sevattest` command: one module a subcommand, found by name in `COMMANDS`.

Each module has `HELP` (one line), `add_arguments(parser)` and `run(args) -> int`; it is imported only to build its own
parser, so that starting one command does not pay for the others. `common.command` has the exit codes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module

from common.command import Parser, complain, run_command

# Subcommand -> (module, one line of help); the line stands here so that `--help` imports nothing.
COMMANDS: dict[str, tuple[str, str]] = {
    "launch": ("orchestrator.cli.launch", "launch one guest, attested end to end"),
    "verify": ("orchestrator.cli.verify", "verify a platform's certificates and print them as a tree"),
    "pki": ("orchestrator.cli.pki", "make and renew the mutual-TLS identities"),
    "platform": ("orchestrator.cli.platform", "run the software SEV platform"),
    "demo": ("orchestrator.cli.demo", "show one attested launch on a software platform"),
}

PROGRAM = "sevattest"


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(["usage: sevattest COMMAND …", "", *lines, "", "sevattest COMMAND --help says more."])


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; never a traceback for what a person did or a peer said."""
    words = list(sys.argv[1:] if argv is None else argv)
    return run_command(PROGRAM, lambda: _main(words))


def _main(words: list[str]) -> int:
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
    code: int = module.run(parser.parse_args(words[1:]))
    return code
