"""A SQLite store on a real disk of two megabytes: what becomes of it when the disk is full, and when it is read-only.

A program for the inside of a `private_disk` of `SIZE` bytes. It prints what it found, a word a line.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

from common.errors import Unavailable
from tests.support.store_rows import opening
from verifier.store.rows import LaunchFilter
from verifier.store.sqlite import SqliteStore

SIZE = 2 << 20


def say(word: str) -> None:
    """Tell the test."""
    print(word, flush=True)  # noqa: T201 -- the test reads it


async def fill(disk: Path) -> None:
    """Fill the disk with launches until it takes no more, then make room."""
    ballast = disk / "ballast"
    ballast.write_bytes(b"b" * (SIZE // 3))
    store = SqliteStore(disk / "state")
    await store.open(make=True)
    done = 0
    try:
        while True:
            await store.open_launch(opening(cap=10_000))
            done += 1
    except Unavailable as error:
        say("full" if "full" in error.message else error.message)
    # What was answered is there, and what was not is not.
    kept = await store.launches(LaunchFilter(), before=None, limit=10_000)
    say("kept" if len(kept) == done == (await store.head())[0] else f"{len(kept)} of {done}")
    ballast.unlink()
    say((await store.open_launch(opening(cap=10_000))).name)
    await store.close()


def remount(disk: Path, how: str) -> None:
    """Make the disk read-only (`ro`) or writable (`rw`)."""
    subprocess.run(["mount", "-o", f"remount,{how}", str(disk)], check=True)


async def freeze(disk: Path) -> None:
    """Open the store on a disk that is read-only, then make it writable."""
    await asyncio.to_thread(remount, disk, "ro")
    store = SqliteStore(disk / "state")
    try:
        await store.open(make=True)
    except Unavailable as error:
        say("read-only" if "Read-only" in error.message else error.message)
    await store.close()
    await asyncio.to_thread(remount, disk, "rw")
    store = SqliteStore(disk / "state")
    await store.open(make=True)
    say((await store.open_launch(opening(cap=10_000))).name)
    await store.close()


if __name__ == "__main__":
    where = Path(sys.argv[1])
    asyncio.run(fill(where))
    asyncio.run(freeze(where))
