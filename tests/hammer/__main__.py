"""`make hammer`: a grant under the hammer for longer than a test may take, over PostgreSQL and over SQLite.

Prints what happened; ends with 1 where anything does not hold. The same seed draws the same run again.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tests.hammer.plan import Plan
from tests.hammer.proof import complaints
from tests.hammer.run import hammer, report
from tests.support.postgres import Server, start_server


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="hammer", description=__doc__)
    parser.add_argument("--store", choices=("postgres", "sqlite"), action="append", help="default: both")
    parser.add_argument("--launches", type=int, default=1000)
    parser.add_argument("--callers", type=int, default=64)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--restarts", type=int, default=10, help="of PostgreSQL")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    args = parser.parse_args()
    failed = False
    for store in args.store or ("postgres", "sqlite"):
        postgres = store == "postgres"
        plan = Plan(
            seed=args.seed,
            replicas=2 if postgres else 1,
            launches=args.launches,
            callers=args.callers,
            identities=args.callers,
            deaths=args.launches // 30,
            lies=args.launches // 30,
            changes=args.launches // 10,
            kills=args.kills,
            restarts=args.restarts if postgres else 0,
            patience=60.0 + args.launches,
        )
        with _server(wanted=postgres) as server:
            tally, evidence = asyncio.run(hammer(plan, server))
        found = complaints(evidence)
        print(*report(plan, tally, evidence), *(f"WRONG: {each}" for each in found), sep="\n", flush=True)  # noqa: T201 -- its purpose
        failed |= bool(found)
    return int(failed)


@contextmanager
def _server(*, wanted: bool) -> Iterator[Server | None]:
    if wanted:
        yield from start_server()
    else:
        yield None


if __name__ == "__main__":
    sys.exit(main())
