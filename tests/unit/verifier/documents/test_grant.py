"""Grant documents: what each key means, and what is refused with which path."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.support.documents import STRANGER, grant, read
from verifier.documents.grant import Grant
from verifier.documents.rate import Rate
from verifier.documents.text import InvalidDocument


def good(**spec: Any) -> Grant:
    found = read(grant(**spec))
    assert isinstance(found, Grant)
    return found


def problems(content: dict[str, Any]) -> tuple[str, ...]:
    with pytest.raises(InvalidDocument) as caught:
        read(content)
    return caught.value.problems


def test_a_good_grant_is_read_with_its_defaults() -> None:
    found = good()
    assert (found.name, found.version, found.workload) == ("fleet", "1", "web")
    assert found.callers == frozenset({STRANGER})
    assert found.workload_versions is found.platforms is found.pools is None
    assert (found.launches, found.at_once, found.refusals) == (10, 2, 10)
    assert found.rate is None
    assert found.not_before is found.not_after is None
    assert found.suspended is False


def test_every_key_is_read() -> None:
    found = good(
        versions=["1", "2"],
        platforms={"names": ["host-1"], "pools": ["rack-1", "rack-2"]},
        refusals=3,
        rate="10/1m",
        not_before="2026-01-01T00:00:00+02:00",
        not_after="2026-12-31T23:59:59.5Z",
        suspended=True,
    )
    assert found.workload_versions == frozenset({"1", "2"})
    assert found.platforms == frozenset({"host-1"})
    assert found.pools == frozenset({"rack-1", "rack-2"})
    assert found.refusals == 3
    assert found.rate == Rate(times=10, period=timedelta(minutes=1))
    assert found.not_before == datetime(2025, 12, 31, 22, tzinfo=UTC)
    assert found.not_after == datetime(2026, 12, 31, 23, 59, 59, 500_000, tzinfo=UTC)
    assert found.suspended is True


def test_platforms_by_name_alone_leave_no_pool_open() -> None:
    found = good(platforms={"names": ["host-1"]})
    assert (found.platforms, found.pools) == (frozenset({"host-1"}), frozenset())


@pytest.mark.parametrize(
    ("text", "period"), [("1/1s", timedelta(seconds=1)), ("5/90s", timedelta(seconds=90)), ("7/24h", timedelta(days=1))]
)
def test_a_rate_is_launches_in_a_period(text: str, period: timedelta) -> None:
    assert good(rate=text).rate == Rate(times=int(text[0]), period=period)


def test_the_limits_of_numbers_are_within() -> None:
    assert good(launches=1, at_once=1, refusals=1).launches == 1
    assert good(launches=1_000_000_000, at_once=10_000, refusals=1_000_000_000).at_once == 10_000
    assert good(rate="1000000/1s").rate == Rate(times=1_000_000, period=timedelta(seconds=1))


@pytest.mark.parametrize("key", ["workload", "callers", "platforms", "launches", "at_once"])
def test_what_absence_would_open_is_refused(key: str) -> None:
    assert problems(grant(**{key: None})) == (f"spec: object missing required field `{key}`",)


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ({"workload": "-x"}, "spec.workload: must be 1 to 128 of"),
        ({"versions": []}, "spec.versions: names no version"),
        ({"versions": ["1", "1"]}, "spec.versions: 1 comes twice"),
        ({"versions": ["a b"]}, "spec.versions[0]: must be 1 to 64 of"),
        ({"versions": "1"}, "spec.versions: invalid enum value '1'"),
        ({"versions": [1.5]}, "spec.versions[0]: expected `str`, got `float`: put it into quotes"),
        ({"callers": []}, "spec.callers: names nobody"),
        ({"callers": ["cluster"]}, "spec.callers[0]: must be spiffe://TRUST-DOMAIN/orchestrator/NAME"),
        ({"callers": ["spiffe://a/owner/x"]}, "spec.callers[0]: is not an orchestrator"),
        ({"callers": [STRANGER, STRANGER]}, f"spec.callers: {STRANGER} comes twice"),
        ({"callers": "any"}, "spec.callers: expected `array`, got `str`"),
        ({"platforms": "all"}, "spec.platforms: invalid enum value 'all'"),
        ({"platforms": {}}, "spec.platforms: names nothing"),
        ({"platforms": {"names": ["/"]}}, "spec.platforms.names[0]: must be 1 to 128 of"),
        ({"platforms": {"pools": ["a", "a"]}}, "spec.platforms.pools: a comes twice"),
        ({"platforms": {"racks": ["a"]}}, "spec.platforms: object contains unknown field `racks`"),
        ({"launches": 0}, "spec.launches: must be 1 to 1000000000"),
        ({"launches": 1_000_000_001}, "spec.launches: must be 1 to 1000000000"),
        ({"launches": True}, "spec.launches: expected `int`, got `bool`"),
        ({"launches": "10"}, "spec.launches: expected `int`, got `str`"),
        ({"at_once": 0}, "spec.at_once: must be 1 to 10000"),
        ({"at_once": 10_001}, "spec.at_once: must be 1 to 10000"),
        ({"refusals": 0}, "spec.refusals: must be 1 to 1000000000"),
        ({"rate": "10"}, "spec.rate: must be launches/period"),
        ({"rate": "0/1m"}, "spec.rate: must be launches/period"),
        ({"rate": "10/0s"}, "spec.rate: must be launches/period"),
        ({"rate": "10/1d"}, "spec.rate: must be launches/period"),
        ({"rate": "1000001/1m"}, "spec.rate: must be launches/period"),
        ({"rate": " 1/1m"}, "spec.rate: must be launches/period"),
        ({"not_before": "2026-01-01"}, "spec.not_before: must be a time with its zone"),
        ({"not_before": "2026-01-01T00:00:00"}, "spec.not_before: must be a time with its zone"),
        ({"not_before": "2026-02-30T00:00:00Z"}, "spec.not_before: must be a time with its zone"),
        ({"not_before": "0001-01-01T00:00:00+23:59"}, "spec.not_before: must be a time with its zone"),
        ({"not_after": "tomorrow"}, "spec.not_after: must be a time with its zone"),
        (
            {"not_before": "2026-01-01T00:00:00Z", "not_after": "2026-01-01T01:00:00+01:00"},
            "spec.not_after: is not later than not_before",
        ),
        ({"suspended": "yes"}, "spec.suspended: expected `bool`, got `str`"),
        ({"quota": 3}, "spec: object contains unknown field `quota`"),
    ],
)
def test_a_bad_key_is_refused_with_its_path(spec: dict[str, Any], problem: str) -> None:
    (found,) = problems(grant(**spec))
    assert found.startswith(problem), found


def test_all_problems_are_listed_at_once() -> None:
    found = problems(grant("-", "", workload="/", callers=[], launches=0, at_once=0, rate="x"))
    assert [each.split(":")[0] for each in found] == [
        "metadata.name",
        "metadata.version",
        "spec.workload",
        "spec.callers",
        "spec.launches",
        "spec.at_once",
        "spec.rate",
    ]
