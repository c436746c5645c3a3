"""What a launch costs in SQLite, counted in its virtual machine's instructions."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.support.store_rows import opening, release
from verifier.store.sqlite import SqliteStore
from verifier.store.sqlite_engine import SqliteEngine
from verifier.store.together import TOGETHER_MAX


async def test_a_launch_costs_the_same_however_many_came_before(tmp_path: Path) -> None:
    instructions = 0

    def count() -> None:
        nonlocal instructions
        instructions += 1

    store = SqliteStore(tmp_path / "state")
    await store.open(make=True)
    engine = store._engine
    assert isinstance(engine, SqliteEngine)
    engine._to_write().set_progress_handler(count, 10)

    async def cost() -> int:
        before = instructions
        for _ in range(5):
            new = opening(cap=1000)
            await store.open_launch(new)
            await store.move(release(new.launch.launch_id))
        return instructions - before

    await cost()
    early = await cost()
    for _ in range(10):
        news = [opening(cap=1000) for _ in range(TOGETHER_MAX)]
        await asyncio.gather(*(store.open_launch(new) for new in news))
        await asyncio.gather(*(store.move(release(new.launch.launch_id)) for new in news))
    assert await cost() < 2 * early
    await store.close()
