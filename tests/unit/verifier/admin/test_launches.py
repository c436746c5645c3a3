"""What the owner sees of launches, grants and revocations."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from uuid import UUID, uuid4

import msgspec
import pytest

from common.amd.kds import FolderKeyService
from common.errors import InvalidInput, NotFound, Reason
from tests.support.desk import refused
from tests.support.documents import CALLER, STRANGER, grant, revocation, workload
from tests.support.owner_site import OwnerSite, asked, text
from verifier.admin.filed import Kind
from verifier.admin.paging import PageRequest
from verifier.launches.state import State
from verifier.store.rows import LaunchFilter

ALL = LaunchFilter()
PAGE = PageRequest(size=100)


async def test_a_refused_launch_is_shown_with_findings_and_explanation(site: OwnerSite) -> None:
    begun = await site.refused()
    shown = await site.owner.launches.get(begun.launch.launch_id)
    assert (shown.launch.state, shown.launch.reason) == (State.REFUSED, Reason.MEASUREMENT_REFUSED)
    assert [each.rule for each in shown.findings] == ["launch.measurement"]
    assert shown.explanation
    assert shown.audit_id is not None
    assert str(shown.firmware) == "1.55.24"


async def test_a_released_launch_is_shown_with_its_proven_firmware_and_no_finding(site: OwnerSite) -> None:
    begun = await site.released()
    shown = await site.owner.launches.get(begun.launch.launch_id)
    assert (shown.launch.state, shown.findings, shown.explanation) == (State.RELEASED, (), None)
    assert str(shown.firmware) == "1.55.24"
    assert (shown.caller, shown.grant) == (CALLER, None)


async def test_a_launch_is_shown_with_the_pseudonym_by_which_its_record_knows_the_chip(site: OwnerSite) -> None:
    launch_id = (await site.released()).launch.launch_id
    shown = await site.owner.launches.get(launch_id)
    records = await site.desk.store.records(launch_id, after=0, limit=10)
    recorded = {msgspec.json.decode(each.record.body)["platform"]["chip"] for each in records}
    assert recorded == {shown.chip}
    assert shown.launch.fingerprint not in shown.chip
    touching = revocation(ceks=[shown.launch.fingerprint])
    [touched] = (await site.owner.impact.touched(text=text(touching), name="", page=PAGE)).items
    assert touched.chip == shown.chip


async def test_an_unknown_launch_is_not_found(site: OwnerSite) -> None:
    assert isinstance(await refused(site.owner.launches.get(uuid4())), NotFound)


async def test_launches_of_all_callers_are_listed_newest_first(site: OwnerSite) -> None:
    await site.apply(grant())
    begun = []
    for caller in (CALLER, STRANGER, CALLER):
        begun.append((await site.desk.begin(caller=caller)).launch.launch_id)
        site.desk.clock.advance(timedelta(seconds=1))
    seen, token = [], ""
    while True:
        page = await site.owner.launches.list(ALL, PageRequest(size=2, token=token))
        seen += [each.launch.launch_id for each in page.items]
        token = page.next_token
        if not token:
            break
    assert seen == begun[::-1]


async def test_filters_leave_the_others_out(site: OwnerSite) -> None:
    await site.apply(grant())
    await site.apply(workload("shop"))
    spending = (await site.desk.begin(caller=STRANGER)).launch.launch_id
    released = (await site.released()).launch.launch_id
    other = (await site.desk.begin(workload="shop")).launch.launch_id
    for which, expected in (
        (LaunchFilter(grant="fleet"), [spending]),
        (LaunchFilter(caller=STRANGER), [spending]),
        (LaunchFilter(state="released"), [released]),
        (LaunchFilter(workload="shop"), [other]),
        (LaunchFilter(workload="shop", state="released"), []),
    ):
        page = await site.owner.launches.list(which, PAGE)
        assert [each.launch.launch_id for each in page.items] == expected


async def test_a_page_looks_at_so_many_launches_and_the_listing_goes_on_behind_them(
    site: OwnerSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("verifier.admin.launches._LOOKED_AT", 3)
    await site.apply(grant(at_once=10))
    begun = []
    for index in range(8):
        caller = STRANGER if index in {0, 1, 7} else CALLER
        begun.append((await site.desk.begin(caller=caller)).launch.launch_id)
        site.desk.clock.advance(timedelta(seconds=1))
    pages: list[list[UUID]] = []
    token = ""
    while not pages or token:
        page = await site.owner.launches.list(LaunchFilter(caller=STRANGER), PageRequest(size=2, token=token))
        pages.append([each.launch.launch_id for each in page.items])
        token = page.next_token
    assert pages == [[begun[7]], [], [begun[1], begun[0]]]
    assert (await site.owner.launches.list(LaunchFilter(caller="spiffe://a/orchestrator/b"), PAGE)).items == []


async def test_a_token_of_another_listing_is_refused(site: OwnerSite) -> None:
    for _ in range(2):
        await site.desk.begin()
    token = (await site.owner.launches.list(ALL, PageRequest(size=1))).next_token
    assert token
    for which, bad in ((LaunchFilter(workload="web"), token), (ALL, token[:-4]), (ALL, "garbage")):
        error = await refused(site.owner.launches.list(which, PageRequest(size=1, token=bad)))
        assert isinstance(error, InvalidInput)


async def test_a_token_that_names_no_launch_is_refused(site: OwnerSite) -> None:
    from verifier.admin.paging import Listing

    token = Listing("ListLaunches", None, None, None, None).token(str(uuid4()))
    assert isinstance(await refused(site.owner.launches.list(ALL, PageRequest(size=1, token=token))), InvalidInput)


# Grants.


async def test_a_grants_status_counts_what_was_spent(site: OwnerSite) -> None:
    await site.apply(grant(launches=2))
    fresh = await site.owner.grants.status("fleet")
    assert (fresh.spent.open, fresh.spent.released, fresh.reason) == (0, 0, None)
    await site.released(caller=STRANGER)
    await site.desk.begin(caller=STRANGER)
    spent = await site.owner.grants.status("fleet")
    assert (spent.spent.open, spent.spent.released) == (1, 1)
    assert spent.reason is Reason.GRANT_BUSY
    assert spent.document is not None
    assert spent.document.version == "1"


async def test_a_grants_status_counts_no_reservation_whose_time_ran_out(site: OwnerSite) -> None:
    await site.apply(grant(at_once=2))
    await site.desk.begin(caller=STRANGER)
    site.desk.clock.advance(timedelta(minutes=6))
    await site.desk.begin(caller=STRANGER)
    full = await site.owner.grants.status("fleet")
    assert (full.spent.open, full.reason) == (2, Reason.GRANT_BUSY)
    site.desk.clock.advance(timedelta(minutes=6))
    room = await site.owner.grants.status("fleet")
    assert (room.spent.open, room.reason) == (1, None)
    # Begin says so, too: it is what gives the reservation back, and asking did not.
    assert (await site.desk.store.ledger("fleet")).open == 2
    await site.desk.begin(caller=STRANGER)
    assert (await site.owner.grants.status("fleet")).spent.open == 2


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"suspended": True}, Reason.GRANT_SUSPENDED),
        ({"not_after": "2026-01-01T00:00:00Z"}, Reason.GRANT_EXPIRED),
        ({"not_before": "2027-01-01T00:00:00Z"}, Reason.GRANT_NOT_YET_VALID),
        ({}, None),
    ],
)
async def test_a_grants_status_says_why_it_cannot_be_spent(
    site: OwnerSite, changes: dict[str, object], reason: Reason | None
) -> None:
    await site.apply(grant(**changes))
    assert (await site.owner.grants.status("fleet")).reason is reason


async def test_what_a_withdrawn_grant_spent_is_still_known(site: OwnerSite) -> None:
    await site.apply(grant())
    await site.released(caller=STRANGER)
    await site.owner.documents.delete(asked(), Kind.GRANT, "fleet")
    status = await site.owner.grants.status("fleet")
    assert (status.document, status.spent.released, status.reason) == (None, 1, Reason.NOT_FOUND)


async def test_a_grant_that_never_was_is_not_found(site: OwnerSite) -> None:
    assert isinstance(await refused(site.owner.grants.status("fleet")), NotFound)


# Revocations.


async def test_a_revocation_that_is_only_supposed_lists_what_it_would_touch(site: OwnerSite) -> None:
    released = (await site.released()).launch.launch_id
    revision = await site.desk.store.revision()
    touching = revocation(ceks=[site.desk.platform.chain.cek.fingerprint.hex()])
    page = await site.owner.impact.touched(text=text(touching), name="", page=PAGE)
    assert [each.launch.launch_id for each in page.items] == [released]
    assert [each.rule for each in page.items[0].findings] == ["launch.chip_revoked"]
    assert await site.desk.store.revision() == revision
    other = await site.owner.impact.touched(text=text(revocation(ceks=["cd" * 32])), name="", page=PAGE)
    assert (other.items, other.next_token) == ([], "")


async def test_a_revocation_in_force_is_asked_by_name(site: OwnerSite) -> None:
    await site.released()
    firmware = {"generation": "emulated", "versions": ["1.55.24"]}
    await site.apply(revocation("old-builds", ceks=[], firmware=[firmware]))
    page = await site.owner.impact.touched(text=b"", name="old-builds", page=PAGE)
    assert [each.rule for each in page.items[0].findings] == ["launch.revoked"]
    assert isinstance(await refused(site.owner.impact.touched(text=b"", name="none", page=PAGE)), NotFound)


async def test_a_chip_that_hid_its_id_is_touched_by_a_revocation_of_it_once_its_key_is_known(
    site: OwnerSite, tmp_path: Path
) -> None:
    desk = site.desk
    hidden = (await desk.begin()).launch.launch_id
    chip_id, elsewhere = desk.platform.chip_id.hex(), "cd" * 64
    (tmp_path / f"{chip_id}.cert").write_bytes(desk.platform.chain.cek.raw)
    desk.denied.set_owners([chip_id, elsewhere])
    await desk.denied.resolve(FolderKeyService(tmp_path), [desk.platform.root], desk.log)
    for chip, touched in ((chip_id, [hidden]), (elsewhere, [])):
        content = text(revocation(chips=[chip], ceks=[]))
        page = await site.owner.impact.touched(text=content, name="", page=PAGE)
        assert [each.launch.launch_id for each in page.items] == touched


async def test_impact_comes_in_pages(site: OwnerSite) -> None:
    begun = []
    for _ in range(3):
        begun.append((await site.desk.begin()).launch.launch_id)
        site.desk.clock.advance(timedelta(seconds=1))
    content = text(revocation(workloads=[{"name": "web", "versions": "any"}]))
    seen, token = [], ""
    for _ in range(3):
        page = await site.owner.impact.touched(text=content, name="", page=PageRequest(size=1, token=token))
        seen += [each.launch.launch_id for each in page.items]
        token = page.next_token
    assert (seen, token) == (begun[::-1], "")


async def test_what_is_no_revocation_has_no_impact(site: OwnerSite) -> None:
    for content, name in ((text(grant()), ""), (b"}{", ""), (b"", ""), (text(revocation()), "incident")):
        error = await refused(site.owner.impact.touched(text=content, name=name, page=PAGE))
        assert isinstance(error, InvalidInput)
