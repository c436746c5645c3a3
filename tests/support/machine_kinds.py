"""Three programs in QEMU's place for tests of the drivers, and what QEMU does with `-readconfig`, which they do not.

`fake` misbehaves on request, `builtin` is the software platform's stand-in, `front` a real QEMU behind the platform's
front. That a real QEMU reads such a file as the options that `expanded` makes of it is a test of its own
(tests/unit/host_agent/hypervisors/test_launch_file.py).
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.support import fake_qemu
from tests.support.platform import Platform

# Runs the Python program that follows on its command line, from which `-readconfig FILE` is not passed on.
_BEHIND_READCONFIG = """
import runpy, sys
kind, *rest = sys.argv[3:]
if kind == "-c":
    sys.argv = ["-c", *rest[1:]]
    exec(rest[0])
else:
    sys.argv = rest
    runpy.run_path(rest[0], run_name="__main__")
"""
CPU, VCPUS, CMDLINE = "EPYC-Milan", 2, "console=ttyS0"
REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A program in QEMU's place.

    Attributes:
        name: `fake`, `builtin` or `front`.
        program: the words before QEMU's own.
    """

    name: str
    program: tuple[str, ...]


def fake(script: Path) -> Kind:
    """The one that misbehaves as `script` says."""
    return Kind(name="fake", program=(sys.executable, "-ISE", fake_qemu.__file__, str(script)))


def builtin(platform: Platform) -> Kind:
    """The stand-in machine."""
    return Kind(name="builtin", program=tuple(platform.machine()))


def front(platform: Platform, qemu: str) -> Kind:
    """A real QEMU behind the front."""
    return Kind(name="front", program=tuple(platform.front(qemu)))


def guest_words(folder: Path) -> list[str]:
    """The guest's own part of a command line; its files are in `folder`."""
    return [
        *("-cpu", CPU, "-smp", str(VCPUS), "-m", "256M", "-nodefaults", "-no-user-config", "-display", "none"),
        *("-kernel", str(folder / "vmlinuz"), "-initrd", str(folder / "initrd"), "-append", CMDLINE),
        *("-serial", f"file:{folder / 'serial'}"),
    ]


def expanded(words: Sequence[str]) -> list[str]:
    """The line with what `-readconfig` names in its place, as options."""
    line: list[str] = []
    given = iter(words)
    for word in given:
        if word == "-readconfig":
            for option, value in _sections(Path(next(given)).read_text()):
                line += [option, value]
        else:
            line.append(word)
    return line


def _sections(text: str) -> Iterator[tuple[str, str]]:
    for part in re.split(r"(?m)^\[", text)[1:]:
        head, *lines = part.splitlines()
        found = [re.fullmatch(r'\s*([\w-]+) = "([^"]*)"', line) for line in lines]
        values = {match[1]: match[2] for match in found if match}
        named = re.fullmatch(r'object "([^"]+)"\]', head)
        if named:
            kind = values.pop("qom-type")
            yield "-object", ",".join([kind, f"id={named[1]}", *(f"{key}={value}" for key, value in values.items())])
        else:
            yield f"-{head.removesuffix(']')}", ",".join(f"{key}={value}" for key, value in values.items())


def merged(words: Sequence[str]) -> list[str]:
    """The line with all its -machine options in one, as QEMU merges them; the programs want one."""
    line: list[str] = []
    machine: list[str] = []
    given = iter(words)
    for word in given:
        if word == "-machine":
            machine.append(next(given))
        else:
            line.append(word)
    return [*line, "-machine", ",".join(machine)]


def behind_readconfig(program: Sequence[str], file: Path) -> list[str]:
    """The words that run `program` on what `file` says: the option stays on the line, as it does with a real QEMU."""
    return [program[0], "-c", _BEHIND_READCONFIG, "-readconfig", str(file), *program[1:]]


def command_line(program: Sequence[str], words: Sequence[str]) -> list[str]:
    """What runs `program` with QEMU's arguments `words`, of which it is given what `-readconfig` names."""
    if "-readconfig" in words:
        program = behind_readconfig(program, Path(words[words.index("-readconfig") + 1]))
    return [*program, *merged(expanded(words))]


def start(words: Sequence[str], folder: Path) -> subprocess.Popen[bytes]:
    """Start a machine as somebody else would, in a session of its own; what it says is in `folder`."""
    with (folder / "somebody.log").open("ab") as log:
        return subprocess.Popen(
            words,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        )


def kill(process: subprocess.Popen[bytes]) -> None:
    """End a machine that `start` started, and its session."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
