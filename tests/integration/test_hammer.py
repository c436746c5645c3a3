"""A grant under the hammer: callers without number, killed verifiers, a crashing database; and not one launch more."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from uuid import uuid4

import pytest

from tests.hammer.plan import HAMMERED, Plan, Tally
from tests.hammer.proof import Evidence, complaints
from tests.hammer.run import hammer, report
from tests.support.postgres import Server
from verifier.store.rows import LaunchRow, Packet

pytestmark = pytest.mark.slow


def valid(plan: Plan, tally: Tally, evidence: Evidence) -> bool:
    """Whether so much went on that the run says anything."""
    ends = {end: len(evidence.ended(end)) for end in ("refused", "abandoned", "expired")}
    retries = sum(count for what, count in tally.counts.items() if what.startswith("retries"))
    return (
        len(evidence.launches) > plan.launches
        and all(ends.values())
        and retries > 0
        and tally.counts["kills"] >= plan.kills // 2
        and tally.counts["restarts of the database"] >= plan.restarts // 2
        and tally.counts["told that the grant is used up"] == plan.callers
        and len(evidence.samples) >= 10
    )


async def hammered(plan: Plan, tell: Callable[[str, object], None], server: Server | None = None) -> Evidence:
    """Run the plan, tell its counts, and see that everything holds."""
    tally, evidence = await hammer(plan, server)
    said = report(plan, tally, evidence)
    tell(HAMMERED, "\n".join(said))
    assert complaints(evidence) == [], said
    assert valid(plan, tally, evidence), said
    return evidence


def seed() -> int:
    """A new one for each run; it is printed."""
    return random.SystemRandom().randrange(1 << 32)


async def test_a_grant_over_sqlite_is_spent_exactly_while_its_verifier_is_killed(
    record_property: Callable[[str, object], None],
) -> None:
    plan = Plan(seed=seed(), replicas=1, launches=30, deaths=3, lies=2, changes=3, kills=3)
    sees_everything(await hammered(plan, record_property))


async def test_a_grant_over_postgresql_is_spent_exactly_while_replicas_and_the_database_die(
    record_property: Callable[[str, object], None], own_postgres_server: Server
) -> None:
    plan = Plan(seed=seed(), replicas=2, launches=100, kills=5, restarts=2)
    await hammered(plan, record_property, own_postgres_server)


# The proof itself must see what it is there to see: each of these is a run in which one thing went wrong.


def _first(e: Evidence, **changes: Any) -> Evidence:
    """The first of the released launches, changed."""
    row = e.ended("released")[0]
    return replace(e, launches=[replace(row, **changes) if each is row else each for each in e.launches])


def _packet(row: LaunchRow) -> Packet:
    assert row.packet is not None
    return row.packet


def _without(e: Evidence, event: str) -> Evidence:
    dropped = next(each for each in e.records if each.record.event == event)
    return replace(e, records=[each for each in e.records if each is not dropped])


def _answered_twice(e: Evidence) -> Evidence:
    answer = next(each for each in e.answers if each.packets)
    return replace(
        e,
        answers=[replace(each, packets={*each.packets, b"another"}) if each is answer else each for each in e.answers],
    )


DOCTORED: dict[str, tuple[str, Callable[[Evidence], Evidence]]] = {
    "a launch too many": (
        "the grant is for",
        lambda e: replace(e, launches=[*e.launches, replace(e.ended("released")[0], launch_id=uuid4())]),
    ),
    "a launch too few": ("the grant is for", lambda e: _first(e, state="abandoned")),
    "a reservation that never came back": ("the ledger says", lambda e: replace(e, ledger=replace(e.ledger, open=1))),
    "too many at once": ("the grant allows", lambda e: replace(e, samples=[*e.samples, (9, 9, 0)])),
    "a ledger that lagged": ("by the ledger", lambda e: replace(e, samples=[*e.samples, (3, 2, 0)])),
    "too many at once, between samples": (
        "by the audit log",
        lambda e: replace(e, plan=replace(e.plan, at_once=e.plan.at_once - 1), samples=()),
    ),
    "a measurement released twice": (
        "a measurement stands",
        lambda e: _first(e, measurement=e.ended("released")[1].measurement),
    ),
    "two packets": ("more than one packet", _answered_twice),
    "another packet in the store": (
        "more than one packet",
        lambda e: _first(e, packet=replace(_packet(e.ended("released")[0]), payload=b"another")),
    ),
    "a release without a record": ("is not recorded exactly once", lambda e: _without(e, "launch.released")),
    "a begin without a record": ("has 0 records", lambda e: _without(e, "launch.begun")),
    "another launch's receipt": (
        "the receipt of",
        lambda e: _first(
            e, packet=replace(_packet(e.ended("released")[0]), receipt=_packet(e.ended("released")[1]).receipt)
        ),
    ),
    "a receipt of nobody's": (
        "does not verify",
        lambda e: _first(e, packet=replace(_packet(e.ended("released")[0]), receipt="e30.e30.e30")),
    ),
    "a log that was cut off": ("does not hold", lambda e: replace(e, records=e.records[:-1])),
    "a log without its last checkpoint": ("is not signed", lambda e: replace(e, checkpoints=e.checkpoints[:-1])),
}


def sees_everything(evidence: Evidence) -> None:
    """The proof complains of each doctored run, in the words that fit."""
    for name, (words, doctored) in DOCTORED.items():
        assert any(words in each for each in complaints(doctored(evidence))), name
