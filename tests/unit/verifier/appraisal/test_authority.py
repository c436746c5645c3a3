"""Who may launch, and which grant a launch spends."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from common.errors import InvalidInput, NotFound, Reason, Refused
from tests.support import documents
from tests.support.documents import CALLER, STRANGER
from verifier.appraisal.authority import RULES, choose, finding, likely, reason_against, stopped
from verifier.documents.grant import Grant
from verifier.documents.workload import Workload

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
LATER = (NOW + timedelta(hours=1)).isoformat()
EARLIER = (NOW - timedelta(hours=1)).isoformat()


def workload(**spec: Any) -> Workload:
    found = documents.read(documents.workload(**spec))
    assert isinstance(found, Workload)
    return found


def grant(name: str = "fleet", **spec: Any) -> Grant:
    found = documents.read(documents.grant(name, **spec))
    assert isinstance(found, Grant)
    return found


def chosen(
    *grants: Grant,
    caller: str = STRANGER,
    named: str | None = None,
    workload: Workload = workload(),  # noqa: B008
) -> Grant | None:
    return choose(workload=workload, caller=caller, named=named, grants={each.name: each for each in grants}, now=NOW)


def refused(*grants: Grant, **asked: Any) -> Reason:
    with pytest.raises(Refused) as caught:
        chosen(*grants, **asked)
    assert finding(caught.value).rule == RULES[caught.value.reason]
    return caught.value.reason


def test_the_likely_grant_is_the_chosen_one_and_none_where_that_depends() -> None:
    mine, twin, late = grant(), grant("twin"), grant("late", not_before=LATER)
    others = grant("other", callers=[CALLER]), grant("db", workload="db"), grant("old", versions=["0"])

    def told(*grants: Grant, caller: str = STRANGER, named: str | None = None) -> str | None:
        return likely(workload=workload(), caller=caller, named=named, grants={each.name: each for each in grants})

    assert told(mine, *others) == "fleet"
    assert told(mine, twin, named="twin") == "twin"
    assert told(*others, caller=CALLER) is None
    assert told(*others, caller=CALLER, named="other") == "other"
    assert told(*others) is None
    assert told(mine, twin) is None
    for made_up in ("other", "db", "old", "none"):
        assert told(mine, *others, named=made_up) is None
    # Which of them can be spent, the time decides.
    assert told(mine, late) is None


def test_a_workloads_own_caller_spends_no_grant_unless_it_names_one() -> None:
    own = grant(callers=[CALLER])
    assert chosen(own, caller=CALLER) is None
    assert chosen(own, caller=CALLER, named="fleet") is own


def test_a_caller_that_the_workload_does_not_name_spends_the_only_grant_that_fits() -> None:
    mine = grant()
    assert chosen(mine, grant("other", callers=[CALLER]), grant("db", workload="db")) is mine
    assert chosen(mine, named="fleet") is mine


def test_without_any_grant_for_the_workload_the_caller_is_not_allowed() -> None:
    assert refused() is Reason.CALLER_NOT_ALLOWED
    assert refused(grant(workload="db")) is Reason.CALLER_NOT_ALLOWED


def test_with_no_callers_at_all_only_grants_give_authority() -> None:
    nobody = workload(callers=[])
    assert refused(workload=nobody, caller=CALLER) is Reason.CALLER_NOT_ALLOWED
    mine = grant(callers=[CALLER])
    assert chosen(mine, workload=nobody, caller=CALLER) is mine


@pytest.mark.parametrize("spec", [{"callers": [CALLER]}, {"versions": ["2"]}])
def test_a_grant_for_others_requires_one_for_the_caller(spec: dict[str, Any]) -> None:
    assert refused(grant(**spec)) is Reason.GRANT_REQUIRED


def test_a_grant_for_the_version_in_another_spelling_fits() -> None:
    found = documents.read(documents.workload("web", "1.0"))
    assert isinstance(found, Workload)
    mine = grant(versions=["1.00"])
    assert chosen(mine, workload=found) is mine


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ({"suspended": True}, Reason.GRANT_SUSPENDED),
        ({"not_before": LATER}, Reason.GRANT_NOT_YET_VALID),
        ({"not_after": EARLIER}, Reason.GRANT_EXPIRED),
        ({"not_after": NOW.isoformat()}, Reason.GRANT_EXPIRED),
    ],
)
def test_a_grant_that_cannot_be_spent_now_says_why_named_or_not(spec: dict[str, Any], reason: Reason) -> None:
    mine = grant(**spec)
    assert reason_against(mine, NOW) is reason
    assert refused(mine) is reason
    assert refused(mine, named="fleet") is reason
    # Beside one that can be spent it plays no part.
    other = grant("other")
    assert chosen(mine, other) is other


@pytest.mark.parametrize("spec", [{"not_before": NOW.isoformat()}, {"not_after": LATER}, {"not_before": EARLIER}])
def test_a_grant_in_time_is_spent(spec: dict[str, Any]) -> None:
    mine = grant(**spec)
    assert reason_against(mine, NOW) is None
    assert chosen(mine) is mine


def test_of_several_that_cannot_be_spent_the_nearest_is_told() -> None:
    gone, stopped_one, soon = grant("a", not_after=EARLIER), grant("b", suspended=True), grant("c", not_before=LATER)
    assert refused(gone, stopped_one, soon) is Reason.GRANT_NOT_YET_VALID
    assert refused(gone, stopped_one) is Reason.GRANT_SUSPENDED


def test_more_than_one_that_could_be_spent_is_ambiguous_and_a_name_decides() -> None:
    first, second = grant("a"), grant("b")
    with pytest.raises(InvalidInput) as caught:
        chosen(first, second)
    assert caught.value.reason is Reason.GRANT_AMBIGUOUS
    assert chosen(first, second, named="b") is second


@pytest.mark.parametrize("grants", [(), (grant("other"),), (grant(callers=[CALLER]),), (grant(workload="db"),)])
def test_a_named_grant_that_is_not_the_callers_does_not_exist(grants: Sequence[Grant]) -> None:
    with pytest.raises(NotFound) as caught:
        chosen(*grants, named="fleet")
    assert caught.value.message == "there is no such grant"


def test_a_workloads_own_caller_cannot_name_somebody_elses_grant() -> None:
    with pytest.raises(NotFound):
        chosen(grant(callers=[STRANGER]), caller=CALLER, named="fleet")


def test_a_named_grant_for_another_version_is_no_authority() -> None:
    assert refused(grant(versions=["2"]), named="fleet") is Reason.GRANT_REQUIRED


def test_deleting_the_last_grant_never_widens_anything() -> None:
    assert refused(grant(callers=[CALLER])) is Reason.GRANT_REQUIRED
    assert refused() is Reason.CALLER_NOT_ALLOWED
    with pytest.raises(NotFound):
        chosen(named="fleet")


def test_a_begun_launch_stands_while_its_grant_is_on_file_and_not_suspended() -> None:
    assert stopped(None, None) is None
    assert stopped("fleet", grant()) is None
    # Times count at begin only.
    assert stopped("fleet", grant(not_after=EARLIER)) is None
    assert stopped("fleet", grant(suspended=True)) == "grant fleet 1 is suspended"
    assert stopped("fleet", None) == "grant fleet was withdrawn"


def test_every_reason_of_the_ledger_has_a_rule() -> None:
    error = Refused(Reason.GRANT_EXHAUSTED, "all were released")
    assert finding(error).rule == "grant.exhausted"
    assert finding(error).message == "all were released"
