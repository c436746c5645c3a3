"""The seal on applied documents over every store: who writes to the database itself puts none in and takes none out."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from common.audit.chain import GENESIS
from common.errors import Reason, Unavailable
from tests.contract.test_stores import chain_verifies
from tests.support.postgres import Server
from tests.support.store_rows import SEAL, admin_request, audit, document, opening, sealed
from tests.support.stores import Place
from verifier.launches.records import AuditEvent
from verifier.launches.sealed import frozen_digest
from verifier.library.sealed import DocumentSeal
from verifier.store.engine import Transaction, Value
from verifier.store.migrations import migrations
from verifier.store.rows import DocumentRow, DocumentSet, Outcome
from verifier.store.sql_owner import _DOCUMENTS
from verifier.store.sql_store import SqlStore

INSERT = "INSERT INTO document (kind, name, version, text, is_json, apply_time) VALUES (?, ?, ?, ?, ?, ?)"
# What somebody might write who has the database and no key, one statement each.
WRITTEN: dict[str, tuple[tuple[str, tuple[Value, ...]], ...]] = {
    "a document is put in": ((INSERT, ("Grant", "mine", "1", b"kind: Grant", 0, 0)),),
    "a revocation is taken away": (("DELETE FROM document WHERE kind='Revocation'", ()),),
    "all documents are taken away": (("DELETE FROM document", ()),),
    "one byte is changed": (("UPDATE document SET text=? WHERE kind='Grant'", (b"kind: grant",)),),
    "a document is of another kind": (("UPDATE document SET kind='Workload' WHERE kind='Revocation'", ()),),
    "a document has another name": (("UPDATE document SET name='b' WHERE kind='Revocation'", ()),),
    "an older version is the newest": (("UPDATE document SET version='3' WHERE kind='Grant' AND version='1'", ()),),
    "a text is read as JSON": (("UPDATE document SET is_json=1 WHERE kind='Grant'", ()),),
    "a document has another time": (("UPDATE document SET apply_time=7 WHERE kind='Grant'", ()),),
    "the revision is set back": (("UPDATE mark SET value=value-1 WHERE name='revision'", ()),),
    "the revision is moved on": (("UPDATE mark SET value=value+1 WHERE name='revision'", ()),),
    "the seal is taken away": (("DELETE FROM document_seal", ()),),
    "the seal is another": (("UPDATE document_seal SET tag=?", (bytes(32),)),),
    "all is taken away but the log": (
        ("DELETE FROM document", ()),
        ("DELETE FROM document_seal", ()),
        ("UPDATE mark SET value=0 WHERE name='revision'", ()),
    ),
}


async def write(store: SqlStore, *statements: tuple[str, tuple[Value, ...]]) -> None:
    """Change the database as somebody does who has it, and no key."""

    async def work(transaction: Transaction) -> None:
        for sql, values in statements:
            assert await transaction.change(sql, *values)

    await store._engine.write("vandal", work)


async def fill(store: SqlStore) -> None:
    """Two versions of a grant and a revocation, as an owner applies them."""
    for row in (
        document(kind="Grant", text=b"kind: Grant"),
        document(kind="Grant", version="2", text=b"kind: Grant"),
        document(kind="Revocation", name="incident", text=b"kind: Revocation"),
    ):
        assert await store.apply_document(row, admin_request(), audit("document.applied"), SEAL) is Outcome.DONE


def problem(found: DocumentSet) -> str | None:
    return SEAL.problem(found)


def changes(store: SqlStore) -> dict[str, Callable[[], Awaitable[object]]]:
    """Every transaction that gives documents another revision."""
    return {
        "apply": lambda: store.apply_document(document(name="late"), admin_request(), audit("document.applied"), SEAL),
        "the same again": lambda: store.apply_document(
            document(kind="Grant", version="2", text=b"kind: Grant"), admin_request(), audit("document.applied"), SEAL
        ),
        "delete": lambda: store.delete_document("Grant", "web", admin_request(), audit("document.deleted"), SEAL),
        "delete a secret": lambda: store.delete_secret("disk", admin_request(), audit("secret.deleted"), SEAL),
        "revise": lambda: store.revise(SEAL),
    }


async def test_whatever_verifiers_do_leaves_documents_sealed(store: SqlStore) -> None:
    assert problem(await store.documents()) is None
    assert (await store.documents()).tag is None
    await fill(store)
    await store.put_secret("disk", lambda _version: sealed(b""), 1, admin_request(), audit("secret.put"))
    await store.record(audit("launch.refused"))
    tags = {(await store.documents()).tag}
    for name, change in changes(store).items():
        await change()
        found = await store.documents()
        assert problem(found) is None, name
        tags.add(found.tag)
    # The same document once more is the one that changed nothing.
    assert len(tags) == 5
    assert (await store.documents()).change.number == 7


@pytest.mark.parametrize("what", WRITTEN)
async def test_what_is_written_past_the_verifier_is_not_sealed_and_stops_every_change(
    store: SqlStore, what: str
) -> None:
    await fill(store)
    await store.put_secret("disk", lambda _version: sealed(b""), 1, admin_request(), audit("secret.put"))
    before = await store.documents()
    assert problem(before) is None
    await write(store, *WRITTEN[what])
    altered = await store.documents()
    assert problem(altered) is not None
    records = await chain_verifies(store)
    for change in changes(store).values():
        with pytest.raises(Unavailable) as caught:
            await change()
        assert caught.value.reason is Reason.DOCUMENTS_NOT_SEALED
    assert await store.documents() == altered
    assert await chain_verifies(store) == records
    assert await store.secret("disk", None) is not None


async def test_what_is_put_back_as_it_was_is_sealed_again(store: SqlStore) -> None:
    await fill(store)
    before = await store.documents()
    await write(store, (INSERT, ("Grant", "mine", "1", b"kind: Grant", 0, 0)))
    assert problem(await store.documents()) is not None
    await write(store, ("DELETE FROM document WHERE name='mine'", ()))
    assert await store.documents() == before
    assert problem(before) is None


async def test_an_older_set_with_its_own_revision_and_seal_does_not_go_with_the_log(store: SqlStore) -> None:
    """A grant was suspended; somebody puts back what was sealed before that."""
    await fill(store)
    old = await store.documents()
    new = document(kind="Grant", version="3", text=b"suspended: true")
    await store.apply_document(new, admin_request(), audit("document.applied"), SEAL)
    await write(
        store,
        ("DELETE FROM document WHERE version='3'", ()),
        ("UPDATE document_seal SET tag=?", (old.tag,)),
        ("UPDATE mark SET value=value-1 WHERE name='revision'", ()),
    )
    back = await store.documents()
    assert (back.rows, back.revision, back.tag) == (old.rows, old.revision, old.tag)
    assert problem(back) is not None
    assert problem(replace(back, change=old.change)) is None


async def test_records_of_other_things_change_nothing_and_a_forged_one_of_a_document_does(store: SqlStore) -> None:
    await fill(store)
    for event in AuditEvent:
        if not event.value.startswith("document"):
            await store.record(audit(event.value))
    assert problem(await store.documents()) is None
    await store.record(audit("document.deleted"))
    assert problem(await store.documents()) is not None


async def test_every_event_of_documents_is_one_that_the_seal_is_bound_to(store: SqlStore) -> None:
    for number, event in enumerate(each for each in AuditEvent if each.value.startswith("document")):
        await store.record(audit(event.value))
        assert (await store.documents()).change.number == number + 1


@pytest.mark.parametrize("place", ["sqlite"], indirect=True)
async def test_the_last_change_is_found_without_a_look_at_other_records(store: SqlStore) -> None:
    plan = await store._engine.read(lambda transaction: transaction.rows(f"EXPLAIN QUERY PLAN {_DOCUMENTS}"))
    assert any("audit_of_documents" in str(row) for row in plan)
    assert not any("SCAN audit" in str(row) and "INDEX" not in str(row) for row in plan)


@pytest.mark.parametrize("place", ["postgres"], indirect=True)
async def test_what_is_written_between_the_look_and_the_commit_is_not_sealed_with_the_rest(
    place: Place, store: SqlStore, postgres_server: Server
) -> None:
    await fill(store)

    def vandal(statement: str) -> None:
        postgres_server.sql(f"SET search_path={place.schema}; {statement}")

    class Late(DocumentSeal):
        def require(self, found: DocumentSet) -> None:
            super().require(found)
            vandal("INSERT INTO document VALUES ('Grant', 'mine', '1', 'kind: Grant', 0, 0)")

    row = document(name="late")
    assert await store.apply_document(row, admin_request(), audit("document.applied"), Late(SEAL._tag)) is Outcome.DONE
    assert problem(await store.documents()) is not None
    vandal("DELETE FROM document WHERE name='mine'")
    assert problem(await store.documents()) is None


# Sealed by hand.


async def test_documents_that_were_looked_at_are_sealed_with_a_record(store: SqlStore) -> None:
    await fill(store)
    await write(store, (INSERT, ("Grant", "kept", "1", b"kind: Grant", 0, 0)))
    seen = await store.documents()
    assert await store.seal_documents(seen, SEAL, audit("documents.sealed")) is Outcome.DONE
    found = await store.documents()
    assert problem(found) is None
    assert (found.rows, found.revision) == (seen.rows, seen.revision + 1)
    assert found.change.number == await chain_verifies(store) == 4
    row = document(name="late")
    assert await store.apply_document(row, admin_request(), audit("document.applied"), SEAL) is Outcome.DONE


async def test_documents_that_changed_since_they_were_looked_at_are_not_sealed(store: SqlStore) -> None:
    await fill(store)
    await write(store, (INSERT, ("Grant", "kept", "1", b"kind: Grant", 0, 0)))
    seen = await store.documents()
    await write(store, (INSERT, ("Grant", "mine", "1", b"kind: Grant", 0, 0)))
    assert await store.seal_documents(seen, SEAL, audit("documents.sealed")) is Outcome.DOCUMENTS_CHANGED
    assert problem(await store.documents()) is not None
    assert await chain_verifies(store) == 3


# From before there was a seal.


async def of_before(place: Place, *rows: DocumentRow) -> None:
    """A database as a version without seals left it, with documents that were applied then."""
    old = place.store(steps=migrations(place.kind)[:1])
    await old.open(make=True)
    for row in rows:
        values = (row.kind, row.name, row.version, row.text, 0, 0)
        await write(old, (INSERT, values), ("UPDATE mark SET value=value+1 WHERE name='revision'", ()))
        await old.record(audit("document.applied"))
    await old.close()


async def test_a_database_from_before_without_documents_needs_nothing(place: Place) -> None:
    await of_before(place)
    store = place.store()
    await store.open(make=True)
    assert await store.documents() == DocumentSet(revision=0, rows=(), change=GENESIS, tag=None)
    await fill(store)
    assert problem(await store.documents()) is None
    await store.close()


async def test_a_database_from_before_with_documents_waits_for_somebody_to_look(place: Place) -> None:
    await of_before(place, document())
    store = place.store()
    await store.open(make=True)
    found = await store.documents()
    assert found.rows
    said = problem(found)
    assert said is not None
    assert "from before there was one" in said
    with pytest.raises(Unavailable):
        await store.revise(SEAL)
    assert await store.seal_documents(found, SEAL, audit("documents.sealed")) is Outcome.DONE
    assert problem(await store.documents()) is None
    await store.close()


# Launches.


async def test_what_was_frozen_for_a_launch_comes_back_to_the_bit(store: SqlStore) -> None:
    for new in (opening(), replace(opening(), launch=replace(opening().launch, grant="g", chip_id=None))):
        launch = replace(new.launch, launch_id=new.request.launch_id)
        assert await store.open_launch(replace(new, launch=launch)) is Outcome.DONE
        back = await store.launch(launch.launch_id)
        assert back is not None
        assert frozen_digest(back) == frozen_digest(launch)
