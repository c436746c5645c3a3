"""A spent grant is seen before anything is done for its launch; what decides is the reservation all the same."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import yaml

from common.errors import Reason, SevattestError
from tests.support.chains import make_platform
from tests.support.desk import OWNER, START, Desk, desk, refused
from tests.support.documents import STRANGER
from tests.support.documents import workload as document
from tests.unit.verifier.launches.test_grants import grant, last, owned
from tests.unit.verifier.launches.test_platforms import FakeKeyService
from verifier.admin.desks import owner_desks
from verifier.admin.requests import Asked
from verifier.documents.rate import Rate
from verifier.launches.records import AuditEvent
from verifier.library.library import Library
from verifier.store.rows import LedgerRow, Spending
from verifier.store.sqlite_engine import SqliteEngine

RATE = Rate(times=10, period=timedelta(minutes=1))
SPENT = {
    "exhausted": (LedgerRow(released=3), Reason.GRANT_EXHAUSTED),
    "suspended": (LedgerRow(refused=3), Reason.GRANT_SUSPENDED),
    "busy": (LedgerRow(open=2), Reason.GRANT_BUSY),
    "too soon": (LedgerRow(rate_time=RATE.furthest(START)), Reason.GRANT_RATE_LIMITED),
}


@dataclass(kw_only=True)
class Site:
    """A desk whose platform's CEK has to be fetched, and what was done for each begin."""

    keys: FakeKeyService
    steps: list[str] = field(default_factory=list)
    desk: Desk = field(init=False)

    async def begin(self, **asked: Any) -> Any:
        """Begin with a chain that nobody has verified before."""
        platform = make_platform(ca=self.desk.platform.ca)
        self.keys.known = {**self.keys.known, platform.chip_id: platform.chain.cek}
        return await self.desk.begin(chain=platform.unsigned_chain.to_bytes(), chip_id=platform.chip_id, **asked)

    async def apply_elsewhere(self, content: dict[str, Any]) -> None:
        """Apply a document at another replica: this one learns of it when it looks."""
        library = Library(self.desk.documents, self.desk.store, self.desk.dependencies.seal, self.desk.log)
        desks = owner_desks(self.desk.dependencies, library)
        await desks.documents.apply(Asked(caller=OWNER, request_id=uuid4()), yaml.safe_dump(content).encode())

    async def spend(self, name: str, row: LedgerRow) -> None:
        """Put a grant's ledger as it is to stand."""
        audit = self.desk.dependencies.records.row(AuditEvent.REPORT_VERIFIED, time=self.desk.clock.now(), caller=None)
        await self.desk.store.record(audit, Spending(grant=name, change=lambda _: row))


@pytest.fixture
async def site_of(tmp_path: Path) -> Any:
    async with AsyncExitStack() as stack:

        async def made(*contents: dict[str, Any]) -> Site:
            site = Site(keys=FakeKeyService({}))
            site.desk = await stack.enter_async_context(
                desk(tmp_path, content=contents, key_service=site.keys, on_step=site.steps.append)
            )
            return site

        yield made


@pytest.mark.parametrize("named", [None, "g"], ids=["unnamed", "named"])
@pytest.mark.parametrize("how", SPENT)
async def test_a_spent_grant_makes_no_work(site_of: Callable[..., Any], how: str, named: str | None) -> None:
    site = await site_of(*owned(grant(rate="10/1m")))
    row, reason = SPENT[how]
    await site.spend("g", row)
    assert (await refused(site.begin(grant=named))).reason is reason
    assert site.keys.calls == 0
    assert "begin:judged" not in site.steps
    event, body = last(site.desk)
    if reason in {Reason.GRANT_EXHAUSTED, Reason.GRANT_SUSPENDED}:
        assert (event, body["findings"][0]["reason"], body["platform"]) == ("launch.begin_refused", reason, None)
    else:
        assert event == "report.verified"
        assert len(site.desk.log.named("launch.begin_postponed")) == 1
    # The same grant, not spent.
    await site.spend("g", LedgerRow())
    assert (await site.begin(grant=named)).launch.state == "open"
    assert site.keys.calls == 1
    assert (await site.desk.store.ledger("g")).open == 1


async def test_who_needs_no_grant_is_held_up_by_none(site_of: Callable[..., Any]) -> None:
    site = await site_of(document(), grant())
    await site.spend("g", LedgerRow(released=3))
    await site.begin()
    assert (await refused(site.begin(grant="g"))).reason is Reason.GRANT_EXHAUSTED
    assert site.keys.calls == 1


async def test_a_spent_grant_that_is_not_meant_holds_nobody_up(site_of: Callable[..., Any]) -> None:
    site = await site_of(*owned(grant(), grant("h")))
    await site.spend("g", LedgerRow(released=3))
    await site.begin(grant="h")
    assert (await refused(site.begin(grant="g"))).reason is Reason.GRANT_EXHAUSTED


async def test_documents_that_changed_since_the_last_look_count(site_of: Callable[..., Any]) -> None:
    site = await site_of(*owned())
    await site.apply_elsewhere(grant())
    await site.spend("g", LedgerRow(released=3))
    assert (await refused(site.begin())).reason is Reason.GRANT_EXHAUSTED
    # More is granted, by a document that nobody has looked at yet.
    await site.apply_elsewhere(grant(version="2", launches=4))
    await site.begin()
    # A grant in another's place, likewise: by the old documents the spent one would be it.
    await site.spend("g", LedgerRow(released=4))
    await site.apply_elsewhere(grant("h"))
    await site.apply_elsewhere(grant(version="3", callers=[STRANGER]))
    await site.begin()
    assert await site.desk.store.ledger("h") == LedgerRow(open=1)


async def test_reservations_whose_time_ran_out_are_given_back_before_anything_is_done(
    site_of: Callable[..., Any],
) -> None:
    site = await site_of(*owned(grant(at_once=1)))
    await site.begin()
    assert (await refused(site.begin())).reason is Reason.GRANT_BUSY
    assert site.keys.calls == 1
    site.desk.clock.advance(timedelta(minutes=10))
    await site.begin()
    assert site.keys.calls == 2
    assert await site.desk.store.ledger("g") == LedgerRow(open=1)
    assert [record.event for record in site.desk.audit()] == ["launch.begun", "launch.expired", "launch.begun"]


async def test_a_grant_that_looks_free_to_many_at_once_is_spent_as_far_as_it_goes(site_of: Callable[..., Any]) -> None:
    site = await site_of(*owned(grant(at_once=2, launches=100)))
    answers = await asyncio.gather(*(site.begin() for _ in range(12)), return_exceptions=True)
    begun = [each for each in answers if not isinstance(each, BaseException)]
    reasons = {each.reason for each in answers if isinstance(each, SevattestError)}
    assert (len(begun), reasons) == (2, {Reason.GRANT_BUSY})
    assert await site.desk.store.ledger("g") == LedgerRow(open=2)


async def test_a_look_at_the_ledger_is_no_statement_more(site_of: Callable[..., Any]) -> None:
    site = await site_of(document(), grant(launches=100, at_once=100))
    engine = site.desk.store._engine
    assert isinstance(engine, SqliteEngine)
    said: list[str] = []
    engine._to_write().set_trace_callback(said.append)

    async def asked(**which: Any) -> int:
        said.clear()
        await site.desk.begin(**which)
        return sum(each.startswith("SELECT") for each in said)

    await asked()
    await asked(grant="g")
    # With a grant: its row is read in the transaction that reserves, as before, and nothing else.
    assert await asked(grant="g") == await asked() + 1
