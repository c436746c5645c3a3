"""`sevattest owner launches list|get|watch`: launches of all callers, as their owner sees them."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from common.command import clean, complain
from common.errors import Unavailable
from orchestrator.cli.owner.connection import connected
from orchestrator.cli.owner.text import as_json, table, when
from orchestrator.drivers.admin_values import LaunchQuery, OwnedLaunch

if TYPE_CHECKING:
    from orchestrator.drivers.admin import VerifierAdmin

_STATES = ("open", "released", "refused", "abandoned", "expired")
_LIMIT_MAX = 100_000
# Launches that `watch` looks at: what a terminal has room for, and every change among that many.
_WATCHED = 200
HEADS = ("LAUNCH", "STATE", "WORKLOAD", "CALLER", "GRANT", "PLATFORM", "BEGAN", "WHY")
# The same columns where lines are cut: by importance.
_LIVE = tuple(map(HEADS.index, ("LAUNCH", "STATE", "WHY", "WORKLOAD", "CALLER", "GRANT", "BEGAN", "PLATFORM")))
# From the top left corner (CUP), and after the last line to the end of the screen (ED); ECMA-48 8.3.21 and 8.3.39.
_HOME, _END_OF_LINE, _END_OF_SCREEN = "\x1b[H", "\x1b[K", "\x1b[J"


def _add_filters(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workload", default="", metavar="NAME", help="only of this workload")
    parser.add_argument("--state", default="", choices=_STATES, help="only in this state")
    parser.add_argument("--caller", default="", metavar="SPIFFE-ID", help="only of this orchestrator")
    parser.add_argument("--grant", default="", metavar="NAME", help="only under this grant")


def _query(args: argparse.Namespace) -> LaunchQuery:
    return LaunchQuery(workload=args.workload, state=args.state, caller=args.caller, grant=args.grant)


def add_list(parser: argparse.ArgumentParser) -> None:
    """The command line of `launches list`."""
    _add_filters(parser)
    parser.add_argument("--limit", type=_limit, default=50, metavar="N", help="how many, the newest (default: 50)")
    parser.add_argument("--json", action="store_true", help="print a JSON array instead of a table")


def _limit(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or not 1 <= int(text[:9]) <= _LIMIT_MAX:
        raise argparse.ArgumentTypeError(f"must be 1 to {_LIMIT_MAX}")
    return int(text)


def run_list(args: argparse.Namespace) -> int:
    """List launches."""

    async def work(admin: VerifierAdmin) -> int:
        found = await admin.launches(_query(args), args.limit)
        print(as_json(found) if args.json else "\n".join(_table(found)))
        return 0

    return connected(args, work)


def _table(launches: Sequence[OwnedLaunch]) -> list[str]:
    return table(HEADS, [_row(each) for each in launches])


def _row(launch: OwnedLaunch) -> list[str]:
    return [
        launch.launch_id,
        launch.state,
        f"{launch.workload} {launch.workload_version}",
        launch.caller.rsplit("/", 1)[-1],
        launch.grant or "",
        f"{launch.generation} {launch.fingerprint[:12]}",
        when(launch.create_time),
        launch.reason or "",
    ]


def add_get(parser: argparse.ArgumentParser) -> None:
    """The command line of `launches get`."""
    parser.add_argument("launch_id", metavar="ID", help="of the launch")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")


def run_get(args: argparse.Namespace) -> int:
    """Show one launch."""

    async def work(admin: VerifierAdmin) -> int:
        launch = await admin.launch(args.launch_id)
        print(as_json(launch) if args.json else "\n".join(_description(launch)))
        return 0

    return connected(args, work)


def _description(launch: OwnedLaunch) -> Iterator[str]:
    yield f"launch {launch.launch_id}: {launch.state}" + (f" ({launch.reason})" if launch.reason else "")
    known = {
        "workload": f"{launch.workload} {launch.workload_version}",
        "caller": launch.caller,
        "grant": launch.grant,
        "platform": f"{launch.generation}, chip {launch.fingerprint}",
        "in records": launch.chip,
        "firmware": launch.firmware,
        "began": when(launch.create_time),
        "expires" if launch.state == "open" else "ended": when(launch.end_time or launch.expire_time),
        "audit id": launch.audit_id,
        "explanation": launch.explanation,
    }
    for name, value in known.items():
        if value:
            yield f"  {name:<11}  {clean(value)}"
    yield from (f"  {clean(each.rule)}: {clean(each.message)}" for each in launch.findings)


def add_watch(parser: argparse.ArgumentParser) -> None:
    """The command line of `launches watch`."""
    _add_filters(parser)
    parser.add_argument(
        "--interval", type=_interval, default=2.0, metavar="S", help="seconds between two looks (default: 2)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object a line for each change")


def _interval(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 3600:
        raise argparse.ArgumentTypeError("must be 0.1 to 3600 seconds")
    return seconds


def run_watch(args: argparse.Namespace) -> int:
    """Show launches until somebody stops it: a table that is drawn anew on a terminal, a line for each change else."""
    import asyncio

    live = sys.stdout.isatty() and not args.json

    async def work(admin: VerifierAdmin) -> int:
        watch = _Watch(as_objects=args.json)
        while True:
            try:
                found = await admin.launches(_query(args), _WATCHED)
            except Unavailable as error:
                complain("sevattest", f"{error.message}; looking again in {args.interval:.2g} s")
            else:
                if live:
                    _draw(found)
                else:
                    watch.print_changes(found)
            await asyncio.sleep(args.interval)

    return connected(args, work)


def _draw(launches: Sequence[OwnedLaunch]) -> None:
    """Draw the table over the last one, cut to the terminal."""
    columns, lines = shutil.get_terminal_size()
    # What a narrow terminal has no room for is the least of it.
    rows = [[row[column] for column in _LIVE] for row in (HEADS, *map(_row, launches))]
    shown = [line[:columns] for line in table(rows[0], rows[1:])[: lines - 1]]
    print(_HOME + "".join(f"{line}{_END_OF_LINE}\n" for line in shown) + _END_OF_SCREEN, end="", flush=True)


class _Watch:
    """Remembers what was printed, and prints what is new."""

    def __init__(self, *, as_objects: bool) -> None:
        self._as_objects = as_objects
        self._states: dict[str, str] = {}

    def print_changes(self, launches: Sequence[OwnedLaunch]) -> None:
        """Print a line for each launch that is new or in another state, the oldest first."""
        for each in reversed(launches):
            if self._states.get(each.launch_id) == each.state:
                continue
            if self._as_objects:
                print(as_json(each, indent=None), flush=True)
            else:
                time = when(each.end_time or each.create_time)
                print("  ".join([time, *(clean(cell) or "-" for cell in _row(each))]), flush=True)
        # What fell out of view is forgotten, so that a watch of weeks takes no more memory than one of minutes.
        self._states = {each.launch_id: each.state for each in launches}
