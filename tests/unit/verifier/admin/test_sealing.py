"""What an operator is shown of applied documents: each held against the log, and nothing that a terminal would obey."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from common.errors import Reason, Unavailable, WrongState
from tests.support.documents import grant, revocation
from tests.support.documents import workload as workload_document
from tests.support.owner_site import OwnerSite, asked, owner_site, text
from tests.support.recording_log import RecordingLog
from verifier.admin.filed import Kind
from verifier.admin.sealing import Review, review, seal_reviewed
from verifier.store.engine import Value
from verifier.store.rows import AuditRow

INSERT = "INSERT INTO document (kind, name, version, text, is_json, apply_time) VALUES (?, ?, ?, ?, 1, 0)"


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[OwnerSite]:
    async with owner_site(tmp_path) as opened:
        await opened.apply(grant())
        await opened.apply(revocation())
        await opened.apply(workload_document("db"))
        yield opened


async def write(site: OwnerSite, statement: str, *values: Value) -> None:
    async def work(transaction: Any) -> None:
        assert await transaction.change(statement, *values)

    await site.desk.store._engine.write("vandal", work)


async def look(site: OwnerSite) -> Review:
    return await review(site.desk.store, site.desk.dependencies.seal)


async def seal_as_shown(site: OwnerSite, digest: str) -> None:
    seal = site.desk.dependencies.seal
    await seal_reviewed(site.desk.store, seal, await review(site.desk.store, seal), digest, RecordingLog())


def line(content: dict[str, Any], remark: str) -> str:
    metadata = content["metadata"]
    sha256 = hashlib.sha256(text(content)).hexdigest()
    return f"{content['kind']} {metadata['name']} {metadata['version']}  {sha256}  {remark}"


async def test_what_was_applied_and_not_deleted_is_as_in_the_log(site: OwnerSite) -> None:
    await site.apply(grant("gone"))
    await site.owner.documents.delete(asked(), Kind.GRANT, "gone")
    found = await look(site)
    assert (found.problem, found.log_problem) == (None, None)
    assert list(found.lines) == [
        line(grant(), "as in the audit log"),
        line(revocation(), "as in the audit log"),
        line(workload_document("db"), "as in the audit log"),
    ]


async def test_each_document_that_does_not_fit_says_how(site: OwnerSite) -> None:
    await write(site, "DELETE FROM document WHERE kind='Revocation'")
    await write(site, "UPDATE document SET text=? WHERE kind='Grant'", text(grant(launches=9999)))
    await write(site, INSERT, "Grant", "mine", "1", text(grant("mine")))
    found = await look(site)
    assert found.problem is not None
    was = hashlib.sha256(text(grant())).hexdigest()
    assert list(found.lines) == [
        line(grant(launches=9999), f"CHANGED, the audit log has {was}"),
        line(grant("mine"), "NOT IN THE AUDIT LOG"),
        line(revocation(), "MISSING, the audit log has it"),
        line(workload_document("db"), "as in the audit log"),
    ]


async def test_names_that_somebody_wrote_tell_no_terminal_what_to_do(site: OwnerSite) -> None:
    await write(site, INSERT, "Grant", "a\x1b[2K\rGrant a 1  as in the audit log\n", "1", b"")
    [shown] = [each for each in (await look(site)).lines if "x1b" in each]
    assert shown.isprintable()
    assert shown.endswith("NOT IN THE AUDIT LOG")


async def test_a_log_that_does_not_hold_is_not_asked_further(site: OwnerSite) -> None:
    await site.desk.store._engine.write(
        "vandal", lambda transaction: transaction.script("DROP TRIGGER audit_is_not_changed;")
    )
    await write(site, "UPDATE audit SET body=replace(body, 'incident', 'accident') WHERE number=2")
    found = await look(site)
    assert found.log_problem is not None
    assert "record 2" in found.log_problem
    assert [each.rsplit("  ", 1)[1] for each in found.lines] == ["NOT IN THE AUDIT LOG"] * 3


async def test_what_is_sealed_is_what_was_shown_and_the_log_begins_anew_there(site: OwnerSite) -> None:
    await write(site, "DELETE FROM document WHERE kind='Revocation'")
    shown = await look(site)
    for wrong in ("", "0" * 64, shown.digest[:-1], "ä"):
        with pytest.raises(WrongState) as caught:
            await seal_as_shown(site, wrong)
        assert caught.value.reason is Reason.DOCUMENT_CONFLICT
    await write(site, INSERT, "Grant", "mine", "1", text(grant("mine")))
    with pytest.raises(WrongState):
        await seal_as_shown(site, shown.digest)
    assert (await look(site)).problem is not None
    await write(site, "DELETE FROM document WHERE name='mine'")
    await seal_as_shown(site, shown.digest)
    found = await look(site)
    assert (found.problem, found.log_problem) == (None, None)
    assert list(found.lines) == [
        line(grant(), "as in the audit log"),
        line(workload_document("db"), "as in the audit log"),
    ]
    assert found.digest != shown.digest
    [record] = [each for each in site.desk.audit() if each.event == "documents.sealed"]
    body = json.loads(record.body)
    assert body["problem"] == shown.problem
    assert body["documents"] == [{"kind": "Revocation", "name": "incident", "version": "1", "sha256": None}]
    await site.desk.library.look()
    assert (await site.apply(revocation("another"))).changed


async def test_a_time_that_no_calendar_has_is_an_outage_and_no_defect(site: OwnerSite) -> None:
    await write(site, "UPDATE document SET apply_time=9000000000000000000")
    with pytest.raises(Unavailable) as caught:
        await site.desk.library.look()
    assert caught.value.reason is Reason.STORE_UNAVAILABLE


async def test_two_rows_of_one_version_are_never_sealed(site: OwnerSite) -> None:
    await write(site, "CREATE TABLE other AS SELECT * FROM document")
    await write(site, "DROP TABLE document")
    await write(site, "ALTER TABLE other RENAME TO document")
    await write(
        site, "INSERT INTO document SELECT kind, name, version, ?, is_json, 0 FROM document", text(grant("mine"))
    )
    shown = await look(site)
    assert "twice" in (shown.problem or "")
    assert "TWICE" in next(iter(shown.lines))
    with pytest.raises(WrongState) as caught:
        await seal_as_shown(site, shown.digest)
    assert "twice" in caught.value.message


async def test_what_the_log_did_not_know_and_was_sealed_is_known_to_it_from_then_on(site: OwnerSite) -> None:
    await write(site, INSERT, "Grant", "kept", "1", text(grant("kept")))
    await seal_as_shown(site, (await look(site)).digest)
    assert list((await look(site)).lines)[1] == line(grant("kept"), "as in the audit log")


async def test_a_record_takes_so_many_differences_and_no_more(site: OwnerSite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("verifier.admin.sealing._DIFFERENCES_MAX", 1)
    await write(site, "DELETE FROM document WHERE kind='Revocation'")
    await write(site, INSERT, "Grant", "mine", "1", text(grant("mine")))
    with pytest.raises(WrongState, match="not what the audit log says"):
        await seal_as_shown(site, (await look(site)).digest)
    await write(site, "DELETE FROM document WHERE name='mine'")
    await seal_as_shown(site, (await look(site)).digest)
    assert (await look(site)).problem is None


@pytest.mark.parametrize(
    ("event", "body"),
    [
        ("document.applied", "[" * 100_000),
        ("document.applied", '{"kind": 1, "name": "a", "version": "1", "sha256": ""}'),
        ("document.applied", '{"kind": "Grant", "name": "a", "version": "1", "sha256": 5}'),
        ("document.deleted", '{"kind": [], "name": "a"}'),
        ("documents.sealed", '{"documents": [{"kind": "Grant", "name": "a", "version": 1, "sha256": null}]}'),
    ],
)
async def test_a_record_that_no_verifier_writes_is_a_log_that_does_not_hold(
    site: OwnerSite, event: str, body: str
) -> None:
    time = site.desk.clock.now()
    row = AuditRow(audit_id=uuid4(), time=time, event=event, launch_id=None, caller=None, reason=None, body=body)
    await site.desk.store.record(row)
    found = await look(site)
    assert found.log_problem == "audit log: record 4 is none that a verifier writes"
    assert len(list(found.lines)) == 3
