"""`sevattest demo`: one attested launch with every party on this machine, or a dishonest host and what comes of it.

Starts a software platform, a verifier and a host agent, each a process of its own, with mutual TLS between them, in a
temporary folder that is gone afterwards; prints what each step shows. Exit code 0: the guest runs and has read its
secret. 1: the launch was refused, as it is with `--tamper`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from common.errors import InvalidInput, PlatformFailed, Reason, exit_code
from orchestrator.cli.launch import as_json, error_lines, step_line
from orchestrator.demo.guest.parts import GuestParts, PartsMissing, find_parts, is_current
from orchestrator.demo.site import GUEST, WORKLOAD, Site
from orchestrator.demo.stack import Stack
from orchestrator.demo.story import Story, Telling
from orchestrator.demo.tamper import STORIES, Tamper
from orchestrator.flow import Outcome, StepResult

# unix(7): sun_path has 108 bytes, the last of them a NUL.
_SOCKET_PATH_MAX = 107


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `sevattest demo`."""
    parser.add_argument(
        "--tamper",
        type=_tamper,
        metavar="WHAT",
        help=f"play a dishonest host: {', '.join(Tamper)}",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the story")
    parser.add_argument(
        "--machine",
        choices=("auto", "qemu", "builtin"),
        default="auto",
        help="a real QEMU that boots a real guest, or the built-in machine (default: the real one where it is at hand)",
    )
    parser.add_argument("--guest", type=Path, metavar="DIR", help="parts of a real guest, as `make guest` gets them")
    parser.add_argument("--qemu", type=Path, metavar="FILE", help="the real QEMU, instead of the one on the PATH")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="use this empty folder and leave all files in it")


def _tamper(text: str) -> Tamper:
    try:
        return Tamper(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(Tamper)}") from None


def run(args: argparse.Namespace) -> int:
    """Tell the story; the exit code says how it ended."""
    began = time.monotonic()
    parts, missing = _parts(args)
    with _ended_in_order(), _folder(args.keep) as root, Stack(Site(root=root, parts=parts)) as stack:
        telling = _Quiet() if args.json else _Aloud(stack.site, args.tamper, missing)
        story = Story(stack=stack, telling=telling, tamper=args.tamper)
        story.run()
        outcome = story.outcome
        if args.json:
            report = _report(story, outcome, time.monotonic() - began)
            print(json.dumps(report, indent=2, ensure_ascii=False), flush=True)
    telling.end(time.monotonic() - began, root if args.keep else None)
    if outcome.error is not None:
        return exit_code(outcome.error)
    if args.tamper is not None:
        raise PlatformFailed(Reason.INTERNAL, "the dishonest host was not noticed: this is a defect, please report it")
    return 0


def _parts(args: argparse.Namespace) -> tuple[GuestParts | None, tuple[str, ...]]:
    """What a real guest is made of; for the built-in machine None, and why there is no real one.

    Raises:
        InvalidInput: a real machine was asked for, or a part of one named, and it cannot be had.
    """
    if args.machine == "builtin":
        return None, ()
    folder, qemu = (path and path.absolute() for path in (args.guest, args.qemu))
    if folder is not None and not is_current(folder):
        raise InvalidInput(
            Reason.INVALID_ARGUMENT,
            f"{folder} is not a folder with a guest's parts",
            hint="`make guest` makes one; one of another version must be made again",
        )
    try:
        return find_parts(folder, qemu=qemu), ()
    except PartsMissing as error:
        if args.machine == "qemu" or qemu is not None:
            raise
        return None, error.sentences


@contextlib.contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    """The folder for all files: one to keep, which must be empty, or one that is gone afterwards."""
    if keep is None:
        root = Path(tempfile.mkdtemp(prefix="sevattest-"))
        try:
            yield _short_enough(root)
        finally:
            shutil.rmtree(root, ignore_errors=True)
        return
    keep.mkdir(mode=0o700, parents=True, exist_ok=True)
    if any(keep.iterdir()):
        raise InvalidInput(Reason.INVALID_ARGUMENT, f"{keep}: is not empty")
    yield _short_enough(keep.absolute())


def _short_enough(root: Path) -> Path:
    room = _SOCKET_PATH_MAX - len(os.fsencode(Site(root=root).platform / "sev.sock"))
    if room < 0:
        raise InvalidInput(
            Reason.INVALID_ARGUMENT,
            f"{root}: the path is {-room} bytes too long for the sockets in it",
            hint="--keep DIR, or TMPDIR, names a shorter one",
        )
    return root


@contextlib.contextmanager
def _ended_in_order() -> Iterator[None]:
    """Lets the first signal end the demonstration, and none after it: processes first, then the folder.

    Ending takes seconds at the most; whoever presses Ctrl-C twice must not leave a machine behind.
    """

    def end(number: int, _frame: FrameType | None) -> None:
        for other in before:
            signal.signal(other, signal.SIG_IGN)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)

    ends = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    # What is ignored from the start stays ignored: nohup(1), or a shell that put us in the background.
    before = {number: handler for number, handler in ends.items() if handler is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------------------------ told as text


class _Quiet(Telling):
    """Says nothing on stdout, which is for the JSON object; progress goes to stderr when a person watches."""

    def progress(self, text: str) -> None:
        if sys.stderr.isatty():
            print(f"{text} …", file=sys.stderr, flush=True)

    def end(self, seconds: float, kept: Path | None) -> None:
        pass


class _Aloud(_Quiet):
    """Tells the story on stdout as it happens."""

    def __init__(self, site: Site, tamper: Tamper | None, missing: tuple[str, ...]) -> None:
        made = "a 4 MiB image with the footer of an AmdSev build, made for this run"
        print("sevattest demo: one guest, attested end to end; every party is a process on this machine")
        print()
        print("  platform   software, with a root of its own: shows the procedure, proves nothing about hardware")
        if site.parts is None:
            print("  machine    built in, in QEMU's place: takes its command line, speaks its QMP, runs no kernel")
            for sentence in missing:
                print(f"             no real one: {sentence}")
        else:
            print(f"  machine    real: {_version(site.parts.qemu)} under TCG; SEV is the software platform's")
            print(f"  guest      real: Linux {_release(site.parts.kernel)} reads its secret in its own memory")
        print(f"  firmware   {site.firmware or made}")
        if tamper is not None:
            print(f"  host       dishonest: {STORIES[tamper]}")
        print(flush=True)

    def progress(self, text: str) -> None:
        print(f"{text} …", flush=True)

    def heading(self, text: str) -> None:
        print(f"\n{text}", flush=True)

    def block(self, text: str) -> None:
        for line in text.splitlines():
            print(f"  {line}".rstrip())
        sys.stdout.flush()

    def step(self, result: StepResult, outcome: Outcome) -> None:
        print(f"  {step_line(result, outcome)}", flush=True)

    def refused(self, outcome: Outcome) -> None:
        sys.stdout.flush()
        for line in error_lines(outcome):
            print(f"  {line}", flush=True)

    def end(self, seconds: float, kept: Path | None) -> None:
        print(f"\ndone in {seconds:.1f} s; {f'all files are in {kept}' if kept else 'nothing is left behind'}")


def _version(qemu: Path) -> str:
    """What a QEMU calls itself: `QEMU 7.2.22`.

    Raises:
        InvalidInput: it is none.
    """
    answer = subprocess.run([qemu, "-version"], check=False, capture_output=True, text=True)  # noqa: S603 -- the user's
    found = re.search(r"version ([0-9.]+)", answer.stdout)
    if found is None:
        raise InvalidInput(Reason.INVALID_ARGUMENT, f"{qemu} does not say that it is a QEMU")
    return f"QEMU {found[1]}"


def _release(kernel: Path) -> str:
    """The release in a kernel's setup header (Linux, Documentation/arch/x86/boot.rst, `kernel_version`)."""
    with kernel.open("rb") as file:
        head = file.read(0x8000)
    at = int.from_bytes(head[0x20E:0x210], "little") + 0x200
    return head[at : at + 64].split(b"\0")[0].split(b" ")[0].decode("ascii", "replace") or kernel.name


# ------------------------------------------------------------------------------------------------------ told as JSON


def _report(story: Story, outcome: Outcome, seconds: float) -> dict[str, object]:
    site = story.site
    return {
        "tamper": str(story.tamper) if story.tamper else None,
        "platform": {"kind": "software", "root": "emulated"},
        "machine": {"kind": "builtin"}
        if site.parts is None
        else {"kind": "qemu", "version": _version(site.parts.qemu)},
        "firmware": str(site.firmware or "generated"),
        "guest": GUEST,
        "workload": WORKLOAD,
        "tree": story.tree.splitlines(),
        "launch": as_json(outcome),
        "secrets": [{"guid": secret.guid, "size": secret.size, "text": secret.text} for secret in story.secrets],
        "explanation": story.explanation,
        "evidence": story.evidence,
        "ms": round(seconds * 1000, 3),
    }
