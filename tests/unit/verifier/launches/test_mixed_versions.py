"""Replicas of two versions on one store: what only the newer one knows is no failure of the older one."""

from __future__ import annotations

from pathlib import Path
from uuid import UUID, uuid4

import pytest

from common.errors import Reason, Refused, SevattestError, WrongState
from common.sev.measurement import MeasurementBlob
from tests.support.desk import FIRMWARE, Desk, desk, refused
from tests.support.documents import CALLER
from verifier.admin.desks import owner_desks
from verifier.admin.paging import PageRequest
from verifier.launches.launch import ReleaseRequest
from verifier.launches.steps import RELEASE
from verifier.store.rows import AuditRow, LaunchFilter, Move, Outcome, RequestKey, RequestRow

NEWER = "ONLY_A_NEWER_REPLICA_KNOWS"
ALL = LaunchFilter()


async def refused_elsewhere(d: Desk, reason: str) -> tuple[UUID, SevattestError]:
    """A launch that another replica refused for `reason`, and what the host is told that repeats its request here."""
    begun = await d.begin()
    launch_id = begun.launch.launch_id
    blob = d.start(begun).measure(bytes(32))
    request = ReleaseRequest(
        caller=CALLER, request_id=uuid4(), launch_id=launch_id, blob=MeasurementBlob.parse(blob), firmware=FIRMWARE
    )
    key = RequestKey(caller=CALLER, method=RELEASE, request_id=request.request_id)
    audit = AuditRow(
        audit_id=uuid4(),
        time=d.clock.now(),
        event="launch.refused",
        launch_id=launch_id,
        caller=CALLER,
        reason=reason,
        body="{}",
    )
    move = Move(
        launch_id=launch_id,
        expected="open",
        to="refused",
        time=d.clock.now(),
        reason=reason,
        request=RequestRow(key=key, content=request.content(), launch_id=launch_id),
        audit=audit,
    )
    assert await d.store.move(move) is Outcome.DONE
    return launch_id, await refused(d.release(launch_id, blob, request_id=request.request_id))


@pytest.mark.parametrize(
    ("stored", "shown", "told", "kind"),
    [
        (NEWER, None, Reason.LAUNCH_REFUSED, WrongState),
        ("CHIP_REVOKED", Reason.CHIP_REVOKED, Reason.CHIP_REVOKED, Refused),
    ],
    ids=["unknown", "known"],
)
async def test_a_launch_is_shown_and_refused_again_whoever_knows_the_reason(
    tmp_path: Path, stored: str, shown: Reason | None, told: Reason, kind: type[SevattestError]
) -> None:
    async with desk(tmp_path) as d:
        launch_id, error = await refused_elsewhere(d, stored)
        assert (type(error), error.reason) == (kind, told)
        launch = await d.broker.get(CALLER, launch_id)
        assert (launch.state, launch.reason) == ("refused", shown)
        owner = owner_desks(d.dependencies, d.library)
        (listed,) = (await owner.launches.list(ALL, PageRequest(size=9))).items
        assert listed.launch == launch
        records = (await owner.records.records(None, PageRequest(size=9))).items
        assert [each.reason for each in records] == [None, shown]
        assert f'"reason":"{stored}"' in records[1].json  # the text that is hashed keeps what this one cannot read
