"""Stores of both kinds for tests: a place where a store is, how to open it here, and how to open it in a process.

Run as a program it is such a process: it opens the store, waits for a line, carries transactions out and prints what
became of them, or kills itself at a step of one.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.errors import SevattestError
from verifier.store.engine import no_step
from verifier.store.migrations import Step
from verifier.store.postgres import PostgresStore
from verifier.store.rows import LedgerRow
from verifier.store.sql_store import SqlStore
from verifier.store.sqlite import SqliteStore


@dataclass(frozen=True)
class Place:
    """Where a store is.

    Attributes:
        kind: `sqlite` or `postgres`.
        where: a folder, or a DSN.
        schema: of the tables in PostgreSQL.
    """

    kind: str
    where: str
    schema: str = ""

    def store(self, on_step: Callable[[str], None] = no_step, steps: Sequence[Step] | None = None) -> SqlStore:
        """A store here, not opened yet."""
        made: SqlStore
        if self.kind == "sqlite":
            made = SqliteStore(Path(self.where), on_step)
        else:
            made = PostgresStore(self.where, on_step, schema=self.schema)
        if steps is not None:
            made._steps = steps
        return made

    def process(
        self,
        calls: Sequence[tuple[str, Sequence[Any]]],
        die_at: str = "",
        *,
        by: signal.Signals = signal.SIGKILL,
        at_once: bool = False,
    ) -> subprocess.Popen[bytes]:
        """A process that has opened the store and waits for a line before its calls.

        Args:
            calls: names of the store's methods, with what they are called with.
            die_at: the step at which it sends itself a signal, the first time that it comes there.
            by: the signal.
            at_once: make the calls at once and not one after the other.
        """
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.stores"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert process.stdin is not None
        assert process.stdout is not None
        pickle.dump(((self, calls, die_at), {"by": by, "at_once": at_once}), process.stdin)
        process.stdin.flush()
        assert process.stdout.readline() == b"ready\n"
        return process


def go(process: subprocess.Popen[bytes]) -> tuple[int, list[str]]:
    """Let a process carry its calls out; how it ended, and what became of each."""
    out, _ = process.communicate(b"\n", timeout=60)
    return process.returncode, out.decode().split()


def count_open(row: LedgerRow) -> LedgerRow:
    """A ledger with one launch more."""
    return replace(row, open=row.open + 1)


def count_released(row: LedgerRow) -> LedgerRow:
    """A ledger after a release."""
    return replace(row, open=row.open - 1, released=row.released + 1)


async def _child(
    place: Place, calls: Sequence[tuple[str, Sequence[Any]]], die_at: str, *, by: signal.Signals, at_once: bool
) -> None:
    steps: list[str] = []

    def on_step(step: str) -> None:
        steps.append(step)
        if step == die_at and steps.count(step) == 1:
            os.kill(os.getpid(), by)

    async def call(name: str, arguments: Sequence[Any]) -> None:
        try:
            result = await getattr(store, name)(*arguments)
            print(getattr(result, "name", "DONE"), flush=True)  # noqa: T201 -- the parent reads it
        except SevattestError as error:
            print(error.reason.value, flush=True)  # noqa: T201 -- the same

    store = place.store(on_step)
    await store.open(make=True)
    print("ready", flush=True)  # noqa: T201 -- the same
    await asyncio.to_thread(sys.stdin.buffer.readline)
    if at_once:
        await asyncio.gather(*(call(*each) for each in calls))
    else:
        for each in calls:
            await call(*each)
    await store.close()


if __name__ == "__main__":
    given, options = pickle.load(sys.stdin.buffer)  # noqa: S301 -- from the test that started this
    asyncio.run(_child(*given, **options))
