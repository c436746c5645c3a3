"""The `sevattest` command: one module a subcommand, found by name in `COMMANDS`.

Each module has `HELP` (one line), `add_arguments(parser)` and `run(args) -> int`; it is imported only to build its own
parser, so that starting one command does not pay for the others. Exit codes: 0 done, 1 refused, 2 usage or bad input,
3 the other side or the platform failed, 4 outcome unknown. Errors go to stderr as `sevattest: sentence`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from common.errors import SevattestError, exit_code

# Subcommand -> (module, one line of help); the line stands here so that `--help` imports nothing.
COMMANDS: dict[str, tuple[str, str]] = {
    "launch": ("orchestrator.cli.launch", "launch one guest, attested end to end"),
    "verify": ("orchestrator.cli.verify", "verify a platform's certificates and print them as a tree"),
    "pki": ("orchestrator.cli.pki", "make and renew the mutual-TLS identities"),
    "platform": ("orchestrator.cli.platform", "run the software SEV platform"),
    "demo": ("orchestrator.cli.demo", "show one attested launch on a software platform"),
}


class _Parser(argparse.ArgumentParser):
    """argparse with this project's texture: `sevattest: sentence`, exit code 2."""

    def error(self, message: str) -> NoReturn:
        print(f"sevattest: {message}", file=sys.stderr)
        print(f"hint: {self.prog} --help", file=sys.stderr)
        raise SystemExit(2)


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(["usage: sevattest COMMAND …", "", *lines, "", "sevattest COMMAND --help says more."])


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; never a traceback for what a person did or a peer said."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _main(words)
    except SevattestError as error:
        print(f"sevattest: {error.message}", file=sys.stderr)
        if hint := error.fields.get("hint"):
            print(f"hint: {hint}", file=sys.stderr)
        return exit_code(error)
    except BrokenPipeError:
        # The reader went away (`… | head`). Python would complain once more while it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"sevattest: {where}{error.strerror or error}", file=sys.stderr)
        return 2


def _main(words: list[str]) -> int:
    if not words or words[0] in {"-h", "--help"}:
        print(_overview(), file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    if words[0] == "--version":
        from importlib.metadata import version

        print(f"sevattest {version('sevattest')}")
        return 0
    if words[0] not in COMMANDS:
        print(f"sevattest: there is no command {words[0]!r}", file=sys.stderr)
        print("hint: sevattest --help", file=sys.stderr)
        return 2
    module = import_module(COMMANDS[words[0]][0])
    parser = _Parser(prog=f"sevattest {words[0]}", description=COMMANDS[words[0]][1])
    module.add_arguments(parser)
    code: int = module.run(parser.parse_args(words[1:]))
    sys.stdout.flush()
    return code
