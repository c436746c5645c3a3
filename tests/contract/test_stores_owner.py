"""What every store does for the owner: documents, secrets, the verifier's own keys, re-wrapping."""

from __future__ import annotations

import json
from dataclasses import replace
from uuid import UUID, uuid4

import pytest

from common.errors import Reason, Unavailable
from tests.contract.test_stores import chain_verifies
from tests.support.store_rows import (
    GENERATED,
    KEY_ID,
    NOW,
    OTHER_KEY_ID,
    SEAL,
    TEK,
    TIK,
    admin_request,
    audit,
    document,
    opening,
    release,
    sealed,
)
from verifier.store.rows import AuditRow, DocumentRow, Outcome, StoredSecret
from verifier.store.sql_store import SqlStore

# Documents.


def changed(event: str = "document.applied") -> AuditRow:
    return audit(event)


async def on_file(store: SqlStore) -> tuple[int, tuple[DocumentRow, ...]]:
    """Revision and rows of documents that are as they were sealed."""
    found = await store.documents()
    SEAL.require(found)
    return found.revision, found.rows


async def test_a_document_comes_back_as_it_was_applied_with_its_revision(store: SqlStore) -> None:
    assert await on_file(store) == (0, ())
    assert await store.revision() == 0
    request, record = admin_request(), audit("document.applied")
    assert await store.apply_document(document(), request, record, SEAL) is Outcome.DONE
    assert await on_file(store) == (1, (document(),))
    assert await store.revision() == 1
    assert await store.admin_request(request.key) == request
    assert [each.record for each in await store.records(None, after=0, limit=10)] == [record]
    assert await store.admin_request(admin_request().key) is None


async def test_versions_of_a_document_stand_beside_each_other(store: SqlStore) -> None:
    for row in (document(), document(version="2"), document(name="db"), document(kind="Grant", text=b"\0\xff")):
        assert await store.apply_document(row, admin_request(), changed(), SEAL) is Outcome.DONE
    revision, rows = await on_file(store)
    assert revision == 4
    assert [(row.kind, row.name, row.version) for row in rows] == [
        ("Grant", "web", "1"),
        ("Workload", "db", "1"),
        ("Workload", "web", "1"),
        ("Workload", "web", "2"),
    ]
    assert rows[0].text == b"\0\xff"


async def test_a_document_that_was_checked_beside_others_is_not_kept(store: SqlStore) -> None:
    assert await store.apply_document(document(), admin_request(), changed(), SEAL, 0) is Outcome.DONE
    late = admin_request()
    assert await store.apply_document(document(version="2"), late, changed(), SEAL, 0) is Outcome.DOCUMENTS_CHANGED
    assert await store.admin_request(late.key) is None
    assert await on_file(store) == (1, (document(),))
    assert await store.apply_document(document(version="2"), late, changed(), SEAL, 1) is Outcome.DONE


async def test_the_same_document_changes_nothing_and_keeps_the_request(store: SqlStore) -> None:
    await store.apply_document(document(), admin_request(), changed(), SEAL)
    again = admin_request()
    assert await store.apply_document(document(), again, changed(), SEAL) is Outcome.UNCHANGED
    assert await store.admin_request(again.key) == again
    assert await store.revision() == 1
    assert await chain_verifies(store) == 1


async def test_another_document_under_the_same_version_is_a_conflict(store: SqlStore) -> None:
    await store.apply_document(document(), admin_request(), changed(), SEAL)
    for other in (document(text=b"kind: other"), replace(document(), is_json=True)):
        request = admin_request()
        assert await store.apply_document(other, request, changed(), SEAL) is Outcome.CONFLICT
        assert await store.admin_request(request.key) is None
    assert await on_file(store) == (1, (document(),))
    assert await chain_verifies(store) == 1


async def test_a_deleted_document_is_gone_with_all_versions_and_others_stay(store: SqlStore) -> None:
    for row in (document(), document(version="2"), document(name="db"), document(kind="Grant")):
        await store.apply_document(row, admin_request(), changed(), SEAL)
    assert (
        await store.delete_document("Workload", "web", admin_request(), changed("document.deleted"), SEAL)
        is Outcome.DONE
    )
    revision, rows = await on_file(store)
    assert revision == 5
    assert [(row.kind, row.name) for row in rows] == [("Grant", "web"), ("Workload", "db")]
    gone = admin_request()
    assert await store.delete_document("Workload", "web", gone, changed("document.deleted"), SEAL) is Outcome.LOST
    assert await store.admin_request(gone.key) is None
    assert await store.revision() == 5
    assert await chain_verifies(store) == 5


async def test_an_owners_request_id_is_taken_once(store: SqlStore) -> None:
    request = admin_request()
    await store.apply_document(document(), request, changed(), SEAL)
    assert await store.apply_document(document(version="2"), request, changed(), SEAL) is Outcome.REQUEST_TAKEN
    assert (
        await store.delete_document("Workload", "web", request, changed("document.deleted"), SEAL)
        is Outcome.REQUEST_TAKEN
    )
    assert await store.put_secret("disk", lambda _version: b"", 1, request, audit()) == (Outcome.REQUEST_TAKEN, 0)
    assert (await store.delete_secret("disk", request, audit(), SEAL))[0] is Outcome.REQUEST_TAKEN
    assert await on_file(store) == (1, (document(),))
    assert await store.secrets(after="", limit=10) == []
    assert await chain_verifies(store) == 1


async def test_a_launch_judged_before_a_change_of_documents_is_not_begun_after_it(store: SqlStore) -> None:
    before, revision = opening(), await store.revision()
    await store.apply_document(document(), admin_request(), changed(), SEAL)
    assert await store.open_launch(replace(before, revision=revision)) is Outcome.DOCUMENTS_CHANGED
    assert await store.open_launch(replace(before, revision=await store.revision())) is Outcome.DONE


# Secrets.


async def put(store: SqlStore, name: str, words: bytes = b"words", record: AuditRow | None = None) -> int:
    outcome, version = await store.put_secret(
        name, lambda number: sealed(words + b"%d" % number), len(words), admin_request(), record or audit("secret.put")
    )
    assert outcome is Outcome.DONE
    return version


async def test_a_secret_gets_a_version_that_is_sealed_answered_and_recorded(store: SqlStore) -> None:
    request, record = admin_request(), audit("secret.put", body='{"name":"disk"}')
    outcome = await store.put_secret("disk", lambda number: sealed(b"%d" % number), 5, request, record)
    assert outcome == (Outcome.DONE, 1)
    kept = StoredSecret(name="disk", version=1, sealed=sealed(b"1"), size=5, create_time=NOW)
    assert await store.secret("disk", None) == kept
    assert await store.secret("disk", 1) == kept
    answered = await store.admin_request(request.key)
    assert answered is not None
    assert json.loads(answered.answer) == {"ok": True, "version": 1}
    recorded = (await store.records(None, after=0, limit=10))[0].record
    assert json.loads(recorded.body) == {"name": "disk", "version": 1}
    assert await chain_verifies(store) == 1


async def test_a_new_version_leaves_the_old_one_readable(store: SqlStore) -> None:
    assert [await put(store, "disk"), await put(store, "disk")] == [1, 2]
    newest, oldest = await store.secret("disk", None), await store.secret("disk", 1)
    assert newest is not None
    assert oldest is not None
    assert (newest.version, oldest.version) == (2, 1)
    assert await store.secret("disk", 3) is None
    assert await store.secret("tape", None) is None


async def test_no_version_is_used_twice_not_even_after_the_secret_was_erased(store: SqlStore) -> None:
    await put(store, "disk")
    await put(store, "disk")
    assert (await store.delete_secret("disk", admin_request(), audit("secret.deleted"), SEAL))[0] is Outcome.DONE
    assert await store.secret("disk", None) is None
    assert await store.secret("disk", 1) is None
    gone = admin_request()
    assert (await store.delete_secret("disk", gone, audit(), SEAL))[0] is Outcome.LOST
    assert await store.admin_request(gone.key) is None
    assert await put(store, "disk") == 3


async def test_a_secret_that_cannot_be_sealed_is_not_kept_and_uses_no_version(store: SqlStore) -> None:
    failure = Unavailable(Reason.KEY_UNAVAILABLE, "the token is gone")

    def fail(_version: int) -> bytes:
        raise failure

    request = admin_request()
    with pytest.raises(Unavailable) as caught:
        await store.put_secret("disk", fail, 1, request, audit())
    assert caught.value is failure
    assert await store.admin_request(request.key) is None
    assert await chain_verifies(store) == 0
    assert await put(store, "disk") == 1


async def test_secrets_are_listed_by_name_with_their_newest_version(store: SqlStore) -> None:
    for name in ("b", "a", "c", "B", "b-1", "b"):
        await put(store, name)
    listed = await store.secrets(after="", limit=10)
    # By bytes, whatever the database's locale says.
    assert [(each.name, each.version) for each in listed] == [("B", 1), ("a", 1), ("b", 2), ("b-1", 1), ("c", 1)]
    assert await store.secrets(after="a", limit=2) == listed[2:4]
    assert await store.secrets(after="c", limit=2) == []


# Keys.


async def test_the_first_identity_stays(store: SqlStore) -> None:
    assert await store.identity("signing") is None
    assert await store.keep_identity("signing", sealed(b"one")) == sealed(b"one")
    assert await store.keep_identity("signing", sealed(b"two")) == sealed(b"one")
    assert await store.identity("signing") == sealed(b"one")
    assert await store.identity("pseudonym") is None


async def fill(store: SqlStore) -> tuple[UUID, UUID]:
    """Something sealed in each place that there is; the open launch and the released one."""
    first, second = opening(), opening()
    await store.open_launch(first)
    await store.open_launch(second)
    await store.move(release(second.launch.launch_id))
    await put(store, "disk", b"words")
    await store.keep_identity("signing", sealed(b"identity"))
    return first.launch.launch_id, second.launch.launch_id


async def test_every_sealed_blob_is_found_under_its_key_and_can_be_put_under_another(store: SqlStore) -> None:
    open_id, released_id = await fill(store)
    assert await store.sealed_under_others(KEY_ID, 100) == []
    found = {blob.place: blob.sealed for blob in await store.sealed_under_others(OTHER_KEY_ID, 100)}
    assert found == {
        ("launch", str(open_id), "tek"): TEK,
        ("launch", str(open_id), "tik"): TIK,
        ("launch", str(released_id), "generated"): GENERATED,
        ("secret", "disk", "1"): sealed(b"words1"),
        ("identity", "signing"): sealed(b"identity"),
    }
    assert len(await store.sealed_under_others(OTHER_KEY_ID, 2)) == 2
    for index, (place, blob) in enumerate(found.items()):
        assert await store.sealing_keys() == ({KEY_ID} if index == 0 else {KEY_ID, OTHER_KEY_ID})
        assert await store.reseal(place, blob, sealed(blob[21:], OTHER_KEY_ID))
    assert await store.sealing_keys() == {OTHER_KEY_ID}
    assert await store.sealed_under_others(OTHER_KEY_ID, 100) == []
    moved = {blob.place for blob in await store.sealed_under_others(KEY_ID, 100)}
    assert moved == set(found)
    row = await store.launch(open_id)
    assert row is not None
    assert row.keys is not None
    assert (row.keys.key_id, row.keys.tek) == (OTHER_KEY_ID, sealed(b"sealed TEK" * 4, OTHER_KEY_ID))
    assert await store.generated(released_id) == sealed(b"sealed generated", OTHER_KEY_ID)


async def test_a_blob_that_changed_or_went_meanwhile_is_not_resealed(store: SqlStore) -> None:
    open_id, released_id = await fill(store)
    new = sealed(b"new", OTHER_KEY_ID)
    places = [
        ("launch", str(open_id), "tek"),
        ("launch", str(released_id), "generated"),
        ("secret", "disk", "1"),
        ("identity", "signing"),
    ]
    for place in places:
        assert not await store.reseal(place, sealed(b"not what is there"), new)
    await store.move(release(open_id))
    await store.delete_secret("disk", admin_request(), audit(), SEAL)
    assert not await store.reseal(("launch", str(open_id), "tek"), TEK, new)
    assert not await store.reseal(("secret", "disk", "1"), sealed(b"words1"), new)
    assert not await store.reseal(("launch", str(uuid4()), "tek"), TEK, new)
    assert await store.sealing_keys() == {KEY_ID}


@pytest.mark.parametrize("strange", [(), ("launch", str(uuid4()), "state"), ("secret", "disk"), ("audit", "1")])
async def test_a_place_that_there_is_not_is_refused(store: SqlStore, strange: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="no such place"):
        await store.reseal(strange, b"", b"")
