"""The sweep says what it sees of this machine's clock."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest

from tests.support.desk import START, VERIFIER, Desk, desk
from tests.support.eventually import until
from tests.support.store_rows import audit
from verifier import chores
from verifier.config import AuditConfig


@contextlib.asynccontextmanager
async def swept(d: Desk) -> AsyncIterator[list[tuple[str, bool]]]:
    """Sweeps without a pause; what is said of readiness."""
    said: list[tuple[str, bool]] = []
    deps = d.dependencies
    task = asyncio.create_task(
        chores.sweep(
            broker=d.broker,
            store=d.store,
            time=deps.time,
            sealing=deps.sealing,
            checkpoints=chores.Checkpoints(
                store=d.store, signer=deps.signer, issuer=VERIFIER, time=deps.time, config=AuditConfig()
            ),
            documents=d.library.current,
            interval=0,
            ready=lambda cause, ready: said.append((cause, ready)),
            log=d.log,
        )
    )
    try:
        yield said
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@pytest.mark.parametrize("minutes", [30, 9])
async def test_a_clock_far_ahead_of_what_other_replicas_store_is_logged_and_serves_on(
    tmp_path: Path, minutes: int
) -> None:
    async with desk(tmp_path) as d:
        d.clock.advance(timedelta(minutes=minutes))
        async with swept(d) as said:
            await until(lambda: ("audit", True) in said)
            for second in range(3):
                await d.store.record(audit(time=START + timedelta(seconds=second)))
                said.clear()
                await until(lambda: said.count(("audit", True)) > 1)
            assert all(ready for _, ready in said)
        told = [event.fields["seconds"] for event in d.log.named("clock.ahead")]
        assert told == ([1800, 1799, 1798] if minutes == 30 else [])
