"""The ledger of a grant: what begins, what is given back, and that no order of events spends more than was granted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import LimitExceeded, PlatformFailed, Reason, Refused, SevattestError
from verifier.documents.grant import Grant
from verifier.documents.rate import Rate
from verifier.launches.ledger import begin, reason_against, refused, released, returned
from verifier.store.rows import LedgerRow

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
GRANT = Grant(
    name="fleet",
    version="1",
    sha256="00" * 32,
    source="fleet.yaml",
    workload="web",
    workload_versions=None,
    callers=frozenset({"spiffe://datacenter.example/orchestrator/cluster-1"}),
    platforms=None,
    pools=None,
    launches=3,
    at_once=2,
    refusals=2,
    rate=None,
    not_before=None,
    not_after=None,
    suspended=False,
)


def test_begin_reserves_and_release_consumes() -> None:
    row = begin(LedgerRow(), GRANT, NOW)
    assert row == LedgerRow(open=1)
    assert released(row) == LedgerRow(released=1)
    assert refused(row) == LedgerRow(refused=1)
    assert returned(row) == LedgerRow()


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (LedgerRow(released=3), Reason.GRANT_EXHAUSTED),
        (LedgerRow(released=3, refused=2), Reason.GRANT_EXHAUSTED),
        (LedgerRow(refused=2), Reason.GRANT_SUSPENDED),
        (LedgerRow(open=2), Reason.GRANT_BUSY),
        (LedgerRow(open=1, released=2), Reason.GRANT_BUSY),
    ],
)
def test_what_is_spent_or_reserved_is_refused_with_its_reason(row: LedgerRow, reason: Reason) -> None:
    with pytest.raises(SevattestError) as caught:
        begin(row, GRANT, NOW)
    assert caught.value.reason is reason
    assert isinstance(caught.value, LimitExceeded if reason is Reason.GRANT_BUSY else Refused)
    assert reason_against(row, GRANT, NOW) is reason


@pytest.mark.parametrize("others", [LedgerRow(open=2), LedgerRow(open=7, released=1), LedgerRow(open=1, released=2)])
def test_a_caller_is_not_told_how_many_launches_others_have_open(others: LedgerRow) -> None:
    with pytest.raises(LimitExceeded) as caught:
        begin(others, GRANT, NOW)
    assert caught.value.message == "open launches have reserved all that the grant allows now"
    assert caught.value.fields == {}


@pytest.mark.parametrize(
    "row", [LedgerRow(released=2), LedgerRow(released=2, refused=1), LedgerRow(open=1), LedgerRow(open=1, released=1)]
)
def test_one_less_than_the_limit_begins(row: LedgerRow) -> None:
    assert begin(row, GRANT, NOW).open == row.open + 1
    assert reason_against(row, GRANT, NOW) is None


@pytest.mark.parametrize("step", [released, refused, returned])
def test_a_launch_that_nobody_began_does_not_end(step: Callable[[LedgerRow], LedgerRow]) -> None:
    with pytest.raises(PlatformFailed) as caught:
        step(LedgerRow(released=1))
    assert caught.value.reason is Reason.INTERNAL


def test_a_grant_that_rested_gives_all_of_its_rate_at_once_and_then_one_per_interval() -> None:
    grant = replace(GRANT, launches=1000, at_once=1000, rate=Rate(times=10, period=timedelta(minutes=1)))
    row = LedgerRow()
    for _ in range(10):
        row = begin(row, grant, NOW)
    with pytest.raises(LimitExceeded) as caught:
        begin(row, grant, NOW)
    assert caught.value.reason is Reason.GRANT_RATE_LIMITED
    assert caught.value.fields == {"retry_after": "6"}
    assert reason_against(row, grant, NOW + timedelta(seconds=5.999999)) is Reason.GRANT_RATE_LIMITED
    row = begin(row, grant, NOW + timedelta(seconds=6))
    assert reason_against(row, grant, NOW + timedelta(seconds=6)) is Reason.GRANT_RATE_LIMITED


def test_a_faster_rate_counts_at_once_and_gives_no_second_burst() -> None:
    slow = replace(GRANT, launches=9999, at_once=9999, rate=Rate(times=10, period=timedelta(days=30)))
    fast = replace(slow, rate=Rate(times=1000, period=timedelta(minutes=1)))
    row = LedgerRow()
    for _ in range(10):
        row = begin(row, slow, NOW)
    assert reason_against(row, slow, NOW + timedelta(minutes=1)) is Reason.GRANT_RATE_LIMITED
    for _ in range(1000):
        row = begin(row, fast, NOW + timedelta(minutes=1))
    assert reason_against(row, fast, NOW + timedelta(minutes=1)) is Reason.GRANT_RATE_LIMITED
    # … not even on a replica whose clock is behind.
    assert reason_against(row, fast, NOW - timedelta(minutes=8)) is Reason.GRANT_RATE_LIMITED


def test_the_rate_is_not_given_back() -> None:
    grant = replace(GRANT, rate=Rate(times=1, period=timedelta(hours=1)))
    row = returned(begin(LedgerRow(), grant, NOW))
    assert reason_against(row, grant, NOW) is Reason.GRANT_RATE_LIMITED
    assert reason_against(row, replace(grant, rate=None), NOW) is None


def test_rounding_never_lets_one_more_through() -> None:
    grant = replace(GRANT, launches=1000, at_once=1000, rate=Rate(times=3, period=timedelta(seconds=1)))
    row = LedgerRow()
    for _ in range(3):
        row = begin(row, grant, NOW)
    # A third of a second is 333333 1/3 microseconds.
    third = timedelta(microseconds=333_333)
    assert reason_against(row, grant, NOW + third) is Reason.GRANT_RATE_LIMITED
    assert reason_against(row, grant, NOW + third + timedelta(microseconds=1)) is None


_STEPS = st.lists(st.sampled_from(["begin", "released", "refused", "returned"]), max_size=80)
_GRANTS = st.builds(
    lambda launches, at_once, refusals: replace(GRANT, launches=launches, at_once=at_once, refusals=refusals),
    st.integers(1, 8),
    st.integers(1, 8),
    st.integers(1, 8),
)


@given(grant=_GRANTS, steps=_STEPS)
def test_no_order_of_events_spends_more_than_was_granted(grant: Grant, steps: list[str]) -> None:
    row, begun, ended = LedgerRow(), 0, 0
    ends = {"released": released, "refused": refused, "returned": returned}
    for step in steps:
        try:
            if step == "begin":
                row = begin(row, grant, NOW)
                begun += 1
            elif step in ends:
                row = ends[step](row)
                ended += 1
        except PlatformFailed:
            assert row.open == 0
        except (Refused, LimitExceeded):
            assert (
                row.released + row.open == grant.launches or row.open == grant.at_once or row.refused >= grant.refusals
            )
        assert 0 <= row.open <= grant.at_once
        assert row.released <= grant.launches
        assert row.open + row.released <= grant.launches
        assert row.open == begun - ended
        # Launches that are open when the last refusal comes may still be refused.
        assert row.refused < grant.refusals + grant.at_once


@given(
    launches=st.integers(1, 7),
    period=st.integers(1_000_000, 60_000_000),
    gaps=st.lists(st.integers(-30_000_000, 30_000_000), min_size=1, max_size=60),
)
def test_no_clock_makes_the_rate_give_more_than_a_burst_and_one_per_interval(
    launches: int, period: int, gaps: list[int]
) -> None:
    grant = replace(
        GRANT,
        launches=10**9,
        at_once=10_000,
        rate=Rate(times=launches, period=timedelta(microseconds=period)),
    )
    row, clock, latest, begun = LedgerRow(), 0, 0, []
    for gap in gaps:
        clock = max(0, clock + gap)
        latest = max(latest, clock)  # as the timekeeper does
        try:
            row = begin(row, grant, NOW + timedelta(microseconds=latest))
        except LimitExceeded as error:
            # Who waits as long as told gets one.
            later = NOW + timedelta(microseconds=latest, seconds=int(error.fields["retry_after"]))
            assert begin(row, grant, later).open == row.open + 1
        else:
            begun.append(latest)
    for first, start in enumerate(begun):
        for count, end in enumerate(begun[first:], start=1):
            assert count <= launches + (end - start) * launches // period
