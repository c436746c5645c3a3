"""Documents and artefacts on disk: one set or none, measured again when a file changes."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.errors import InvalidInput, Reason, Unavailable
from tests.support.documents import AppliedDocuments, grant, platform, revocation, row, write_artefacts, write_document
from tests.support.documents import workload as document
from tests.support.eventually import until
from tests.support.firmware import amdsev_image, reset_entry, with_footer
from tests.support.recording_log import RecordingLog
from tests.support.store_rows import SEAL
from verifier.appraisal.reference import freeze
from verifier.documents.text import InvalidDocument
from verifier.library.artefacts import ArtefactShelf
from verifier.library.documents import Documents
from verifier.library.library import Library
from verifier.library.prepared import Prepared


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_artefacts(tmp_path)
    return tmp_path


class Shelf:
    """A library, asked as a decision asks it: for what is in force at this moment."""

    def __init__(self, folder: Path, rows: AppliedDocuments | None = None, log: RecordingLog | None = None) -> None:
        self.rows = rows or AppliedDocuments()
        self.log = log or RecordingLog()
        self.library = Library(folder, self.rows, SEAL, self.log)

    async def in_force(self, name: str) -> Prepared | None:
        return await self.library.in_force(await self.library.current(), name)


async def loaded(folder: Path, log: RecordingLog | None = None, rows: AppliedDocuments | None = None) -> Shelf:
    shelf = Shelf(folder, rows, log)
    await shelf.library.load()
    return shelf


def version(number: str, **spec: Any) -> dict[str, Any]:
    return document("web", number, **spec)


async def test_the_newest_version_is_in_force(folder: Path) -> None:
    for number in ("1.9", "1.10", "1.2"):
        write_document(folder, version(number), f"{number}.yaml")
    library = await loaded(folder)
    prepared = await library.in_force("web")
    assert prepared is not None
    assert prepared.workload.version == "1.10"
    documents = await library.library.current()
    assert documents.workload("web") == prepared.workload
    assert [each.version for each in documents.workloads["web"]] == ["1.10", "1.9", "1.2"]
    assert await library.in_force("none") is None
    assert documents.workload("none") is None


async def test_a_new_snapshot_is_in_force_only_after_what_has_to_come_before_it(folder: Path) -> None:
    write_document(folder, document())
    rows, seen, let_go = AppliedDocuments(), list[int](), asyncio.Event()

    async def before(documents: Documents) -> None:
        seen.append(documents.revision)
        if documents.grants:
            await let_go.wait()

    library = Library(folder, rows, SEAL, RecordingLog(), before=before)
    old = await library.load()
    rows.apply(grant())
    decisions = [asyncio.create_task(library.current()) for _ in range(3)]
    await until(lambda: len(seen) == 2)
    assert not any(decision.done() for decision in decisions)
    let_go.set()
    new = {id(each) for each in await asyncio.gather(*decisions)}
    assert len(new) == 1
    assert id(old) not in new
    assert seen == [0, 1]
    # And at SIGHUP, whatever the revision.
    await library.load()
    assert seen == [0, 1, 1]


async def test_a_workload_spans_its_shapes(folder: Path) -> None:
    write_document(folder, document())
    prepared = await (await loaded(folder)).in_force("web")
    assert prepared is not None
    assert {(r.vcpus, r.cpu, r.flavour) for r in prepared.references} == {
        (vcpus, "EPYC-Milan", flavour) for vcpus in (1, 2, 4) for flavour in ("legacy", "init2")
    }
    assert len({reference.digest for reference in prepared.references}) == 6
    assert prepared.secret_area == 0xC00


async def test_shapes_with_one_digest_are_one_reference(folder: Path) -> None:
    # With one vCPU there is no application processor whose page could differ.
    measure = {**document()["spec"]["measure"], "vcpus": [1], "flavours": ["init2", "init2-ap-zero"]}
    write_document(folder, document(measure=measure))
    prepared = await (await loaded(folder)).in_force("web")
    assert prepared is not None
    assert [reference.flavour for reference in prepared.references] == ["init2"]


async def test_one_bad_document_refuses_the_set_and_all_problems_are_told(folder: Path) -> None:
    write_document(folder, document(callers=["cluster"]), "a.yaml")
    write_document(folder, document(lifetime="1s"), "b.yaml")
    (folder / "c.json").write_text("{")
    write_document(folder, version("2"), "good.yaml")
    with pytest.raises(InvalidDocument) as caught:
        await loaded(folder)
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["a.yaml", "b.yaml", "c.json"]


async def test_the_same_version_twice_is_refused(folder: Path) -> None:
    write_document(folder, document(), "a.yaml")
    write_document(folder, document(), "b.yml")
    with pytest.raises(InvalidDocument, match=r"b.yml: metadata: web 1 is in a.yaml already"):
        await loaded(folder)


async def test_a_bad_reload_keeps_the_old_set(folder: Path) -> None:
    write_document(folder, version("1"), "one.yaml")
    library = await loaded(folder)
    write_document(folder, document(callers=["cluster"]), "two.yaml")
    with pytest.raises(InvalidDocument):
        await library.library.load()
    prepared = await library.in_force("web")
    assert prepared is not None
    assert prepared.workload.version == "1"
    write_document(folder, version("2"), "two.yaml")
    await library.library.load()
    assert (prepared := await library.in_force("web")) is not None
    assert prepared.workload.version == "2"


async def test_other_files_are_left_alone_and_a_missing_folder_is_refused(folder: Path) -> None:
    (folder / "notes.txt").write_text("not a document")
    (folder / ".web.yaml.swp.yaml").write_text("{")
    write_document(folder, document())
    assert await (await loaded(folder)).in_force("web")
    with pytest.raises(InvalidDocument, match="no such file"):
        await loaded(folder / "none")


async def test_a_missing_artefact_makes_its_workload_unusable_and_no_other(folder: Path) -> None:
    write_document(folder, document(), "web.yaml")
    other = document("other", measure=None, digests=["00" * 32])
    write_document(folder, other, "other.yaml")
    (folder / "kernel").rename(folder / "aside")
    log = RecordingLog()
    library = await loaded(folder, log)
    assert "no such file" in log.named("workload.unusable")[0].fields["text"].lower()
    with pytest.raises(InvalidInput) as caught:
        await library.in_force("web")
    assert caught.value.reason is Reason.INVALID_CONFIGURATION
    assert str(folder) not in caught.value.message
    assert await library.in_force("other")
    # And it heals by itself.
    (folder / "aside").rename(folder / "kernel")
    assert await library.in_force("web")


async def test_a_changed_file_is_measured_again_at_the_next_begin(folder: Path) -> None:
    write_document(folder, document())
    library = await loaded(folder)
    before = await library.in_force("web")
    assert before is not None
    assert await library.in_force("web") is before
    (folder / "kernel").write_bytes(b"another kernel")
    after = await library.in_force("web")
    assert after is not None
    assert {r.digest for r in before.references}.isdisjoint({r.digest for r in after.references})
    # The replaced files stay known, for explanations and for launches that began under them.
    assert "web 1 (files since replaced)" in library.library.catalogue().kernels
    terms = freeze(
        before.workload,
        generation="emulated",
        references=before.references,
        secret_area=before.secret_area,
        recognized=False,
    )
    assert [each.shape for each in library.library.expected(terms)] == list(before.allowed)


async def test_a_file_replaced_by_one_of_the_same_size_is_seen(folder: Path) -> None:
    write_document(folder, document())
    library = await loaded(folder)
    before = await library.in_force("web")
    status = (folder / "kernel").stat()
    (folder / "new").write_bytes(b"THE KERNEL")
    os.utime(folder / "new", ns=(status.st_atime_ns, status.st_mtime_ns))
    (folder / "new").replace(folder / "kernel")
    assert await library.in_force("web") is not before


async def test_firmware_that_does_not_fit_makes_the_workload_unusable(folder: Path) -> None:
    (folder / "ovmf.fd").write_bytes(with_footer(b"x" * 4096, [reset_entry(0x80B004)]))
    write_document(folder, document())
    log = RecordingLog()
    await loaded(folder, log)
    assert "no area for kernel hashes" in log.named("workload.unusable")[0].fields["text"]


async def test_a_pipe_in_a_files_place_is_refused_and_does_not_block(folder: Path) -> None:
    (folder / "kernel").unlink()
    os.mkfifo(folder / "kernel")
    write_document(folder, document())
    log = RecordingLog()
    await loaded(folder, log)
    assert "not a regular file" in log.named("workload.unusable")[0].fields["text"]


async def test_everything_on_file_is_in_the_catalogue_under_workload_and_version(folder: Path) -> None:
    old = {**document()["spec"]["measure"], "kernel": "kernel-old", "firmware": "ovmf-old.fd", "cmdline": "quiet"}
    write_document(folder, version("1", measure=old), "1.yaml")
    write_document(folder, version("2"), "2.yaml")
    catalogue = (await loaded(folder)).library.catalogue()
    assert set(catalogue.firmwares) == set(catalogue.kernels) == {"web 1", "web 2"}
    assert dict(catalogue.cmdlines) == {"web 1": b"quiet", "web 2": b"console=ttyS0"}


async def test_terms_of_unknown_files_have_no_shapes(folder: Path) -> None:
    write_document(folder, document())
    library = await loaded(folder)
    prepared = await library.in_force("web")
    assert prepared is not None
    terms = freeze(
        prepared.workload, generation="emulated", references=prepared.references[:1], secret_area=0, recognized=False
    )
    assert library.library.expected(terms) == ()


def test_large_files_are_read_in_chunks(tmp_path: Path) -> None:
    import tracemalloc

    path = tmp_path / "initrd"
    with path.open("wb") as file:
        file.truncate(64 << 20)
    tracemalloc.start()
    ArtefactShelf().sha256(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 << 20


def test_an_image_is_measured_once(tmp_path: Path) -> None:
    path = tmp_path / "ovmf.fd"
    path.write_bytes(amdsev_image())
    shelf = ArtefactShelf()
    assert shelf.firmware(path) is shelf.firmware(path)


async def test_two_spellings_of_one_version_are_refused(folder: Path) -> None:
    write_document(folder, version("1.0"), "a.yaml")
    write_document(folder, version("1.00"), "b.yaml")
    with pytest.raises(InvalidDocument, match=r"b.yaml: metadata: web 1.00 is in a.yaml already, as 1.0"):
        await loaded(folder)


async def test_a_pipe_among_the_documents_is_refused_and_does_not_block(folder: Path) -> None:
    os.mkfifo(folder / "web.yaml")
    with pytest.raises(InvalidDocument, match=r"web.yaml: is not a regular file"):
        await loaded(folder)


async def test_a_file_rewritten_in_place_under_its_old_time_is_seen(folder: Path) -> None:
    write_document(folder, document())
    library = await loaded(folder)
    before = await library.in_force("web")
    status = (folder / "kernel").stat()
    while (folder / "kernel").stat().st_ctime_ns == status.st_ctime_ns:
        (folder / "kernel").write_bytes(b"THE KERNEL")
        os.utime(folder / "kernel", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert await library.in_force("web") is not before


async def test_a_snapshot_is_the_same_until_the_revision_changes(folder: Path) -> None:
    write_document(folder, document())
    shelf = await loaded(folder)
    first = await shelf.library.current()
    assert await shelf.library.current() is first
    assert shelf.rows.reads == 1
    shelf.rows.apply(grant())
    second = await shelf.library.current()
    assert (first.revision, second.revision) == (0, 1)
    assert (set(first.grants), set(second.grants)) == (set(), {"fleet"})
    assert await shelf.library.current() is second


async def test_folder_and_store_make_one_snapshot_with_all_kinds(folder: Path) -> None:
    write_document(folder, document())
    write_document(folder, platform(), "host-1.yaml")
    rows = AppliedDocuments()
    rows.apply(grant(), revocation(), document("db"), document("db", "2"))
    documents = await (await loaded(folder, rows=rows)).library.current()
    assert [(each.kind, each.name, each.version) for each in documents.entries] == [
        ("Grant", "fleet", "1"),
        ("Platform", "host-1", "1"),
        ("Revocation", "incident", "1"),
        ("Workload", "db", "2"),
        ("Workload", "db", "1"),
        ("Workload", "web", "1"),
    ]
    assert [each.file for each in documents.entries] == ["", "host-1.yaml", "", "", "", "web.yaml"]
    assert all((each.apply_time is None) == (each.file != "") for each in documents.entries)


async def test_an_applied_workload_is_measured_relative_to_the_folder_and_known_at_once(folder: Path) -> None:
    shelf = await loaded(folder)
    assert await shelf.in_force("web") is None
    shelf.rows.apply(document())
    prepared = await shelf.in_force("web")
    assert prepared is not None
    assert len(prepared.references) == 6
    assert set(shelf.library.catalogue().kernels) == {"web 1"}
    shelf.rows.delete("Workload", "web")
    assert await shelf.in_force("web") is None
    assert shelf.library.catalogue().kernels == {}


async def test_what_did_not_change_is_not_measured_again(folder: Path) -> None:
    write_document(folder, document())
    shelf = await loaded(folder)
    before = await shelf.in_force("web")
    shelf.rows.apply(grant())
    assert await shelf.in_force("web") is before


async def test_a_decision_keeps_its_snapshot_while_another_comes_into_force(folder: Path) -> None:
    shelf = await loaded(folder)
    shelf.rows.apply(document())
    old = await shelf.library.current()
    shelf.rows.delete("Workload", "web")
    assert (await shelf.library.current()).workload("web") is None
    prepared = await shelf.library.in_force(old, "web")
    assert prepared is not None
    assert len(prepared.references) == 6


async def test_a_name_that_was_applied_cannot_come_into_the_folder(folder: Path) -> None:
    rows = AppliedDocuments()
    rows.apply(document())
    shelf = await loaded(folder, rows=rows)
    write_document(folder, version("2"))
    with pytest.raises(InvalidDocument, match=r"web.yaml: metadata: Workload web is both in the folder and applied"):
        await shelf.library.load()
    assert (prepared := await shelf.in_force("web")) is not None
    assert prepared.workload.version == "1"


async def test_who_asks_for_a_decision_is_told_no_files_name_also_before_there_was_any_set(folder: Path) -> None:
    rows = AppliedDocuments(sealed=False)
    rows.apply(document())
    shelf = Shelf(folder, rows)
    with pytest.raises(Unavailable):
        await shelf.library.load()
    write_document(folder, version("2"), "secret-name.yaml")
    rows.sealed = True
    with pytest.raises(InvalidDocument, match=r"secret-name.yaml: metadata: Workload web is both in the folder"):
        await shelf.library.look()  # the sweep, which tells the owner
    with pytest.raises(InvalidInput) as caught:
        await shelf.library.current()
    assert caught.value.reason is Reason.INVALID_CONFIGURATION
    assert "web" not in str(caught.value)
    assert caught.value.problems == ()
    rows.delete("Workload", "web")
    assert (await shelf.library.current()).workload("web") is not None


async def test_a_name_in_two_places_that_another_process_made_is_used_by_nobody(folder: Path) -> None:
    write_document(folder, document())
    shelf = await loaded(folder)
    shelf.rows.apply(version("2"))
    with pytest.raises(InvalidInput) as caught:
        await shelf.in_force("web")
    assert caught.value.reason is Reason.INVALID_CONFIGURATION
    assert not (await shelf.library.current()).withdrawn("web")
    assert shelf.log.named("document.unusable")[0].fields["name"] == "web"
    shelf.rows.delete("Workload", "web")
    assert await shelf.in_force("web") is not None


async def test_a_store_without_an_answer_is_an_outage_and_no_old_snapshot(folder: Path) -> None:
    write_document(folder, document())
    shelf = await loaded(folder)
    shelf.rows.error = Unavailable(Reason.STORE_UNAVAILABLE, "the store has no answer")
    with pytest.raises(Unavailable):
        await shelf.library.current()
    shelf.rows.error = None
    assert (await shelf.library.current()).workload("web") is not None


async def test_many_decisions_at_once_read_a_new_revision_once(folder: Path) -> None:
    shelf = await loaded(folder)
    shelf.rows.apply(document())
    snapshots = await asyncio.gather(*(shelf.library.current() for _ in range(20)))
    assert all(each.workload("web") is not None for each in snapshots)
    # Each that came before the new snapshot was there asks the store once, under the lock; but one snapshot is kept.
    assert len({id(each) for each in snapshots}) == 1


async def test_a_grant_on_file_with_a_number_that_readers_of_yaml_differ_on_is_no_authority(folder: Path) -> None:
    shelf = await loaded(folder)
    text = yaml.safe_dump(grant("fleet", "2")).replace("launches: 10", "launches: 0100").encode()
    shelf.rows.apply(document(), grant("fleet", "1"), grant("other"))
    shelf.rows.put(replace(row(grant("fleet", "2")), text=text, is_json=False))
    documents = await shelf.library.current()
    with pytest.raises(InvalidInput) as caught:
        documents.grant("fleet")
    assert caught.value.reason is Reason.INVALID_CONFIGURATION
    assert "0100 means different things" in shelf.log.named("document.unusable")[0].fields["text"]
    assert documents.grant("other") is not None


async def test_one_row_that_cannot_be_read_makes_itself_unusable(folder: Path) -> None:
    shelf = await loaded(folder)
    shelf.rows.apply(document(), grant())
    shelf.rows.put(row(document("web", "2"), text=b'{"kind": "Workload", "colour": "red"}'))
    documents = await shelf.library.current()
    with pytest.raises(InvalidInput) as caught:
        documents.workload("web")
    assert caught.value.reason is Reason.INVALID_CONFIGURATION
    assert documents.grant("fleet") is not None
    assert documents.platform_of("ab" * 32) is None
    assert documents.revoked.chips == frozenset()
