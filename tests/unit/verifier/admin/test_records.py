"""The evidence as its owner gets it: records that verify, in pages, and the keys."""

from __future__ import annotations

import json
from datetime import UTC, datetime

from common.audit.chain import GENESIS, Head, Link, verify_chain
from common.audit.jws import read_key_set
from common.errors import InvalidInput, Refused
from tests.support.desk import refused
from tests.support.documents import grant
from tests.support.owner_site import OwnerSite
from verifier.admin.paging import PageRequest
from verifier.admin.records import ShownRecord
from verifier.store.rows import Checkpoint


async def everything(site: OwnerSite, size: int = 2) -> list[ShownRecord]:
    seen: list[ShownRecord] = []
    token = ""
    while True:
        page = await site.owner.records.records(None, PageRequest(size=size, token=token))
        seen += page.items
        token = page.next_token
        if not token:
            return seen


def link(record: ShownRecord) -> Link:
    return Link(number=record.number, hash=record.hash, fields=json.loads(record.json))


async def test_what_is_shown_is_what_is_hashed(site: OwnerSite) -> None:
    await site.apply(grant())
    await site.refused()
    await site.released()
    records = await everything(site)
    assert [each.number for each in records] == list(range(1, len(records) + 1))
    number, last, _ = await site.desk.store.head()
    assert verify_chain(map(link, records), GENESIS) == Head(number=number, hash=last)


async def test_a_record_that_was_changed_on_the_way_does_not_verify(site: OwnerSite) -> None:
    await site.apply(grant())
    await site.released()
    links = [link(each) for each in await everything(site)]
    spoilt = Link(number=1, hash=links[0].hash, fields={**links[0].fields, "caller": "somebody else"})
    try:
        verify_chain([spoilt, *links[1:]], GENESIS)
    except Refused as error:
        assert error.fields["number"] == "1"  # noqa: PT017 -- which record is the point
    else:
        raise AssertionError("a changed record verifies")


async def test_records_of_one_launch_leave_the_others_out(site: OwnerSite) -> None:
    begun = await site.refused()
    await site.released()
    launch_id = begun.launch.launch_id
    page = await site.owner.records.records(launch_id, PageRequest(size=100))
    assert [each.event for each in page.items] == ["launch.begun", "launch.refused"]
    of_all = (await site.owner.records.records(None, PageRequest(size=1))).next_token
    error = await refused(site.owner.records.records(launch_id, PageRequest(size=1, token=of_all)))
    assert isinstance(error, InvalidInput)


async def test_checkpoints_come_in_pages(site: OwnerSite) -> None:
    for number in (1, 5, 9):
        await site.desk.store.keep_checkpoint(Checkpoint(number=number, token=f"token {number}"))
    first = await site.owner.records.checkpoints(PageRequest(size=2))
    rest = await site.owner.records.checkpoints(PageRequest(size=2, token=first.next_token))
    assert [*first.items, *rest.items] == ["token 1", "token 5", "token 9"]
    assert rest.next_token == ""
    assert isinstance(await refused(site.owner.records.checkpoints(PageRequest(size=2, token="?"))), InvalidInput)


async def test_the_keys_are_those_that_the_verifier_signs_with(site: OwnerSite) -> None:
    keys = read_key_set(site.owner.records.jwks().encode())
    assert list(keys) == [site.desk.dependencies.signer.kid]
    assert "d" not in json.loads(site.owner.records.jwks())["keys"][0]


async def test_times_are_those_of_the_desk(site: OwnerSite) -> None:
    await site.apply(grant())
    [record] = await everything(site)
    assert record.time == site.desk.clock.now()
    shown = json.loads(record.json)["time"]
    assert datetime.fromtimestamp(shown / 1e6, UTC) == record.time
