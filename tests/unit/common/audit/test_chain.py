"""The log's chain: what was written verifies; whatever is changed, removed, repeated or moved is found and named."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.audit.chain import GENESIS, Head, Link, canonical_json, record_fields, record_hash, verify_chain, walk_chain
from common.errors import Reason, Refused
from tests.support.repository import ROOT

TIME = datetime(2026, 3, 1, 12, 0, 0, 250, tzinfo=UTC)


def fields(number: int, **changes: Any) -> dict[str, str | int | None]:
    members: dict[str, Any] = {
        "audit_id": UUID(int=number),
        "time": TIME + timedelta(seconds=number),
        "event": "launch.begun",
        "launch_id": UUID(int=1000 + number),
        "caller": "spiffe://datacenter.example/orchestrator/größe",
        "reason": None,
        "body": f'{{"n":{number}}}',
    }
    return record_fields(**members | changes)


def chain(length: int, start: Head = GENESIS) -> list[Link]:
    links, head = [], start
    for number in range(start.number + 1, start.number + length + 1):
        members = fields(number)
        head = Head(number=number, hash=record_hash(head.hash, number, members))
        links.append(Link(number=number, hash=head.hash, fields=members))
    return links


def test_the_hash_is_the_formula_written_out_once_more() -> None:
    """Computed with hashlib and a JSON text written by hand: nothing of ours."""
    text = (
        '{"audit_id":"00000000-0000-0000-0000-000000000001","body":"{\\"n\\":1}",'
        '"caller":"spiffe://datacenter.example/orchestrator/größe","event":"launch.begun",'
        '"launch_id":"00000000-0000-0000-0000-0000000003e9","reason":null,"time":1772366401000250}'
    )
    first = hashlib.sha256(bytes(32) + b"\0\0\0\0\0\0\0\x01" + text.encode()).digest()
    second = hashlib.sha256(first + b"\0\0\0\0\0\0\0\x02" + json.dumps(
        fields(2), sort_keys=True, separators=(",", ":"), ensure_ascii=False
    ).encode()).digest()  # fmt: skip
    assert [link.hash for link in chain(2)] == [first, second]


@given(st.dictionaries(st.text(), st.text() | st.integers() | st.none()))
def test_members_are_written_as_the_standard_library_writes_them(members: dict[str, object]) -> None:
    text = json.dumps(members, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert canonical_json(members) == text.encode()


@pytest.mark.parametrize("value", [True, 1.0, float("nan"), [1], {"a": 1}, b"a", UUID(int=1)], ids=repr)
def test_what_no_record_has_is_not_written(value: object) -> None:
    with pytest.raises(ValueError, match="no record has"):
        canonical_json({"time": value})


def test_the_worked_example_of_the_page_is_right() -> None:
    page = (ROOT / "docs" / "audit-log.md").read_text()
    texts = re.findall(r"^(\{\"audit_id\".*\})$", page, re.MULTILINE)
    hashes = re.findall(r"^hash\(\d\) = ([0-9a-f]{64})$", page, re.MULTILINE)
    assert len(texts) == len(hashes) == 2
    previous = bytes(32)
    for number, (text, expected) in enumerate(zip(texts, hashes, strict=True), start=1):
        assert canonical_json(json.loads(text)) == text.encode()
        previous = hashlib.sha256(previous + number.to_bytes(8, "big") + text.encode()).digest()
        assert previous.hex() == expected
        assert (
            record_hash(bytes.fromhex(hashes[number - 2]) if number > 1 else bytes(32), number, json.loads(text)).hex()
            == expected
        )


def test_a_time_is_the_same_in_every_zone_and_exact_to_the_microsecond() -> None:
    here = datetime(2026, 3, 1, 13, 0, 1, 250, tzinfo=timezone(timedelta(hours=1)))
    assert fields(1, time=here) == fields(1)
    assert fields(1, time=here + timedelta(microseconds=1)) != fields(1)
    assert fields(1)["time"] == 1772366401000250


def test_what_was_written_leads_to_its_head() -> None:
    links = chain(50)
    assert verify_chain(iter(links)) == Head(number=50, hash=links[-1].hash)
    assert verify_chain([]) == GENESIS


def test_a_log_may_be_verified_from_a_trusted_head_on() -> None:
    links = chain(10)
    middle = Head(number=4, hash=links[3].hash)
    assert verify_chain(links[4:], start=middle) == verify_chain(links)
    with pytest.raises(Refused, match="record 5 is not the one"):
        verify_chain(links[4:], start=replace(middle, hash=bytes(32)))


def test_only_as_much_is_read_as_was_asked_for() -> None:
    read = []

    def pages() -> Any:
        for link in chain(5):
            read.append(link.number)
            yield link

    walk = walk_chain(pages())
    assert [next(walk).number, next(walk).number] == [1, 2]
    assert read == [1, 2]


def swapped(links: list[Link]) -> list[Link]:
    links[3], links[4] = links[4], links[3]
    return links


def swapped_and_renumbered(links: list[Link]) -> list[Link]:
    links[3], links[4] = replace(links[4], number=4), replace(links[3], number=5)
    return links


def removed_and_renumbered(links: list[Link]) -> list[Link]:
    return links[:3] + [replace(link, number=link.number - 1) for link in links[4:]]


def rewritten_alone(links: list[Link]) -> list[Link]:
    """One record changed, its hash computed anew, the ones behind it as they were."""
    changed = fields(4, reason="REVOKED")
    links[3] = Link(number=4, hash=record_hash(links[2].hash, 4, changed), fields=changed)
    return links


@pytest.mark.parametrize(
    ("meddle", "says"),
    [
        (lambda links: links[:3] + links[4:], "record 4 is missing"),
        (lambda links: links[1:], "record 1 is missing"),
        (swapped, "record 4 is missing"),
        (lambda links: links[:4] + links[3:], "record 4 stands again, or out of order, where record 5 belongs"),
        (swapped_and_renumbered, "record 4 is not the one that was written"),
        (removed_and_renumbered, "record 4 is not the one that was written"),
        (rewritten_alone, "record 5 is not the one that was written"),
        (lambda links: [replace(links[0], hash=bytes(32)), *links[1:]], "record 1 is not the one that was written"),
        (lambda links: [replace(links[0], number=0), *links[1:]], "record 0 stands again"),
        (lambda links: [replace(links[0], fields={"time": {1}}), *links[1:]], "record 1 is not the one"),
        (lambda links: [replace(links[0], fields={"body": "\ud800"}), *links[1:]], "record 1 is not the one"),
    ],
    ids=range(11),
)
def test_every_way_to_meddle_is_found_and_names_the_record(
    meddle: Callable[[list[Link]], list[Link]], says: str
) -> None:
    with pytest.raises(Refused, match=says) as caught:
        verify_chain(meddle(chain(8)))
    assert caught.value.reason is Reason.BAD_SIGNATURE
    assert caught.value.fields["number"] == re.findall(r"record (\d+)", says)[0]


@given(st.data())
def test_any_change_of_any_member_is_found(data: st.DataObject) -> None:
    links = chain(4)
    at = data.draw(st.integers(0, 3))
    members = dict(links[at].fields)
    name = data.draw(st.sampled_from(sorted(members)))
    value = data.draw((st.text() | st.none() | st.integers()).filter(lambda value: value != members[name]))
    links[at] = replace(links[at], fields=members | {name: value})
    with pytest.raises(Refused, match=f"record {at + 1} "):
        verify_chain(links)


@pytest.mark.parametrize(
    ("previous", "number"), [(bytes(31), 1), (bytes(32), 0), (bytes(32), 1 << 64)], ids=["size", "zero", "too far"]
)
def test_a_place_outside_of_every_chain_has_no_hash(previous: bytes, number: int) -> None:
    with pytest.raises(ValueError, match="no place"):
        record_hash(previous, number, fields(1))
