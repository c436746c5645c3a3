"""Every answer fits its listener's limit, whatever the owner wrote: pages are cut by bytes, and free text has a cap."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from common.rpc import MAX_ADMIN_MESSAGE, MAX_MESSAGE
from common.sev.abi import PACKET_MAX_SIZE
from common.sev.secret import ENTRIES_MAX
from common.wire import PAGE_MAX
from sevattest.v1 import verifier_admin_service_pb2 as pb
from sevattest.v1 import verifier_service_pb2
from tests.support.desk import refused
from tests.support.documents import STRANGER, grant, revocation, workload
from tests.support.owner_site import OwnerSite, asked, owner_site, text
from verifier import admin_messages as messages
from verifier.admin import documents as documents_desk
from verifier.admin.filed import Kind
from verifier.admin.launches import LaunchDesk, OwnedLaunch
from verifier.admin.paging import PAGE_BYTES, Page, PageRequest, fitting
from verifier.admin.records import ShownRecord
from verifier.documents.generations import GENERATIONS
from verifier.documents.problems import REASON_MAX
from verifier.documents.text import InvalidDocument
from verifier.service import launch_message
from verifier.store.rows import ChainedRecord, LaunchFilter, LaunchRow

# Written out it is the longest: a byte becomes six in JSON, and seven where that JSON is text in JSON.
LONGEST = "\x01" * REASON_MAX
LONGEST_CALLER = f"spiffe://{'d' * 255}/orchestrator/{'n' * 64}"


def everything(chip: str) -> dict[str, Any]:
    """A revocation that speaks against a launch twice, at the greatest length."""
    return revocation("r" * 128, "1" * 64, why=LONGEST, ceks=[chip], generations=["emulated"])


async def every_record(site: OwnerSite) -> list[ShownRecord]:
    seen: list[ShownRecord] = []
    token = ""
    while True:
        page = await site.owner.records.records(None, PageRequest(size=PAGE_MAX, token=token))
        answer = pb.ListAuditRecordsResponse(
            records=[messages.record_message(each) for each in page.items], next_page_token=page.next_token
        )
        assert answer.ByteSize() <= MAX_ADMIN_MESSAGE
        seen += page.items
        token = page.next_token
        if not token:
            return seen


def test_a_page_holds_what_fits_and_at_least_one() -> None:
    texts = ["x" * (PAGE_BYTES - 1), "y", "z", "w" * 2 * PAGE_BYTES]
    assert fitting(texts, lambda each: (each,)) == texts[:2]
    assert fitting(texts[2:], lambda each: (each,)) == texts[2:3]
    assert fitting(texts[3:], lambda each: (each,)) == texts[3:]
    assert fitting([], lambda each: (each,)) == []
    # Bytes count, not characters.
    assert len(fitting(["漏" * (PAGE_BYTES // 3)] * 2, lambda each: (each,))) == 1


async def test_records_of_the_greatest_length_are_read_to_the_last(site: OwnerSite) -> None:
    await site.apply(everything(site.desk.platform.chain.cek.fingerprint.hex()))
    for _ in range(150):
        await refused(site.desk.begin())
    records = await every_record(site)
    assert [each.number for each in records] == list(range(1, 152))
    assert sum(len(each.json) for each in records) > MAX_ADMIN_MESSAGE
    assert max(len(each.json.encode()) for each in records) < PAGE_BYTES


class Copies:
    """A store of one launch and its records, as many times as a page may hold and once more."""

    def __init__(self, row: LaunchRow, records: Sequence[ChainedRecord]) -> None:
        self._records = records
        longest = replace(
            row, caller=LONGEST_CALLER, workload="w" * 128, workload_version="1" * 64, grant="g" * 128, chip_id=None
        )
        self.rows = [replace(longest, launch_id=uuid4()) for _ in range(PAGE_MAX + 1)]

    async def launch(self, launch_id: UUID) -> LaunchRow | None:
        return next((each for each in self.rows if each.launch_id == launch_id), None)

    async def launches(
        self, _which: LaunchFilter, *, before: UUID | None, limit: int, until: UUID | None = None
    ) -> Sequence[LaunchRow]:
        assert until is None
        start = 0 if before is None else [each.launch_id for each in self.rows].index(before) + 1
        return self.rows[start : start + limit]

    async def launch_behind(self, _before: UUID | None, _count: int) -> UUID | None:
        return None

    async def records(self, _launch_id: UUID | None, *, after: int, limit: int) -> Sequence[ChainedRecord]:
        return [each for each in self._records if each.number > after][:limit]


async def copies(site: OwnerSite) -> Copies:
    """Of a launch that was refused at release with all that can be said against it."""
    begun = await site.desk.begin()
    blob = site.desk.start(begun).measure((await site.desk.digests())[0])
    await site.apply(everything(site.desk.platform.chain.cek.fingerprint.hex()))
    await refused(site.desk.release(begun.launch.launch_id, blob))
    row = await site.desk.store.launch(begun.launch.launch_id)
    assert row is not None
    return Copies(row, await site.desk.store.records(begun.launch.launch_id, after=0, limit=10))


def checked(page: Page[OwnedLaunch]) -> Page[OwnedLaunch]:
    answer = pb.VerifierAdminServiceListLaunchesResponse(
        launches=[messages.owned_launch_message(each) for each in page.items], next_page_token=page.next_token
    )
    assert answer.ByteSize() <= MAX_ADMIN_MESSAGE
    return page


async def test_launches_with_findings_of_the_greatest_length_are_listed_to_the_last(site: OwnerSite) -> None:
    store = await copies(site)
    listing = LaunchDesk(store, pseudonym=lambda _fingerprint: f"chip:{'a' * 32}")
    seen: list[OwnedLaunch] = []
    token = ""
    while not seen or token:
        page = checked(await listing.list(LaunchFilter(), PageRequest(size=PAGE_MAX, token=token)))
        seen += page.items
        token = page.next_token
    assert [each.launch.launch_id for each in seen] == [each.launch_id for each in store.rows]
    assert sum(len(text) for each in seen for text in each.texts) > MAX_ADMIN_MESSAGE


async def test_what_a_revocation_touches_is_listed_to_the_last(
    site: OwnerSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await copies(site)
    monkeypatch.setattr(site.owner.impact, "_store", store)
    document = text(everything(site.desk.platform.chain.cek.fingerprint.hex()))
    seen: list[OwnedLaunch] = []
    token = ""
    while not seen or token:
        request = PageRequest(size=PAGE_MAX, token=token)
        page = checked(await site.owner.impact.touched(text=document, name="", page=request))
        seen += page.items
        token = page.next_token
    assert [each.launch.launch_id for each in seen] == [each.launch_id for each in store.rows]


def longest_workload(folder: Path, reason: str) -> dict[str, Any]:
    """A workload whose packet and receipt are the largest that a document allows."""
    size = PACKET_MAX_SIZE // ENTRIES_MAX - 21  # beside each a GUID and a length, beside all of them once more
    (folder / "largest").write_bytes(b"s" * size)
    return workload(
        "w" * 128,
        "1" * 64,
        callers=[],
        measure=None,
        digests=[{"digest": "ab" * 32, "label": "\x01" * 128}],
        secret_area=PACKET_MAX_SIZE,
        policy={"allow": ["debug", "key-sharing", "no-es", "send"], "minimum_api": "none"},
        floors={"emulated": "0.20.0"},
        accept_old_firmware=reason,
        secrets=[{"guid": str(uuid4()), "source": {"file": "largest"}} for _ in range(ENTRIES_MAX)],
    )


async def test_the_largest_packet_and_receipt_fit_the_launch_listener(tmp_path: Path) -> None:
    async with owner_site(tmp_path) as site:
        await site.apply(longest_workload(site.desk.documents, LONGEST))
        await site.apply(grant("g" * 128, workload="w" * 128, callers=[LONGEST_CALLER]))
        begun = await site.desk.begin(caller=LONGEST_CALLER, workload="w" * 128, grant="g" * 128)
        blob = site.desk.start(begun).measure(bytes.fromhex("ab" * 32))
        released = await site.desk.release(begun.launch.launch_id, blob, caller=LONGEST_CALLER)
        answer = verifier_service_pb2.ReleaseSecretResponse(
            header=released.header,
            payload=released.payload,
            receipt=released.receipt,
            launch=launch_message(released.launch),
        )
        assert len(released.payload) > PACKET_MAX_SIZE - 64
        assert json.dumps(LONGEST)[1:-1] in json.dumps(site.desk.receipt(released))
        # On other generations there is more to say, and in base64.
        risks = max(len(json.dumps(each.risks)) for each in GENERATIONS.values())
        assert answer.ByteSize() + 2 * risks <= MAX_MESSAGE
        [record] = [each for each in await every_record(site) if each.event == "launch.released"]
        assert len(record.json.encode()) < PAGE_BYTES


async def test_a_reason_that_is_longer_is_refused_before_anything_is_released_with_it(site: OwnerSite) -> None:
    for reason in ("w" * (REASON_MAX + 1), "漏" * (REASON_MAX // 3 + 1)):
        error = await refused(site.apply(longest_workload(site.desk.documents, reason)))
        assert isinstance(error, InvalidDocument)
        assert error.problems == (f"spec.accept_old_firmware: is a reason, in words, at most {REASON_MAX} bytes",)


async def test_the_record_of_a_documents_end_lists_no_more_versions_than_fit_a_page(
    site: OwnerSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    member = json.dumps(json.dumps({"version": "1" * 64, "sha256": "a" * 64}))
    assert documents_desk.LISTED_MAX * len(member) < PAGE_BYTES
    monkeypatch.setattr(documents_desk, "LISTED_MAX", 2)
    for version in ("1", "2", "3"):
        await site.apply(grant("fleet", version))
    await site.owner.documents.delete(asked(), Kind.GRANT, "fleet")
    body = json.loads(next(each.body for each in site.desk.audit() if each.event == "document.deleted"))
    assert [each["version"] for each in body["versions"]] == ["3", "2"]


async def test_warnings_about_thousands_of_names_are_one(site: OwnerSite) -> None:
    names = [f"host-{number:05}" for number in range(5000)]
    applied = await site.apply(grant(platforms={"names": names, "pools": names}, callers=[STRANGER]))
    assert applied.document.warnings == (
        "spec.platforms.names: there is no platform host-00000 (and 4999 more)",
        "spec.platforms.pools: no platform is in pool host-00000 (and 4999 more)",
    )


async def test_a_document_with_thousands_of_problems_is_shown_with_the_first(site: OwnerSite) -> None:
    document = (await site.apply(grant())).document
    shown = messages.document_message(replace(document, warnings=("p" * 1_000_000, *["again"] * 100_000)))
    assert shown.ByteSize() < 10_000
    assert shown.warnings[0] == "p" * 1000
