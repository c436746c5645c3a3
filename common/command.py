"""What every command of this project does alike: its texture, its exit codes, and no traceback for what people did.

Errors go to stderr as `PROGRAM: sentence`, hints as `hint: sentence`. Exit codes: 0 done, 1 refused, 2 usage or bad
input, 3 the other side or the platform failed, 4 outcome unknown; 128 and the signal's number where a signal ended the
command (130 Ctrl-C, 141 nobody reads stdout).
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from common.errors import SevattestError, exit_code

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

# What a shell adds to a signal's number.
_SIGNALLED = 128


class Parser(argparse.ArgumentParser):
    """argparse with this project's texture; the first word of `prog` is the program."""

    def print_help(self, file: SupportsWrite[str] | None = None) -> None:
        """Print the help; unlike argparse's own, this notices when nobody reads it."""
        print(self.format_help(), end="", file=file)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, but no words are left over: the command that does not know them says so, not the first one."""
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return known, unknown

    def error(self, message: str) -> NoReturn:
        """Say what is wrong with the words of the command and end with 2."""
        complain(self.prog.split()[0], message, hint=f"{self.prog} --help")
        raise SystemExit(2)


def clean(text: str) -> str:
    """The text without what would move a terminal's cursor: names and messages come from elsewhere."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


class _Version(argparse.Action):
    """Prints the version and ends; it is looked up only where somebody asks."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version  # noqa: PLC0415 -- slow, and for this alone

        print(f"{parser.prog} {version('sevattest')}")
        parser.exit()


def add_version(parser: Parser) -> None:
    """Give the program `--version`."""
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and end")


def run_command(program: str, command: Callable[[], int], *, extras: Mapping[str, str] | None = None) -> int:
    """Run a command and return its exit code; errors of ours, of the system and of the reader end as sentences.

    Args:
        program: its name, before each sentence.
        command: what it does; returns the exit code.
        extras: libraries that the program imports and that one of the package's extras brings, with the extra's name.
    """
    _make_streams_usable()
    try:
        code = _returned(command)
        sys.stdout.flush()
    except SevattestError as error:
        complain(program, *error.sentences, hint=error.fields.get("hint"))
        code = exit_code(error)
    except BrokenPipeError:
        # The reader went away (`… | head`). Never 0: nobody has seen the verdict, and it may have been a refusal.
        code = _SIGNALLED + signal.SIGPIPE
    except KeyboardInterrupt:
        code = _SIGNALLED + signal.SIGINT
    except ModuleNotFoundError as error:
        extra = (extras or {}).get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        complain(program, f"needs the extra sevattest[{extra}]", hint=f"pip install 'sevattest[{extra}]'")
        code = 2
    except UnicodeEncodeError as error:
        # Paths may be any bytes; whatever else stands in a command's words becomes text of a message or a file.
        complain(program, f"a word of the command is not UTF-8 text: {error.object[error.start : error.end]!r}")
        code = 2
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        complain(program, f"{where}{error.strerror or error}")
        code = 2
    _give_up_unread_output()
    return code


def _returned(command: Callable[[], int]) -> int:
    """What the command returns, or what argparse ends it with (0 after `--help`, 2 after an error)."""
    try:
        return command()
    except SystemExit as end:
        if not isinstance(end.code, int):
            raise
        return end.code


def complain(program: str, *sentences: str, hint: str | None = None) -> None:
    """Say what is wrong on stderr; where nobody reads that, the exit code still says it."""
    with suppress(OSError):
        for sentence in sentences:
            print(f"{program}: {sentence}", file=sys.stderr)
        if hint:
            print(f"hint: {hint}", file=sys.stderr)


def _make_streams_usable() -> None:
    """Have all three streams, and no output that fails on a letter that the terminal lacks."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        # Started without one (`>&-`), and a file that is opened later must not take its number.
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115 -- open for the process's life
        stream = getattr(sys, name)
        if mode == "w" and isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def _give_up_unread_output() -> None:
    """Drop what nobody reads: the interpreter would complain once more while it flushes the streams at exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
