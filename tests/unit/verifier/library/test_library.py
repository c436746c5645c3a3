"""Documents and artefacts on disk: one set or none, measured again when a file changes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from common.errors import InvalidInput, Reason
from tests.support.desk import document, write_artefacts, write_document
from tests.support.firmware import amdsev_image, reset_entry, with_footer
from tests.support.recording_log import RecordingLog
from verifier.appraisal.reference import freeze
from verifier.documents.text import InvalidDocument
from verifier.library.artefacts import ArtefactShelf
from verifier.library.library import Library


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_artefacts(tmp_path)
    return tmp_path


async def loaded(folder: Path, log: RecordingLog | None = None) -> Library:
    library = Library(folder, log or RecordingLog())
    await library.load()
    return library


def version(number: str, **spec: Any) -> dict[str, Any]:
    return {**document(**spec), "metadata": {"name": "web", "version": number}}


async def test_the_newest_version_is_in_force(folder: Path) -> None:
    for number in ("1.9", "1.10", "1.2"):
        write_document(folder, version(number), f"{number}.yaml")
    library = await loaded(folder)
    prepared = await library.in_force("web")
    assert prepared is not None
    assert prepared.workload.version == "1.10"
    assert library.document("web") == prepared.workload
    assert await library.in_force("none") is None
    assert library.document("none") is None


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
    write_document(folder, document(callers=[]), "a.yaml")
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
    write_document(folder, document(callers=[]), "two.yaml")
    with pytest.raises(InvalidDocument):
        await library.load()
    prepared = await library.in_force("web")
    assert prepared is not None
    assert prepared.workload.version == "1"
    write_document(folder, version("2"), "two.yaml")
    await library.load()
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
    other = {**document(measure=None, digests=["00" * 32]), "metadata": {"name": "other", "version": "1"}}
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
    assert "web 1 (files since replaced)" in library.catalogue().kernels
    terms = freeze(before.workload, generation="emulated", references=before.references, secret_area=before.secret_area)
    assert [each.shape for each in library.expected(terms)] == list(before.allowed)


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
    catalogue = (await loaded(folder)).catalogue()
    assert set(catalogue.firmwares) == set(catalogue.kernels) == {"web 1", "web 2"}
    assert dict(catalogue.cmdlines) == {"web 1": b"quiet", "web 2": b"console=ttyS0"}


async def test_terms_of_unknown_files_have_no_shapes(folder: Path) -> None:
    write_document(folder, document())
    library = await loaded(folder)
    prepared = await library.in_force("web")
    assert prepared is not None
    terms = freeze(prepared.workload, generation="emulated", references=prepared.references[:1], secret_area=0)
    assert library.expected(terms) == ()


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
