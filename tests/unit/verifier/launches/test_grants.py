"""Launches that spend a grant: reserved at begin, consumed at release, else given back, and stopped by the owner."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from common.errors import Reason
from common.sev.measurement import FirmwareVersion, MeasurementBlob
from common.sev.secret import SecretEntry
from common.telemetry.prometheus import PrometheusMeter
from tests.support.chains import make_platform
from tests.support.desk import FIRMWARE, START, Desk, desk, refused
from tests.support.documents import CALLER, STRANGER
from tests.support.documents import workload as document
from tests.support.metrics import Page
from verifier.documents.workload import SecretSpec
from verifier.launches.launch import Begun, ReleaseRequest
from verifier.launches.records import AuditEvent
from verifier.launches.release import Releaser
from verifier.secrets.router import Secrets
from verifier.store.rows import LedgerRow, Spending

ELSEWHERE = "11" * 32


def grant(name: str = "g", *, version: str = "1", **changes: Any) -> dict[str, Any]:
    """A grant that is good; `changes` replace members of `spec`, None removes one."""
    spec: dict[str, Any] = {"workload": "web", "callers": [CALLER], "platforms": "any", "launches": 3, "at_once": 2}
    spec |= changes
    return {
        "apiVersion": "sevattest/v1",
        "kind": "Grant",
        "metadata": {"name": name, "version": version},
        "spec": {key: value for key, value in spec.items() if value is not None},
    }


def platform(desk_: Desk, *, fingerprint: str | None = None, **changes: Any) -> dict[str, Any]:
    """The document of the desk's platform, or of another chip."""
    cek = fingerprint or desk_.platform.chain.cek.fingerprint.hex()
    spec: dict[str, Any] = {"cek": cek, "pools": ["here"], "callers": "any"}
    return {
        "apiVersion": "sevattest/v1",
        "kind": "Platform",
        "metadata": {"name": "node", "version": "1"},
        "spec": spec | changes,
    }


def revocation(**spec: Any) -> dict[str, Any]:
    """A revocation."""
    return {
        "apiVersion": "sevattest/v1",
        "kind": "Revocation",
        "metadata": {"name": "never-again", "version": "1"},
        "spec": {"why": "a test", **spec},
    }


def owned(*contents: dict[str, Any]) -> Sequence[dict[str, Any]]:
    """A workload without callers of its own, and more documents."""
    return [document(callers=None), *contents]


async def released(d: Desk, begun: Begun) -> None:
    """Bring a launch to its good end."""
    guest = d.start(begun)
    blob = guest.measure((await d.digests())[0])
    assert guest.open(await d.release(begun.launch.launch_id, blob), blob)


async def reason(step: Any) -> Reason:
    """The reason that a step is refused for."""
    return (await refused(step)).reason


def last(d: Desk) -> tuple[str, dict[str, Any]]:
    """The last audit record: its event and body."""
    record = d.audit()[-1]
    return record.event, json.loads(record.body)


async def test_a_grant_is_reserved_consumed_and_given_back(tmp_path: Path) -> None:
    async with desk(tmp_path, content=owned(grant())) as d:
        first, second = await d.begin(), await d.begin(grant="g")
        assert await d.store.ledger("g") == LedgerRow(open=2)
        assert await reason(d.begin()) is Reason.GRANT_BUSY
        await released(d, first)
        await d.abandon(second.launch.launch_id)
        assert await d.store.ledger("g") == LedgerRow(released=1)
        row = await d.store.launch(first.launch.launch_id)
        assert row is not None
        assert row.grant == "g"
        assert d.receipt(await d.release(*await measured(d)))["grant"] == "g"
        await released(d, await d.begin())
        assert await reason(d.begin()) is Reason.GRANT_EXHAUSTED
        assert last(d)[1]["findings"][0]["rule"] == "grant.exhausted"
        assert await d.store.ledger("g") == LedgerRow(released=3)


async def measured(d: Desk) -> tuple[UUID, bytes]:
    """A launch that has begun, and its measurement."""
    begun = await d.begin()
    return begun.launch.launch_id, d.start(begun).measure((await d.digests())[0])


async def test_a_repeated_begin_reserves_once(tmp_path: Path) -> None:
    async with desk(tmp_path, content=owned(grant())) as d:
        request_id = uuid4()
        first = await d.begin(request_id=request_id)
        assert await d.begin(request_id=request_id) == first
        assert await d.store.ledger("g") == LedgerRow(open=1)


async def test_the_reservation_of_a_launch_that_never_came_back_is_given_back(tmp_path: Path) -> None:
    async with desk(tmp_path, content=owned(grant(at_once=1))) as d:
        await d.begin()
        assert await reason(d.begin()) is Reason.GRANT_BUSY
        d.clock.advance(timedelta(minutes=10))
        # Nobody has swept: whoever needs the reservation looks.
        await d.begin()
        assert await d.store.ledger("g") == LedgerRow(open=1)


@pytest.mark.parametrize("forgotten", [True, False], ids=["forgotten", "known"])
async def test_a_launch_that_its_ledger_forgot_ends_without_it_and_holds_nobody_up(
    tmp_path: Path, *, forgotten: bool
) -> None:
    meter = PrometheusMeter()
    async with desk(tmp_path, content=[document(), grant()], meter=meter) as d:
        first = (await d.begin(grant="g")).launch.launch_id
        other = (await d.begin()).launch.launch_id
        if forgotten:
            record = d.dependencies.records.row(AuditEvent.DOCUMENT_APPLIED, time=d.clock.now(), caller=None)
            await d.store.record(record, Spending(grant="g", change=lambda row: replace(row, open=0)))
        d.clock.advance(timedelta(minutes=10))
        assert await d.broker.expire_overdue() == 2
        for launch_id in (first, other):
            assert (await d.broker.get(CALLER, launch_id)).state == "expired"
            assert await d.keys_of(launch_id) is None
        assert await d.store.ledger("g") == LedgerRow()
        (ended,) = (json.loads(row.body) for row in d.audit(first) if row.event == "launch.expired")
        assert ended == ({"grant": "g", "settled": False} if forgotten else {})
        lines = [(line.level, line.fields["launch_id"]) for line in d.log.named("grant.unsettled")]
        assert lines == ([("error", str(first))] if forgotten else [])
        page = Page(text=(await meter.page()).decode())
        assert page.of("sevattest_grants_unsettled_total") == int(forgotten)
        assert page.of("sevattest_audit_records_total", event="launch.expired") == 2


async def test_smaller_limits_stop_no_open_launch_but_the_next_one(tmp_path: Path) -> None:
    async with desk(tmp_path, content=owned(grant())) as d:
        first, second = await d.begin(), await d.begin()
        d.write(grant(version="2", launches=1, at_once=1))
        await d.library.load()
        assert await reason(d.begin()) is Reason.GRANT_BUSY
        await released(d, first)
        await released(d, second)
        assert await d.store.ledger("g") == LedgerRow(released=2)
        assert await reason(d.begin()) is Reason.GRANT_EXHAUSTED


async def test_refusals_are_counted_and_suspend_the_grant(tmp_path: Path) -> None:
    async with desk(tmp_path, content=owned(grant(refusals=2))) as d:
        for _ in range(2):
            begun = await d.begin()
            blob = d.start(begun).measure(bytes(32))
            assert await reason(d.release(begun.launch.launch_id, blob)) is Reason.MEASUREMENT_REFUSED
        assert await d.store.ledger("g") == LedgerRow(refused=2)
        assert await reason(d.begin()) is Reason.GRANT_SUSPENDED


async def test_launches_that_a_kill_switch_stops_suspend_nothing_once_it_is_lifted(tmp_path: Path) -> None:
    async with desk(tmp_path, content=owned(grant(refusals=1))) as d:
        begun = [await d.begin() for _ in range(2)]
        d.write(grant(version="2", refusals=1, suspended=True))
        await d.library.load()
        for each in begun:
            blob = d.start(each).measure((await d.digests())[0])
            assert await reason(d.release(each.launch.launch_id, blob)) is Reason.GRANT_SUSPENDED
        assert await d.store.ledger("g") == LedgerRow()
        d.write(grant(version="3", refusals=1))
        await d.library.load()
        await released(d, await d.begin())


async def test_a_measurement_that_is_refused_counts_beside_a_kill_switch_too(tmp_path: Path) -> None:
    async with desk(tmp_path, content=owned(grant())) as d:
        begun = await d.begin()
        d.write(grant(version="2", suspended=True))
        await d.library.load()
        blob = d.start(begun).measure(bytes(32))
        assert await reason(d.release(begun.launch.launch_id, blob)) is Reason.GRANT_SUSPENDED
        assert await d.store.ledger("g") == LedgerRow(refused=1)


async def test_a_new_version_changes_the_limits_and_not_what_was_spent(tmp_path: Path) -> None:
    async with desk(tmp_path, content=owned(grant(launches=1))) as d:
        await released(d, await d.begin())
        assert await reason(d.begin()) is Reason.GRANT_EXHAUSTED
        d.write(grant(version="2", launches=2))
        await d.library.load()
        await released(d, await d.begin())
        assert await reason(d.begin()) is Reason.GRANT_EXHAUSTED


async def test_the_workloads_own_callers_spend_none_unless_they_name_one(tmp_path: Path) -> None:
    async with desk(tmp_path, content=[document(), grant()]) as d:
        await d.begin()
        assert await d.store.ledger("g") == LedgerRow()
        await d.begin(grant="g")
        assert await d.store.ledger("g") == LedgerRow(open=1)


async def test_without_a_grant_nobody_but_the_workloads_callers_may_launch(tmp_path: Path) -> None:
    async with desk(tmp_path, content=owned()) as d:
        assert await reason(d.begin()) is Reason.CALLER_NOT_ALLOWED
    async with desk(tmp_path / "other", content=owned(grant(callers=[STRANGER]))) as d:
        assert await reason(d.begin()) is Reason.GRANT_REQUIRED
        assert await reason(d.begin(grant="g")) is Reason.NOT_FOUND
        await d.begin(caller=STRANGER)


async def test_two_grants_must_be_told_apart_by_name(tmp_path: Path) -> None:
    async with desk(tmp_path, content=owned(grant(), grant("h"))) as d:
        assert await reason(d.begin()) is Reason.GRANT_AMBIGUOUS
        await d.begin(grant="h")
        assert await d.store.ledger("h") == LedgerRow(open=1)


@pytest.mark.parametrize(
    ("changes", "rule", "expected"),
    [
        ({"suspended": True}, "grant.suspended", Reason.GRANT_SUSPENDED),
        (
            {"not_before": (START + timedelta(hours=1)).isoformat()},
            "grant.not_yet_valid",
            Reason.GRANT_NOT_YET_VALID,
        ),
        ({"not_after": START.isoformat()}, "grant.expired", Reason.GRANT_EXPIRED),
        ({"workload": "other"}, "workload.caller", Reason.CALLER_NOT_ALLOWED),
        ({"versions": ["2"]}, "grant.required", Reason.GRANT_REQUIRED),
    ],
)
async def test_a_grant_that_cannot_be_spent_says_why_and_is_recorded(
    tmp_path: Path, changes: dict[str, Any], rule: str, expected: Reason
) -> None:
    async with desk(tmp_path, content=owned(grant(**changes))) as d:
        assert await reason(d.begin()) is expected
        event, body = last(d)
        assert event == "launch.begin_refused"
        assert (body["findings"][0]["rule"], body["findings"][0]["reason"]) == (rule, expected)
        assert await d.store.ledger("g") == LedgerRow()


async def test_the_rate_holds_and_says_how_long_to_wait(tmp_path: Path) -> None:
    async with desk(tmp_path, content=owned(grant(launches=100, at_once=100, rate="2/1m"))) as d:
        await d.begin()
        await d.begin()
        error = await refused(d.begin())
        assert (error.reason, error.fields["retry_after"]) == (Reason.GRANT_RATE_LIMITED, "30")
        d.clock.advance(timedelta(seconds=30))
        await d.begin()
        assert await reason(d.begin()) is Reason.GRANT_RATE_LIMITED


async def test_a_grant_for_a_pool_is_for_its_platforms_only(tmp_path: Path) -> None:
    async with desk(tmp_path, content=owned(grant(platforms={"pools": ["here"]}))) as d:
        assert await reason(d.begin()) is Reason.HOST_NOT_IN_POOL
        d.write(platform(d, fingerprint=ELSEWHERE))
        await d.library.load()
        assert await reason(d.begin()) is Reason.HOST_NOT_IN_POOL
        d.write(platform(d))
        await d.library.load()
        await d.begin()


async def test_a_platform_is_for_its_callers_only(tmp_path: Path) -> None:
    async with desk(tmp_path, content=document(callers=[CALLER, STRANGER])) as d:
        d.write(platform(d, callers=[STRANGER]))
        await d.library.load()
        assert await reason(d.begin()) is Reason.HOST_NOT_FOR_CALLER
        await d.begin(caller=STRANGER)


async def test_a_platform_of_another_owner_than_the_workload_allows_is_refused(tmp_path: Path) -> None:
    host = make_platform()
    for turn, (oca, allowed) in enumerate([(host.chain.oca.fingerprint.hex(), True), (ELSEWHERE, False)]):
        content = document(platforms={"generations": ["emulated"], "chips": "any", "ownership": [oca]})
        async with desk(tmp_path / str(turn), content=content, platform=host) as d:
            if allowed:
                await released(d, await d.begin())
            else:
                assert await reason(d.begin()) is Reason.PLATFORM_OWNER_NOT_ALLOWED
                assert last(d)[1]["findings"][0]["rule"] == "platform.ownership"


@pytest.mark.parametrize("how", ["suspended", "withdrawn"])
async def test_the_kill_switch_stops_a_launch_that_has_begun(tmp_path: Path, how: str) -> None:
    async with desk(tmp_path, content=owned(grant())) as d:
        begun, other = await d.begin(), await d.begin()
        await released(d, other)
        if how == "suspended":
            d.write(grant(version="2", suspended=True))
        else:
            d.remove("Grant", "g")
        await d.library.load()
        blob = d.start(begun).measure((await d.digests())[0])
        assert await reason(d.release(begun.launch.launch_id, blob)) is Reason.GRANT_SUSPENDED
        assert last(d)[1]["findings"][0]["rule"] == "launch.grant"
        assert await d.store.ledger("g") == LedgerRow(released=1)


@pytest.mark.parametrize("what", ["ceks", "chips", "generations", "firmware", "ocas", "workloads"])
async def test_what_is_revoked_is_neither_begun_nor_released_nor_repeated(tmp_path: Path, what: str) -> None:
    async with desk(tmp_path) as d:
        chip_id = b"\x05" * 64
        begun = await d.begin(chip_id=chip_id)
        before = await d.begin(chip_id=chip_id)
        guest, request_id = d.start(before), uuid4()
        blob = guest.measure((await d.digests())[0])
        await d.release(before.launch.launch_id, blob, request_id=request_id)
        chain = d.platform.chain
        denied: dict[str, Any] = {
            "ceks": [chain.cek.fingerprint.hex()],
            "chips": [chip_id.hex()],
            "generations": ["emulated"],
            "firmware": [{"generation": "emulated", "below": "1.55.25"}],
            "ocas": [chain.oca.fingerprint.hex()],
            "workloads": [{"name": "web", "versions": ["1"]}],
        }
        d.write(revocation(**{what: denied[what]}))
        await d.library.load()
        expected = Reason.CHIP_REVOKED if what in {"ceks", "chips"} else Reason.REVOKED
        if what != "firmware":  # which is proven by the measurement alone
            assert await reason(d.begin(chip_id=chip_id)) is expected
        launch_id = begun.launch.launch_id
        good = d.start(begun).measure((await d.digests())[0])
        assert await reason(d.release(launch_id, good)) is expected
        assert await reason(d.release(before.launch.launch_id, blob, request_id=request_id)) is expected


async def test_a_revocation_of_something_else_touches_nothing(tmp_path: Path) -> None:
    async with desk(tmp_path) as d:
        d.write(
            revocation(
                ceks=[ELSEWHERE],
                generations=["naples"],
                firmware=[{"generation": "emulated", "below": "1.55.24"}, {"generation": "milan", "below": "9.9.9"}],
                workloads=[{"name": "web", "versions": ["2"]}, {"name": "other", "versions": "any"}],
            )
        )
        await d.library.load()
        await released(d, await d.begin())


async def test_documents_that_change_while_a_launch_is_judged_are_judged_again(tmp_path: Path) -> None:
    """The kill switch is pulled between judgement and transaction: nothing gets through."""
    pulled = 0

    class Pulling(Secrets):
        async def read(self, specs: Sequence[SecretSpec]) -> tuple[SecretEntry, ...]:
            nonlocal pulled
            pulled += 1
            if pulled == 1:
                await d.apply(grant("stored", version="2", suspended=True))
            return await super().read(specs)

    async with desk(tmp_path, content=owned()) as d:
        await d.apply(grant("stored"))
        begun = await d.begin()
        blob = d.start(begun).measure((await d.digests())[0])
        request = ReleaseRequest(
            caller=CALLER,
            request_id=uuid4(),
            launch_id=begun.launch.launch_id,
            blob=MeasurementBlob.parse(blob),
            firmware=FIRMWARE,
        )
        releaser = Releaser(replace(d.dependencies, secrets=Pulling()))
        assert await reason(releaser.release(request)) is Reason.GRANT_SUSPENDED
        assert pulled == 1
        assert (await d.broker.get(CALLER, begun.launch.launch_id)).state == "refused"
        assert await d.store.ledger("stored") == LedgerRow()


async def test_keys_that_were_used_under_older_firmware_are_refused_after_an_update(tmp_path: Path) -> None:
    old, new = FirmwareVersion(1, 55, 24), FirmwareVersion(1, 55, 25)
    async with desk(tmp_path) as d:
        digest = (await d.digests())[0]
        for version in (old, old):
            begun = await d.begin()
            await d.release(begun.launch.launch_id, d.start(begun).measure(digest, version), firmware=version)
        begun = await d.begin()
        blob = d.start(begun).measure(digest, new)
        step = d.release(begun.launch.launch_id, blob, firmware=new)
        assert await reason(step) is Reason.PDH_PREDATES_FIRMWARE
