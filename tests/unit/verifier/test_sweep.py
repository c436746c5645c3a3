"""What the sweep says: of this machine's clock, and of documents whatever else is wrong."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from pathlib import Path

import pytest

from common.errors import OutcomeUnknown, Reason, Refused, SevattestError, Unavailable, WrongState
from tests.support.desk import START, VERIFIER, Desk, desk
from tests.support.documents import grant
from tests.support.eventually import until
from tests.support.store_rows import audit
from verifier import chores
from verifier.config import AuditConfig
from verifier.store.sqlite_file import FILE_NAME

ANOTHER_RECORD = """
INSERT INTO audit SELECT number+1, hash, 'none', time, event, launch_id, caller, reason, body FROM audit;
UPDATE audit_head SET number=number+1
"""


@contextlib.asynccontextmanager
async def swept(d: Desk, signing: AuditConfig | None = None) -> AsyncIterator[list[tuple[str, bool]]]:
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
                store=d.store, signer=deps.signer, issuer=VERIFIER, time=deps.time, config=signing or AuditConfig()
            ),
            documents=d.library.look,
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


def failing(error: SevattestError) -> Callable[..., object]:
    async def fail(*_: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("broken", "error", "event"),
    [
        ("launches", Unavailable(Reason.STORE_UNAVAILABLE, "the store holds a time that is none"), "store.unavailable"),
        ("clock", WrongState(Reason.CLOCK_SKEW, "the clock went backwards"), "clock.behind"),
        ("audit", Refused(Reason.BAD_SIGNATURE, "record 2 does not hold"), "audit.broken"),
        ("audit", OutcomeUnknown(Reason.OUTCOME_UNKNOWN, "nobody can tell"), "store.unavailable"),
    ],
)
async def test_documents_that_are_not_sealed_are_found_whatever_else_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str, error: SevattestError, event: str
) -> None:
    async with desk(tmp_path) as d:
        await d.apply(grant("fleet"))
        target: dict[str, tuple[object, str]] = {
            "launches": (d.broker, "expire_overdue"),
            "clock": (d.dependencies.time, "now_for_decisions"),
            "audit": (chores.Checkpoints, "maybe"),
        }
        monkeypatch.setattr(*target[broken], failing(error))
        async with swept(d) as said:
            await until(lambda: ("documents", True) in said)
            # Whoever has broken the rest to be unobserved: no revision tells of it.
            with contextlib.closing(sqlite3.connect(d.folder / "state" / FILE_NAME)) as past, past:
                past.execute("UPDATE document SET text=CAST(text || x'0a' AS BLOB)")
            await until(lambda: d.log.named("documents.unavailable"))
            assert ("documents", False) in said
        told = {each.name for each in d.log.events if each.level == "error"}
        assert told == {event, "documents.not_sealed", "documents.unavailable"}


async def test_what_is_wrong_with_the_store_is_said_once_in_a_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with desk(tmp_path) as d:
        async with swept(d) as said:
            await until(lambda: ("documents", True) in said)
        sweeps, gone = list[int](), Unavailable(Reason.STORE_UNAVAILABLE, "the store cannot be reached")

        async def head() -> None:
            sweeps.append(1)
            raise gone

        for name in ("overdue", "last_time", "documents"):
            monkeypatch.setattr(d.store, name, failing(gone))
        monkeypatch.setattr(d.store, "head", head)
        async with swept(d) as said:
            await until(lambda: len(sweeps) > 2)
        assert {cause for cause, ready in said if not ready} == {"store", "audit", "documents"}
        assert abs(len([each for each in d.log.events if each.level == "error"]) - len(sweeps)) <= 1


@pytest.mark.parametrize(
    ("meddling", "unready"),
    [
        (ANOTHER_RECORD, "audit"),
        ("UPDATE launch SET expire_time=0, audit_id='none'", "store"),
        ("UPDATE launch SET expire_time=0, firmware='new'", "store"),
        ("UPDATE launch SET expire_time=0, create_time=9223372036854775807", "store"),
        ("UPDATE launch SET expire_time=0, launch_id='none'", "store"),
    ],
)
async def test_rows_that_no_verifier_wrote_end_no_sweep(tmp_path: Path, meddling: str, unready: str) -> None:
    async with desk(tmp_path) as d, swept(d, AuditConfig(checkpoint_records=1)) as said:
        await d.begin()
        await until(lambda: said.count(("audit", True)) > 1)
        with contextlib.closing(sqlite3.connect(d.folder / "state" / FILE_NAME)) as past:
            past.executescript(meddling)
        await until(lambda: said.count((unready, False)) > 1)
        said.clear()
        await until(lambda: said.count(("documents", True)) > 1)
