"""The verifier's gauges: what they show is how things stand, and what is not known is not shown."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from common.errors import Reason, Unavailable
from common.telemetry.prometheus import PrometheusMeter
from tests.support.desk import KEK, VERIFIER, Desk, desk
from tests.support.documents import workload
from tests.support.metrics import Page
from tests.support.store_rows import admin_request, audit, document
from verifier.chores import Checkpoints
from verifier.config import AuditConfig
from verifier.keys.file import FileKey
from verifier.keys.keyring import Keyring
from verifier.readings import Readings


@asynccontextmanager
async def readings(d: Desk, keyring: Keyring | None = None) -> AsyncIterator[tuple[PrometheusMeter, Checkpoints]]:
    checkpoints = Checkpoints(
        store=d.store,
        signer=d.dependencies.signer,
        issuer=VERIFIER,
        time=d.dependencies.time,
        config=AuditConfig(),
    )
    dependencies = d.dependencies if keyring is None else replace(d.dependencies, sealing=keyring)
    made = Readings(dependencies, d.library, checkpoints)
    meter = PrometheusMeter()
    made.watch_with(meter)
    kept = asyncio.create_task(made.keep(0.01))
    try:
        yield meter, checkpoints
    finally:
        kept.cancel()
        with suppress(asyncio.CancelledError):
            await kept


async def page_of(meter: PrometheusMeter) -> Page:
    return Page(text=(await meter.page()).decode())


async def shown(meter: PrometheusMeter, sample: str, value: float | None) -> None:
    """Wait until a gauge shows this; None is no sample at all."""
    async with asyncio.timeout(30):
        while True:
            page = await page_of(meter)
            if page.shows(sample) == (value is not None) and (value is None or page.of(sample) == value):
                return


async def test_the_audit_logs_head_is_shown_and_how_far_it_is_signed(tmp_path: Path) -> None:
    async with desk(tmp_path) as d, readings(d) as (meter, checkpoints):
        names = [f"sevattest_audit_{name}" for name in ("number", "signed_number", "signed_timestamp_seconds")]
        page = await page_of(meter)
        assert [page.shows(name) for name in names] == [False, False, False]
        await d.begin()
        await checkpoints.maybe()
        await d.begin()
        await checkpoints.maybe()
        page = await page_of(meter)
        assert [page.of(name) for name in names] == [2, 1, d.clock.now().timestamp()]


async def test_a_log_that_was_never_signed_has_a_number_and_no_signed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def lost(_checkpoint: object) -> None:
        raise Unavailable(Reason.STORE_UNAVAILABLE, "away")

    async with desk(tmp_path) as d, readings(d) as (meter, checkpoints):
        await d.begin()
        monkeypatch.setattr(d.store, "keep_checkpoint", lost)
        with pytest.raises(Unavailable):
            await checkpoints.maybe()
        page = await page_of(meter)
        assert page.of("sevattest_audit_number") == 1  # what SevattestAuditNeverSigned asks for
        assert not page.shows("sevattest_audit_signed_number")


async def test_open_launches_are_shown_and_not_while_the_store_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with desk(tmp_path) as d, readings(d) as (meter, _):
        first = await d.begin()
        await d.begin()
        await shown(meter, "sevattest_open_launches", 2)
        await d.abandon(first.launch.launch_id)
        await shown(meter, "sevattest_open_launches", 1)

        async def away() -> int:
            raise Unavailable(Reason.STORE_UNAVAILABLE, "away")

        with monkeypatch.context() as patch:
            patch.setattr(d.store, "count_open", away)
            await shown(meter, "sevattest_open_launches", None)
            assert not (await page_of(meter)).shows("sevattest_older_keys_in_use")
        await shown(meter, "sevattest_open_launches", 1)


async def test_older_keys_are_shown_until_nothing_needs_them(tmp_path: Path) -> None:
    async with desk(tmp_path) as d:
        async with readings(d) as (meter, _):
            await shown(meter, "sevattest_older_keys_in_use", 0)
        async with readings(d, Keyring(FileKey(bytes(range(1, 33))), [FileKey(KEK)])) as (meter, _):
            await shown(meter, "sevattest_older_keys_in_use", 1)


async def test_documents_that_cannot_be_used_are_counted_by_their_kind(tmp_path: Path) -> None:
    async with desk(tmp_path, content=[workload(), workload("other")]) as d, readings(d) as (meter, _):
        page = await page_of(meter)
        assert (page.of("sevattest_documents_revision"), page.of("sevattest_documents_unusable")) == (0, 0)
        assert page.values("kind") == {"Workload", "Grant", "Platform", "Revocation"}
        for kind in ("Grant", "Revocation"):
            row = document("newer", text=b"{}", kind=kind)
            await d.store.apply_document(row, admin_request(), audit("document.applied"), d.dependencies.seal)
        (d.documents / "kernel").unlink()
        await d.library.load()
        page = await page_of(meter)
        assert page.of("sevattest_documents_revision") == await d.store.revision() > 0
        unusable = {kind: page.of("sevattest_documents_unusable", kind=kind) for kind in page.values("kind")}
        assert unusable == {"Workload": 2, "Grant": 1, "Platform": 0, "Revocation": 1}


async def test_a_clock_that_is_behind_is_shown(tmp_path: Path) -> None:
    async with desk(tmp_path) as d, readings(d) as (meter, _):
        await d.begin()
        assert (await page_of(meter)).of("sevattest_clock_behind_seconds") == 0
        d.clock.advance(timedelta(minutes=-11))
        assert (await page_of(meter)).of("sevattest_clock_behind_seconds") == 660
