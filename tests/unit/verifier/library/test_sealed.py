"""Applied documents that are not as they were sealed stop everything, and are found whoever wrote what."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from common.audit.chain import GENESIS, Head
from common.errors import Reason, Unavailable
from tests.support.desk import desk, refused
from tests.support.documents import CALLER, grant, revocation, write_artefacts
from tests.support.documents import workload as workload_document
from tests.support.owner_site import asked, owner_site
from tests.support.recording_log import RecordingLog
from tests.support.store_rows import SEAL, document
from verifier.admin.filed import Kind
from verifier.library.library import Library
from verifier.library.sealed import DocumentSeal, spelled, step_back
from verifier.store.rows import DocumentSet
from verifier.store.sql_rows import stamp

ROW = document(text=b"kind: Workload")
SET = DocumentSet(revision=3, rows=(ROW,), change=Head(number=9, hash=b"h" * 32), tag=None)


def sealed(found: DocumentSet) -> DocumentSet:
    return replace(found, tag=SEAL.tag(found))


class Rows:
    """A store's documents, as somebody may write them."""

    def __init__(self, found: DocumentSet) -> None:
        self.found = found
        self.reads = 0

    async def revision(self) -> int:
        return self.found.revision

    async def documents(self) -> DocumentSet:
        self.reads += 1
        return self.found


def test_no_two_changes_lead_from_one_revision_to_the_same_next() -> None:
    seal = DocumentSeal(bytes)
    following = {
        seal.next_revision(replace(SET, change=Head(number=9, hash=hash_))) for hash_ in (b"a" * 32, b"b" * 32)
    }
    assert len(following) == 2
    assert min(following) > SET.revision


# The spelling.


def test_a_set_is_spelled_as_the_page_says() -> None:
    """Written a second time, from docs/keys.md."""
    row = document(kind="Grant", name="g", version="1.2", text=b"text")
    row = replace(row, is_json=True, apply_time=datetime(2026, 3, 1, tzinfo=UTC))
    time = 1_772_323_200_000_000
    expected = (
        b"sevattest documents 1"
        + (3).to_bytes(8, "big")
        + (9).to_bytes(8, "big")
        + b"h" * 32
        + (1).to_bytes(8, "big")
        + b"\0\0\0\5Grant\0\0\0\1g\0\0\0\3"
        + b"1.2"
        + hashlib.sha256(b"text").digest()
        + b"\1"
        + time.to_bytes(8, "big")
    )
    assert spelled(replace(SET, rows=(row,))) == expected
    assert SEAL.tag(replace(SET, rows=(row,))) == hmac.new(b"d" * 32, expected, "sha256").digest()


def test_the_order_in_which_rows_are_read_and_the_tag_do_not_count() -> None:
    rows = (ROW, document(version="2"), document(kind="Grant"))
    one = replace(SET, rows=rows)
    assert spelled(replace(one, rows=rows[::-1], tag=bytes(32))) == spelled(one)


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ((document("ab", "c"),), (document("a", "bc"),)),
        ((document("a"), document("b")), (document("a"),)),
        ((), (ROW,)),
        ((document("a", text=b"1"), document("b", text=b"2")), (document("a", text=b"2"), document("b", text=b"1"))),
    ],
)
def test_no_two_sets_are_spelled_alike(one: Sequence[Any], two: Sequence[Any]) -> None:
    assert spelled(replace(SET, rows=tuple(one))) != spelled(replace(SET, rows=tuple(two)))


def test_a_set_without_a_tag_is_sealed_only_where_there_never_was_a_document() -> None:
    new = replace(SET, rows=(), change=GENESIS)
    assert SEAL.problem(new) is None
    assert SEAL.problem(replace(new, revision=0)) is None
    assert SEAL.problem(replace(new, rows=(ROW,))) is not None
    assert SEAL.problem(replace(new, change=SET.change)) is not None


@pytest.mark.parametrize(
    ("found", "follows"),
    [
        (SET, True),
        (replace(SET, revision=4), True),
        (replace(SET, revision=4, change=Head(number=10, hash=b"i" * 32)), True),
        (replace(SET, revision=2), False),
        (replace(SET, change=Head(number=8, hash=b"g" * 32)), False),
        (replace(SET, revision=9, change=Head(number=8, hash=b"g" * 32)), False),
        (replace(SET, revision=4, change=Head(number=9, hash=b"g" * 32)), False),
        (replace(SET, rows=()), False),
        (replace(SET, revision=4, rows=(), change=GENESIS), False),
    ],
)
def test_nobody_goes_back_behind_what_was_seen(found: DocumentSet, follows: object) -> None:
    assert (step_back(sealed(SET), sealed(found)) is None) == follows


# The library.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_artefacts(tmp_path)
    return tmp_path


async def not_sealed(library: Library) -> None:
    for ask in (library.current(), library.look()):
        with pytest.raises(Unavailable) as caught:
            await ask
        assert caught.value.reason is Reason.DOCUMENTS_NOT_SEALED
        assert "sev-verifier documents" in caught.value.message


async def test_documents_that_are_not_sealed_at_the_start_are_in_force_once_they_are(folder: Path) -> None:
    rows, log = Rows(replace(SET, tag=bytes(32))), RecordingLog()
    library = Library(folder, rows, SEAL, log)
    with pytest.raises(Unavailable):
        await library.load()
    await not_sealed(library)
    (line,) = log.named("documents.not_sealed")
    assert (line.level, line.fields["revision"], line.fields["documents"]) == ("error", 3, 1)
    reads = rows.reads
    with pytest.raises(Unavailable):
        await library.current()
    assert rows.reads == reads  # nobody who asks for a launch makes work
    rows.found = sealed(SET)
    documents = await library.look()
    assert documents is await library.current()
    assert documents.revision == 3
    assert len(log.named("documents.not_sealed")) == len(log.named("documents.sealed_again")) == 1


async def test_a_row_that_is_written_under_the_same_revision_is_found_by_the_next_look(folder: Path) -> None:
    rows = Rows(sealed(SET))
    library = Library(folder, rows, SEAL, RecordingLog())
    known = await library.load()
    rows.found = replace(rows.found, rows=())
    assert await library.current() is known  # what was sealed is still what counts
    with pytest.raises(Unavailable):
        await library.look()
    await not_sealed(library)
    rows.found = sealed(SET)
    assert await library.look() is known


async def test_an_older_set_with_a_seal_of_its_own_is_not_believed_by_who_has_seen_a_newer(folder: Path) -> None:
    """All of the database is set back, log and all: only who was there notices, and a kept checkpoint."""
    old = sealed(replace(SET, revision=2, rows=(), change=GENESIS))
    rows, log = Rows(sealed(SET)), RecordingLog()
    library = Library(folder, rows, SEAL, log)
    await library.load()
    rows.found = old
    with pytest.raises(Unavailable):
        await library.current()  # the revision is another: looked at
    await not_sealed(library)
    assert "older (revision 2)" in log.named("documents.not_sealed")[0].fields["text"]
    # Who starts now has seen nothing.
    assert (await Library(folder, rows, SEAL, RecordingLog()).load()).revision == 2


# Begin, release and the owner's calls.


async def vandal(site: Any, statement: str) -> None:
    await site.store._engine.write("vandal", lambda transaction: transaction.change(statement))


async def test_nothing_is_begun_released_or_repeated_and_nothing_is_spent(tmp_path: Path) -> None:
    async with desk(tmp_path, content=workload_document(callers=[])) as site:
        await site.apply(grant(callers=[CALLER]))
        open_launch, done = await site.begin(), await site.begin()
        digest = (await site.digests())[0]
        blobs = [site.start(each).measure(digest) for each in (open_launch, done)]
        request_id = done.launch.launch_id
        await site.release(done.launch.launch_id, blobs[1], request_id=request_id)
        before, records = await site.store.ledger("fleet"), len(site.audit())
        await vandal(site, "UPDATE document SET apply_time=apply_time+1")
        with pytest.raises(Unavailable):
            await site.library.look()
        for step in (
            site.begin(),
            site.release(open_launch.launch.launch_id, blobs[0]),
            site.release(done.launch.launch_id, blobs[1], request_id=request_id),
        ):
            assert (await refused(step)).reason is Reason.DOCUMENTS_NOT_SEALED
        assert await site.store.ledger("fleet") == before
        assert len(site.audit()) == records
        await vandal(site, "UPDATE document SET apply_time=apply_time-1")
        await site.library.look()
        assert (await site.release(open_launch.launch.launch_id, blobs[0])).payload


async def test_an_owner_is_told_whatever_is_asked_about_documents(tmp_path: Path) -> None:
    async with owner_site(tmp_path) as site:
        await site.apply(grant())
        await vandal(site.desk, "DELETE FROM document")
        # A change finds it by itself, before anybody has looked.
        for change in (site.apply(revocation()), site.owner.documents.delete(asked(), Kind.GRANT, "fleet")):
            assert (await refused(change)).reason is Reason.DOCUMENTS_NOT_SEALED
        assert (await refused(site.desk.library.look())).reason is Reason.DOCUMENTS_NOT_SEALED
        for step in (
            site.apply(revocation()),
            site.owner.documents.get(Kind.GRANT, "fleet", None),
            site.owner.grants.status("fleet"),
        ):
            error = await refused(step)
            assert error.reason is Reason.DOCUMENTS_NOT_SEALED
            assert "sev-verifier documents" in error.message
        assert await site.owner.secrets.put(asked(), "disk", b"words") == 1


async def test_a_kill_switch_that_was_answered_holds_whatever_is_done_to_its_row(tmp_path: Path) -> None:
    async with owner_site(tmp_path, content=workload_document(callers=[])) as site:
        await site.apply(grant(callers=[CALLER]))
        old, begun = await site.desk.store.documents(), await site.desk.begin()
        blob = site.desk.start(begun).measure((await site.desk.digests())[0])
        await site.apply(grant("fleet", "2", callers=[CALLER], suspended=True))
        assert old.tag is not None
        older = old.tag.hex()
        for statement, reason in (
            ("DELETE FROM document WHERE version='2'", Reason.GRANT_SUSPENDED),
            ("UPDATE mark SET value=value-1 WHERE name='revision'", Reason.DOCUMENTS_NOT_SEALED),
            (f"UPDATE document_seal SET tag=x'{older}'", Reason.DOCUMENTS_NOT_SEALED),  # noqa: S608 -- ours
        ):
            await vandal(site.desk, statement)
            assert (await refused(site.desk.begin())).reason is reason
            # A refused measurement would spend the launch.
            if reason is Reason.DOCUMENTS_NOT_SEALED:
                assert (await refused(site.desk.release(begun.launch.launch_id, blob))).reason is reason
    # And for who starts now, and has seen nothing.
    with pytest.raises(Unavailable) as caught:
        async with desk(tmp_path):
            pass
    assert caught.value.reason is Reason.DOCUMENTS_NOT_SEALED


async def test_who_answered_an_owner_believes_in_nothing_older_although_all_is_set_back_at_once(tmp_path: Path) -> None:
    """Documents, seal and log as they were: nothing in the database says that there was a change."""
    async with owner_site(tmp_path, content=workload_document(callers=[])) as site:
        await site.apply(grant(callers=[CALLER]))
        begun, old = await site.desk.begin(), await site.desk.store.documents()
        blob = site.desk.start(begun).measure((await site.desk.digests())[0])
        assert old.tag is not None
        await site.owner.documents.delete(asked(), Kind.GRANT, "fleet")
        insert = "INSERT INTO document (kind, name, version, text, is_json, apply_time) VALUES (?, ?, ?, ?, ?, ?)"
        row = old.rows[0]
        cells = (row.kind, row.name, row.version, row.text, int(row.is_json), stamp(row.apply_time))

        async def set_back(transaction: Any) -> None:
            transaction.tell(insert, *cells)
            transaction.tell("UPDATE mark SET value=? WHERE name='revision'", old.revision)
            transaction.tell("UPDATE document_seal SET tag=?", old.tag)
            transaction.tell("DROP TRIGGER audit_is_not_removed")
            transaction.tell("DELETE FROM audit WHERE event='document.deleted'")

        await site.desk.store._engine.write("vandal", set_back)
        assert await site.desk.store.documents() == old
        for step in (site.desk.begin(), site.desk.release(begun.launch.launch_id, blob)):
            assert (await refused(step)).reason is Reason.DOCUMENTS_NOT_SEALED


async def test_a_seal_whose_key_is_taken_away_is_not_made_anew(tmp_path: Path) -> None:
    async with owner_site(tmp_path) as site:
        await site.apply(grant())
        await vandal(site.desk, "DELETE FROM identity WHERE name='documents'")
    with pytest.raises(Unavailable) as caught:
        async with desk(tmp_path):
            pass
    assert caught.value.reason is Reason.DOCUMENTS_NOT_SEALED


async def test_documents_in_the_folder_alone_need_no_seal(tmp_path: Path) -> None:
    async with desk(tmp_path) as site:
        await site.store.revise(site.dependencies.seal)
        begun = await site.begin()
        digest = (await site.digests())[0]
        assert (await site.store.documents()).tag is not None
    async with desk(tmp_path, platform=site.platform) as again:
        assert (await again.release(begun.launch.launch_id, site.start(begun).measure(digest))).payload
