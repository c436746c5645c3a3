"""Secrets of the owner's: in, never out, under versions that are used once."""

from __future__ import annotations

import json
from typing import Any
from uuid import uuid4

import pytest

from common.errors import InvalidInput, NotFound, Reason, WrongState
from tests.support.desk import refused
from tests.support.documents import SECRET_GUID, workload
from tests.support.owner_site import OTHER_OWNER, OwnerSite, asked
from tests.support.spellings import spellings
from tests.support.store_rows import admin_request, audit, document
from verifier.admin.filed import Kind
from verifier.admin.paging import PageRequest
from verifier.keys.base import secret_place
from verifier.launches.launch import content_hash
from verifier.secrets.put import SECRET_MAX
from verifier.store.rows import Outcome, RequestKey

VALUE = b"correct horse battery staple"
PAGE = PageRequest(size=100)


async def test_each_put_is_a_new_version_that_only_the_sealing_key_opens(site: OwnerSite) -> None:
    versions = [await site.owner.secrets.put(asked(), "disk", value) for value in (b"one", b"two")]
    assert versions == [1, 2]
    kept = await site.desk.store.secret("disk", 1)
    assert kept is not None
    assert kept.sealed != b"one"
    assert site.desk.dependencies.sealing.unseal(kept.sealed, secret_place("disk", 1)) == b"one"


async def test_a_repeated_request_makes_no_second_version(site: OwnerSite) -> None:
    once = asked()
    assert await site.owner.secrets.put(once, "disk", VALUE) == 1
    assert await site.owner.secrets.put(once, "disk", VALUE) == 1
    assert await site.owner.secrets.put(asked(once.request_id, caller=OTHER_OWNER), "disk", VALUE) == 2


async def test_a_request_id_with_another_value_or_name_is_refused(site: OwnerSite) -> None:
    once = asked()
    await site.owner.secrets.put(once, "disk", VALUE)
    for name, value in (("disk", b"other"), ("other", VALUE)):
        error = await refused(site.owner.secrets.put(once, name, value))
        assert error.reason is Reason.REQUEST_ID_REUSED
    assert [each.version for each in (await site.owner.secrets.list(PAGE)).items] == [1]


async def test_what_the_store_keeps_of_a_request_is_no_digest_that_could_be_guessed(site: OwnerSite) -> None:
    import hashlib

    once = asked()
    await site.owner.secrets.put(once, "disk", VALUE)
    key = RequestKey(caller=once.caller, method="PutSecret", request_id=once.request_id)
    kept = await site.desk.store.admin_request(key)
    assert kept is not None
    guesses = [hashlib.sha256(VALUE).digest(), content_hash(b"disk", VALUE), content_hash(VALUE)]
    assert kept.content not in guesses
    assert kept.content not in [content_hash(guess) for guess in guesses]
    assert kept.content not in [content_hash(guess.hex().encode()) for guess in guesses]


@pytest.mark.parametrize("value", [b"", bytes(SECRET_MAX + 1)])
async def test_an_empty_or_oversized_value_is_refused_and_nothing_kept(site: OwnerSite, value: bytes) -> None:
    error = await refused(site.owner.secrets.put(asked(), "disk", value))
    assert isinstance(error, InvalidInput)
    assert error.fields["field"] == "value"
    assert not (await site.owner.secrets.list(PAGE)).items
    assert site.desk.audit() == []


async def test_the_largest_value_is_kept(site: OwnerSite) -> None:
    assert await site.owner.secrets.put(asked(), "disk", bytes(SECRET_MAX)) == 1


async def test_a_listing_says_names_versions_and_sizes(site: OwnerSite) -> None:
    for name in ("b", "a", "c", "a"):
        await site.owner.secrets.put(asked(), name, VALUE)
    first = await site.owner.secrets.list(PageRequest(size=2))
    rest = await site.owner.secrets.list(PageRequest(size=2, token=first.next_token))
    shown = [(each.name, each.version, each.size) for each in (*first.items, *rest.items)]
    assert shown == [("a", 2, len(VALUE)), ("b", 1, len(VALUE)), ("c", 1, len(VALUE))]
    assert rest.next_token == ""
    assert isinstance(await refused(site.owner.secrets.list(PageRequest(size=2, token="x"))), InvalidInput)


async def test_an_erased_secret_is_gone_with_all_versions_and_its_numbers_stay_used(site: OwnerSite) -> None:
    for _ in range(2):
        await site.owner.secrets.put(asked(), "disk", VALUE)
    once = asked()
    assert await site.owner.secrets.delete(once, "disk") == 2
    assert await site.owner.secrets.delete(once, "disk") == 2
    assert await site.desk.store.secret("disk", 1) is None
    assert isinstance(await refused(site.owner.secrets.delete(asked(), "disk")), NotFound)
    assert await site.owner.secrets.put(asked(), "disk", VALUE) == 3


async def test_the_versions_that_were_erased_are_counted_from_the_oldest_that_was_left(site: OwnerSite) -> None:
    for count in (5, 1, 4, 8):
        for _ in range(count):
            await site.owner.secrets.put(asked(), "disk", VALUE)
        assert await site.owner.secrets.delete(asked(), "disk") == count


def stored(name: str, version: int | None = None) -> list[dict[str, Any]]:
    """The secrets of a workload, one of which is stored under this name."""
    source = {"name": name} if version is None else {"name": name, "version": version}
    return [
        {"guid": str(SECRET_GUID), "source": {"file": "secret"}},
        {"guid": str(uuid4()), "source": {"stored": source}},
    ]


async def test_a_secret_that_a_workload_names_is_erased_only_where_that_is_said(site: OwnerSite) -> None:
    await site.apply(workload("shop", "1", secrets=stored("disk", 1)))
    await site.apply(workload("shop", "2"))
    await site.apply(workload("till", secrets=stored("disk")))
    await site.owner.secrets.put(asked(), "disk", VALUE)
    once = asked()
    error = await refused(site.owner.secrets.delete(once, "disk"))
    assert (type(error), error.reason) == (WrongState, Reason.DOCUMENT_CONFLICT)
    assert "shop 1, till 1" in error.message
    assert await site.desk.store.secret("disk", 1) is not None
    assert [row.event for row in site.desk.audit()].count("secret.deleted") == 0
    # Said explicitly, under the very id that was refused: nothing was kept of that.
    for _ in range(2):
        assert await site.owner.secrets.delete(once, "disk", allow_used=True) == 1
    assert await site.desk.store.secret("disk", 1) is None
    assert json.loads(site.desk.audit()[-1].body) == {
        "name": "disk",
        "used_by": ["shop 1", "till 1"],
        "versions": 1,
    }


async def test_a_workload_that_comes_while_its_secret_is_erased_keeps_it(
    site: OwnerSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    await site.owner.secrets.put(asked(), "disk", VALUE)
    erase = site.desk.store.delete_secret

    async def late(*args: Any, **named: Any) -> tuple[Outcome, int]:
        monkeypatch.undo()
        await site.apply(workload("shop", secrets=stored("disk")))
        return await erase(*args, **named)

    monkeypatch.setattr(site.desk.store, "delete_secret", late)
    error = await refused(site.owner.secrets.delete(asked(), "disk"))
    assert error.reason is Reason.DOCUMENT_CONFLICT
    assert await site.desk.store.secret("disk", 1) is not None


async def test_a_request_that_did_not_say_so_is_another_than_one_that_does(site: OwnerSite) -> None:
    await site.owner.secrets.put(asked(), "disk", VALUE)
    once = asked()
    await site.owner.secrets.delete(once, "disk")
    error = await refused(site.owner.secrets.delete(once, "disk", allow_used=True))
    assert error.reason is Reason.REQUEST_ID_REUSED


async def test_a_secret_that_no_workload_on_file_names_is_erased_without_a_word(site: OwnerSite) -> None:
    await site.apply(workload("shop", secrets=stored("disk-2")))
    await site.apply(workload("disk"))
    await site.apply(workload("gone", secrets=stored("disk")))
    await site.owner.documents.delete(asked(), Kind.WORKLOAD, "gone")
    await site.owner.secrets.put(asked(), "disk", VALUE)
    assert await site.owner.secrets.delete(asked(), "disk") == 1


async def test_a_secret_that_is_not_there_is_not_found_though_a_workload_names_it(site: OwnerSite) -> None:
    await site.apply(workload("shop", secrets=stored("disk")))
    for allow_used in (False, True):
        error = await refused(site.owner.secrets.delete(asked(), "disk", allow_used=allow_used))
        assert isinstance(error, NotFound)


async def test_a_workload_that_cannot_be_read_may_name_any_secret(site: OwnerSite) -> None:
    await site.owner.secrets.put(asked(), "disk", VALUE)
    row = document("later", "7", b"apiVersion: of a newer verifier")
    record, seal = audit("document.applied"), site.desk.dependencies.seal
    assert await site.desk.store.apply_document(row, admin_request(), record, seal) is Outcome.DONE
    error = await refused(site.owner.secrets.delete(asked(), "disk"))
    assert "later 7" in error.message
    assert await site.owner.secrets.delete(asked(), "disk", allow_used=True) == 1


async def test_of_many_workloads_the_refusal_names_some_and_counts_the_others(site: OwnerSite) -> None:
    await site.owner.secrets.put(asked(), "disk", VALUE)
    for number in range(5):
        await site.apply(workload(f"{number}{'x' * 127}", secrets=stored("disk")))
    error = await refused(site.owner.secrets.delete(asked(), "disk"))
    assert "and 2 more" in error.message
    assert len(error.message.encode()) < 600  # what a status holds


async def test_deleting_what_is_not_there_changes_nothing(site: OwnerSite) -> None:
    await site.owner.secrets.put(asked(), "disk", VALUE)
    assert isinstance(await refused(site.owner.secrets.delete(asked(), "disc")), NotFound)
    assert len((await site.owner.secrets.list(PAGE)).items) == 1


async def test_putting_and_erasing_are_recorded_without_the_value(site: OwnerSite) -> None:
    await site.owner.secrets.put(asked(), "disk", VALUE)
    await site.owner.secrets.delete(asked(), "disk")
    await refused(site.owner.secrets.put(asked(uuid4()), "bad name", VALUE))
    put, erased = site.desk.audit()
    assert (put.event, erased.event) == ("secret.put", "secret.deleted")
    assert json.loads(put.body) == {"name": "disk", "size": len(VALUE), "version": 1}
    assert json.loads(erased.body) == {"name": "disk", "versions": 1}
    said = repr([*site.desk.audit(), site.desk.log.events, await site.owner.secrets.list(PAGE)])
    for spelled in spellings(VALUE):
        assert spelled not in said.encode()


async def test_a_launch_gets_the_secret_that_was_put(site: OwnerSite) -> None:
    source = {"guid": str(SECRET_GUID), "source": {"stored": {"name": "disk"}}}
    await site.apply(workload("shop", secrets=[source]))
    await site.owner.secrets.put(asked(), "disk", VALUE)
    begun = await site.desk.begin(workload="shop")
    guest = site.desk.start(begun)
    blob = guest.measure((await site.desk.digests("shop"))[0])
    released = await site.desk.release(begun.launch.launch_id, blob)
    assert [entry.data for entry in guest.open(released, blob)] == [VALUE]
