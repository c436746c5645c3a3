"""The owner's documents: kept whole or not at all, repeated without effect, in conflict with nothing on file."""

from __future__ import annotations

import asyncio
import json
from typing import Any
from uuid import uuid4

import pytest
import yaml

from common.errors import InvalidInput, NotFound, Reason, WrongState
from tests.support.desk import refused
from tests.support.documents import CALLER, SECRET_GUID, STRANGER, grant, platform, revocation, workload
from tests.support.owner_site import OTHER_OWNER, OwnerSite, asked, text
from verifier.admin.filed import Kind
from verifier.admin.paging import PageRequest
from verifier.store.rows import Outcome

PAGE = PageRequest(size=100)


def events(site: OwnerSite, event: str) -> list[dict[str, Any]]:
    return [json.loads(each.body) for each in site.desk.audit() if each.event == event]


async def test_a_document_is_on_file_once_applied(site: OwnerSite) -> None:
    applied = await site.apply(grant())
    assert applied.changed
    found = await site.owner.documents.get(Kind.GRANT, "fleet", None)
    assert found == applied.document
    assert (found.version, found.file, found.apply_time) == ("1", "", site.desk.clock.now())
    assert json.loads(found.json)["spec"]["suspended"] is False  # a default, written out
    begun = await site.desk.begin(caller=STRANGER)
    row = await site.desk.store.launch(begun.launch.launch_id)
    assert row is not None
    assert row.grant == "fleet"


async def test_applying_is_recorded_with_who_and_what(site: OwnerSite) -> None:
    applied = await site.apply(grant())
    [record] = [each for each in site.desk.audit() if each.event == "document.applied"]
    assert record.caller == asked().caller
    assert json.loads(record.body) == {
        "kind": "Grant",
        "name": "fleet",
        "version": "1",
        "sha256": applied.document.sha256,
    }


@pytest.mark.parametrize("spelled", ["yaml", "json"])
async def test_yaml_and_json_are_told_apart_by_their_first_character(site: OwnerSite, spelled: str) -> None:
    spell = yaml.safe_dump if spelled == "yaml" else json.dumps
    applied = await site.owner.documents.apply(asked(), f"\n{spell(grant())}".encode())
    assert applied.document.name == "fleet"


async def test_a_bad_document_changes_nothing_and_says_all_that_is_wrong(site: OwnerSite) -> None:
    revision = await site.desk.store.revision()
    bad = grant(launches=0, at_once=0)
    error = await refused(site.apply(bad))
    assert isinstance(error, InvalidInput)
    assert "spec.launches" in error.message
    assert "spec.at_once" in error.message
    assert await site.desk.store.revision() == revision
    assert events(site, "document.applied") == []


async def test_the_same_request_is_answered_again_and_changes_nothing_more(site: OwnerSite) -> None:
    request_id = uuid4()
    first = await site.apply(grant(), request_id)
    again = await site.apply(grant(), request_id)
    assert again == first
    assert len(events(site, "document.applied")) == 1


async def test_the_same_request_is_answered_again_when_the_document_is_withdrawn_by_then(site: OwnerSite) -> None:
    request_id = uuid4()
    await site.apply(grant(), request_id)
    await site.owner.documents.delete(asked(), Kind.GRANT, "fleet")
    again = await site.apply(grant(), request_id)
    assert again.changed
    assert (await refused(site.owner.documents.get(Kind.GRANT, "fleet", None))).reason is Reason.NOT_FOUND


async def test_a_request_id_with_another_text_is_refused(site: OwnerSite) -> None:
    request_id = uuid4()
    await site.apply(grant(), request_id)
    error = await refused(site.apply(grant("fleet", "2"), request_id))
    assert error.reason is Reason.REQUEST_ID_REUSED
    assert (await site.owner.documents.get(Kind.GRANT, "fleet", None)).version == "1"


async def test_two_owners_may_choose_the_same_request_id(site: OwnerSite) -> None:
    request_id = uuid4()
    await site.apply(grant(), request_id)
    other = await site.owner.documents.apply(asked(request_id, caller=OTHER_OWNER), text(grant("fleet", "2")))
    assert other.changed


async def test_the_same_text_under_another_request_changes_nothing(site: OwnerSite) -> None:
    first = await site.apply(grant())
    again = await site.apply(grant())
    assert (first.changed, again.changed) == (True, False)
    assert again.document == first.document
    assert len(events(site, "document.applied")) == 1


async def test_another_text_under_the_same_version_is_a_conflict(site: OwnerSite) -> None:
    await site.apply(grant())
    error = await refused(site.apply(grant(launches=11)))
    assert isinstance(error, WrongState)
    assert error.reason is Reason.DOCUMENT_CONFLICT
    assert "metadata.version" in error.message
    assert (await site.desk.library.current()).grants["fleet"].launches == 10


async def test_of_two_texts_under_one_version_at_once_one_is_kept(site: OwnerSite) -> None:
    outcomes = await asyncio.gather(*(site.apply(grant(launches=n)) for n in (11, 12, 13)), return_exceptions=True)
    kept = [each for each in outcomes if not isinstance(each, BaseException)]
    assert len(kept) == 1
    assert all(isinstance(each, WrongState) for each in outcomes if isinstance(each, BaseException))
    assert len(events(site, "document.applied")) == 1


async def test_the_same_request_twice_at_once_is_carried_out_once(site: OwnerSite) -> None:
    request_id = uuid4()
    answers = await asyncio.gather(*(site.apply(grant(), request_id) for _ in range(4)))
    assert all(each.changed for each in answers)
    assert len(events(site, "document.applied")) == 1


async def test_what_a_file_has_cannot_be_applied(site: OwnerSite) -> None:
    error = await refused(site.apply(workload("web", "7")))
    assert error.reason is Reason.DOCUMENT_CONFLICT
    assert "web-0.yaml" in error.message
    assert (await site.apply(workload("shop"))).changed


async def test_what_a_file_has_cannot_be_deleted(site: OwnerSite) -> None:
    error = await refused(site.owner.documents.delete(asked(), Kind.WORKLOAD, "web"))
    assert error.reason is Reason.DOCUMENT_CONFLICT
    assert "web-0.yaml" in error.message
    assert (await site.owner.documents.get(Kind.WORKLOAD, "web", None)).file == "web-0.yaml"


async def test_two_platforms_of_one_chip_are_a_conflict(site: OwnerSite) -> None:
    await site.apply(platform("host-1"))
    error = await refused(site.apply(platform("host-2")))
    assert error.reason is Reason.DOCUMENT_CONFLICT
    assert (await site.apply(platform("host-1", "2"))).changed


async def test_a_relative_path_starts_at_the_folder_of_documents(site: OwnerSite) -> None:
    await site.apply(workload("shop"))
    [shop] = (await site.desk.library.current()).workloads["shop"]
    assert shop.artefacts is not None
    assert shop.artefacts.firmware == site.desk.documents / "ovmf.fd"


async def test_a_check_changes_nothing(site: OwnerSite) -> None:
    revision = await site.desk.store.revision()
    checked = await site.owner.documents.check(text(grant()))
    assert checked.changed
    assert checked.document.apply_time is None
    assert await site.desk.store.revision() == revision
    assert site.desk.audit() == []
    await site.apply(grant())
    assert not (await site.owner.documents.check(text(grant()))).changed


async def test_a_check_of_a_bad_document_fails_as_applying_it_would(site: OwnerSite) -> None:
    assert isinstance(await refused(site.owner.documents.check(text(grant(launches=0)))), InvalidInput)
    assert isinstance(await refused(site.owner.documents.check(b"}{")), InvalidInput)


async def test_a_check_shows_a_document_in_conflict_with_the_conflict(site: OwnerSite) -> None:
    await site.apply(grant())
    checked = await site.owner.documents.check(text(grant(launches=11)))
    assert not checked.changed
    assert checked.document.apply_time is None
    assert "metadata.version" in checked.document.warnings[0]
    assert json.loads(checked.document.json)["spec"]["launches"] == 11


async def test_a_deleted_document_counts_no_more(site: OwnerSite) -> None:
    await site.apply(grant())
    await site.apply(grant("fleet", "2"))
    await site.owner.documents.delete(asked(), Kind.GRANT, "fleet")
    assert (await refused(site.desk.begin(caller=STRANGER))).reason is Reason.CALLER_NOT_ALLOWED
    [body] = events(site, "document.deleted")
    assert (body["kind"], body["name"]) == ("Grant", "fleet")
    assert [each["version"] for each in body["versions"]] == ["2", "1"]


async def test_a_version_that_comes_while_its_document_is_deleted_is_named_by_the_record(
    site: OwnerSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    await site.apply(grant())
    delete = site.desk.store.delete_document

    async def late(*args: Any, **named: Any) -> Outcome:
        monkeypatch.undo()
        await site.apply(grant("fleet", "2"))
        return await delete(*args, **named)

    monkeypatch.setattr(site.desk.store, "delete_document", late)
    await site.owner.documents.delete(asked(), Kind.GRANT, "fleet")
    [body] = events(site, "document.deleted")
    assert [each["version"] for each in body["versions"]] == ["2", "1"]


async def test_what_is_not_there_cannot_be_deleted(site: OwnerSite) -> None:
    assert isinstance(await refused(site.owner.documents.delete(asked(), Kind.GRANT, "fleet")), NotFound)
    await site.apply(grant())
    assert isinstance(await refused(site.owner.documents.delete(asked(), Kind.PLATFORM, "fleet")), NotFound)
    assert events(site, "document.deleted") == []


async def test_a_repeated_delete_is_answered_again_and_a_new_one_is_not(site: OwnerSite) -> None:
    await site.apply(grant())
    once = asked()
    await site.owner.documents.delete(once, Kind.GRANT, "fleet")
    await site.owner.documents.delete(once, Kind.GRANT, "fleet")
    assert len(events(site, "document.deleted")) == 1
    assert isinstance(await refused(site.owner.documents.delete(asked(), Kind.GRANT, "fleet")), NotFound)
    error = await refused(site.owner.documents.delete(once, Kind.GRANT, "other"))
    assert error.reason is Reason.REQUEST_ID_REUSED


async def test_versions_are_shown_newest_first_and_compare_naturally(site: OwnerSite) -> None:
    for version in ("9", "10", "2"):
        await site.apply(grant("fleet", version))
    listed = await site.owner.documents.list(Kind.GRANT, PAGE)
    assert [each.version for each in listed.items] == ["10", "9", "2"]
    assert (await site.owner.documents.get(Kind.GRANT, "fleet", None)).version == "10"
    assert (await site.owner.documents.get(Kind.GRANT, "fleet", "2")).version == "2"
    assert isinstance(await refused(site.owner.documents.get(Kind.GRANT, "fleet", "3")), NotFound)


async def test_a_kill_switch_under_an_older_version_is_never_said_to_work(site: OwnerSite) -> None:
    await site.apply(grant("fleet", "10"))
    request_id = uuid4()
    stop = grant("fleet", "9", suspended=True)
    told = ("10", ("metadata.version: 10 is newer and stays in force",))
    checked = (await site.owner.documents.check(text(stop))).document
    first, again = await site.apply(stop, request_id), await site.apply(stop, request_id)
    unchanged = await site.apply(stop)
    got = await site.owner.documents.get(Kind.GRANT, "fleet", "9")
    [newest, listed] = (await site.owner.documents.list(Kind.GRANT, PAGE)).items
    other = (await site.owner.documents.check(text(grant("fleet", "9")))).document
    assert (first.changed, unchanged.changed) == (True, False)
    shown = (checked, first.document, again.document, unchanged.document, got, listed)
    assert [(each.newer, each.warnings) for each in shown] == [told] * 6
    assert other.newer == "10"
    assert "on file with another text" in other.warnings[0]
    assert (newest.version, newest.newer) == ("10", "")
    await site.desk.begin(caller=STRANGER)
    # The same under a newer version does what it says.
    applied = (await site.apply(grant("fleet", "11", suspended=True))).document
    assert (applied.newer, applied.warnings) == (
        "",
        ("spec.suspended: nothing is begun or released under this grant",),
    )
    assert (await refused(site.desk.begin(caller=STRANGER))).reason is Reason.GRANT_SUSPENDED
    assert (await site.owner.documents.get(Kind.GRANT, "fleet", "10")).newer == "11"


@pytest.mark.parametrize(("ends", "over"), [("2026-03-01T12:00:00Z", True), ("2026-03-01T12:00:01Z", False)])
async def test_a_grant_whose_time_is_over_is_taken_with_a_warning(site: OwnerSite, ends: str, *, over: bool) -> None:
    content = grant("fleet", "2", not_after=ends)
    told = ("spec.not_after: has passed: nothing is begun under this grant",) if over else ()
    checked = (await site.owner.documents.check(text(content))).document
    applied = await site.apply(content)
    assert (applied.changed, checked.warnings, applied.document.warnings) == (True, told, told)
    # Of a version that is not in force nothing is said but that.
    older = (await site.apply(grant("fleet", "1", not_after=ends))).document
    assert older.warnings == ("metadata.version: 2 is newer and stays in force",)


async def test_pages_hold_every_document_once(site: OwnerSite) -> None:
    for name in ("b", "a", "c"):
        for version in ("1", "10"):
            await site.apply(revocation(name, version))
    seen, token = [], ""
    while True:
        page = await site.owner.documents.list(Kind.REVOCATION, PageRequest(size=2, token=token))
        assert len(page.items) <= 2
        seen += [(each.name, each.version) for each in page.items]
        token = page.next_token
        if not token:
            break
    assert seen == [(name, version) for name in "abc" for version in ("10", "1")]
    assert isinstance(
        await refused(site.owner.documents.list(Kind.GRANT, PageRequest(size=2, token="AAAA"))), InvalidInput
    )


async def test_a_page_of_large_documents_is_cut_to_what_an_answer_can_carry(site: OwnerSite) -> None:
    chips = [f"{n:064x}" for n in range(3000)]
    for name in ("a", "b", "c"):
        await site.apply(revocation(name, ceks=chips))
    first = await site.owner.documents.list(Kind.REVOCATION, PAGE)
    assert [each.name for each in first.items] == ["a"]
    rest = await site.owner.documents.list(Kind.REVOCATION, PageRequest(size=100, token=first.next_token))
    assert [each.name for each in rest.items] == ["b"]


async def test_a_document_that_names_a_file_outside_the_folder_is_not_kept(site: OwnerSite) -> None:
    revision = await site.desk.store.revision()
    for path in (str(site.desk.folder / "kek.bin"), "../kek.bin"):
        bad = workload("shop", secrets=[{"guid": str(SECRET_GUID), "source": {"file": path}}])
        for step in (site.apply(bad), site.owner.documents.check(text(bad))):
            error = await refused(step)
            assert isinstance(error, InvalidInput)
            assert "spec.secrets[0].source.file" in error.message
    assert await site.desk.store.revision() == revision
    good = workload("shop", secrets=[{"guid": str(SECRET_GUID), "source": {"file": "secret"}}])
    assert (await site.apply(good)).changed


async def test_a_workload_whose_artefacts_cannot_be_measured_is_not_kept(site: OwnerSite) -> None:
    gone = workload("shop", measure={**workload()["spec"]["measure"], "kernel": "gone"})
    for step in (site.apply(gone), site.owner.documents.check(text(gone))):
        assert "spec.measure: " in (await refused(step)).message
    (site.desk.documents / "gone").write_bytes(b"a kernel")
    assert (await site.apply(gone)).changed


async def test_a_repeat_is_answered_when_the_artefacts_are_gone_by_then(site: OwnerSite) -> None:
    shop, request_id = workload("shop"), uuid4()
    first = await site.apply(shop, request_id)
    (site.desk.documents / "kernel").unlink()
    assert await site.apply(shop, request_id) == first
    assert isinstance(await refused(site.apply(shop)), InvalidInput)


async def test_warnings_are_about_what_else_is_on_file(site: OwnerSite) -> None:
    nowhere = (await site.apply(grant("lost", workload="none"))).document
    assert nowhere.warnings == ("spec.workload: there is no workload none",)
    assert (await site.owner.documents.get(Kind.GRANT, "lost", None)).warnings == nowhere.warnings
    both = (await site.apply(grant("both", callers=[CALLER, STRANGER]))).document
    assert [each.partition(": ")[0] for each in both.warnings] == ["spec.callers"]
    assert "is no limit there" in both.warnings[0]
    assert (await site.apply(grant("good"))).document.warnings == ()
    missing = workload("shop", secrets=[{"guid": str(SECRET_GUID), "source": {"stored": "disk"}}])
    checked = (await site.owner.documents.check(text(missing))).document
    assert "spec.secrets[0].source.stored: there is no secret disk" in checked.warnings


async def test_warnings_come_with_the_document(site: OwnerSite) -> None:
    applied = await site.apply(workload("shop", policy={"allow": ["debug"]}))
    assert any("debug" in each for each in applied.document.warnings)


@pytest.mark.parametrize("version", ["²", "9" * 5000, "nothing"])
async def test_a_version_that_no_document_can_have_is_not_on_file(site: OwnerSite, version: str) -> None:
    await site.apply(grant())
    with pytest.raises(NotFound):
        await site.owner.documents.get(Kind.GRANT, "fleet", version)


async def test_of_two_platforms_of_one_chip_that_come_at_once_one_is_on_file(site: OwnerSite) -> None:
    both = [platform(name, cek=site.desk.platform.chain.cek.fingerprint.hex()) for name in ("a", "b")]
    outcomes = await asyncio.gather(*(site.apply(each) for each in both), return_exceptions=True)
    assert sorted(type(each).__name__ for each in outcomes) == ["Applied", "WrongState"]
    assert len((await site.desk.library.current()).platforms) == 1
    await site.desk.begin()


async def test_of_two_spellings_of_one_version_that_come_at_once_one_is_on_file(site: OwnerSite) -> None:
    both = [grant("fleet", "1.0", suspended=True), grant("fleet", "1.00")]
    outcomes = await asyncio.gather(*(site.apply(each) for each in both), return_exceptions=True)
    assert sorted(type(each).__name__ for each in outcomes) == ["Applied", "WrongState"]
    [version] = (await site.desk.library.current()).versions("Grant", "fleet")
    assert version.version == ("1.0" if isinstance(outcomes[1], WrongState) else "1.00")


async def test_documents_that_have_nothing_to_do_with_each_other_are_all_on_file_though_they_come_at_once(
    site: OwnerSite,
) -> None:
    await asyncio.gather(*(site.apply(grant(f"g{index}")) for index in range(6)))
    assert len((await site.desk.library.current()).grants) == 6
