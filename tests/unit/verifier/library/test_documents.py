"""Snapshots: what is in force, what cannot be read, and what fails closed for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.errors import InvalidInput, Reason
from tests.support.documents import CHIP, SECRET_GUID, grant, platform, revocation, row, workload
from verifier.documents.reader import read_document
from verifier.documents.sources import FileSource
from verifier.library.applied import read_row
from verifier.library.documents import Documents, Entry, snapshot
from verifier.store.rows import DocumentRow

FOLDER = Path("/owner")
NEWER_FORM = b'{"apiVersion": "sevattest/v2"}'


def entry(content: dict[str, Any], *, text: bytes | None = None) -> Entry:
    return read_row(row(content, text=text), FOLDER)


def unreadable(content: dict[str, Any]) -> Entry:
    found = entry(content, text=NEWER_FORM)
    assert found.document is None
    assert found.problem
    return found


def of(*entries: Entry) -> Documents:
    return snapshot(7, entries)


def stopped(step: Callable[[], object]) -> bool:
    try:
        step()
    except InvalidInput as error:
        return error.reason is Reason.INVALID_CONFIGURATION
    return False


def test_the_newest_version_of_each_name_is_in_force() -> None:
    documents = of(*(entry(grant("fleet", each, launches=int(each))) for each in ("2", "10", "9")), entry(grant("a")))
    assert documents.revision == 7
    assert {name: each.launches for name, each in documents.grants.items()} == {"fleet": 10, "a": 10}
    assert [each.version for each in documents.versions("Grant", "fleet")] == ["10", "9", "2"]
    assert documents.versions("Grant", "none") == documents.versions("Workload", "fleet") == ()


def test_kinds_have_names_of_their_own() -> None:
    documents = of(entry(workload("x")), entry(grant("x")), entry(platform("x")), entry(revocation("x")))
    assert (set(documents.workloads), set(documents.grants)) == ({"x"}, {"x"})
    assert (set(documents.platforms), set(documents.revocations)) == ({"x"}, {"x"})


def test_a_platform_is_found_by_its_chip() -> None:
    documents = of(entry(platform()), entry(platform("host-2", cek="cd" * 32)))
    assert (found := documents.platform_of(CHIP)) is not None
    assert found.name == "host-1"
    assert documents.platform_of("ef" * 32) is None


def test_only_the_chip_of_the_version_in_force_counts() -> None:
    documents = of(entry(platform("host-1", "1")), entry(platform("host-1", "2", cek="cd" * 32)))
    assert documents.platform_of(CHIP) is None
    assert documents.platform_of("cd" * 32) is not None


def test_two_platforms_of_one_chip_stop_that_chip_and_no_other() -> None:
    documents = of(entry(platform()), entry(platform("host-2")), entry(platform("host-3", cek="cd" * 32)))
    assert stopped(lambda: documents.platform_of(CHIP))
    assert documents.platform_of("cd" * 32) is not None
    assert not stopped(documents.require_judgeable)


@pytest.mark.parametrize("content", [platform(), revocation()])
def test_what_may_forbid_and_cannot_be_read_stops_everything(content: dict[str, Any]) -> None:
    documents = of(entry(workload()), entry(grant()), unreadable(content))
    assert stopped(documents.require_judgeable)
    assert stopped(lambda: documents.platform_of(CHIP))
    assert stopped(lambda: documents.revoked)
    readable = of(entry(workload()), entry(grant()), entry(content))
    assert not stopped(readable.require_judgeable)
    assert not stopped(lambda: readable.platform_of(CHIP))
    assert not stopped(lambda: readable.revoked)


def test_an_older_version_is_not_put_in_the_stead_of_an_unreadable_one() -> None:
    documents = of(
        entry(grant("fleet", "1")),
        unreadable(grant("fleet", "2")),
        entry(workload("web", "1")),
        unreadable(workload("web", "2")),
    )
    assert "fleet" not in documents.grants
    assert "web" not in documents.workloads
    assert stopped(lambda: documents.grant("fleet"))
    assert stopped(lambda: documents.workload("web"))
    # What may only allow stops nothing else, and what is on file is not withdrawn.
    assert not stopped(documents.require_judgeable)
    assert not documents.withdrawn("web")
    assert documents.withdrawn("db")
    assert documents.grant("none") is None


@pytest.mark.parametrize("make", [workload, grant, platform, revocation])
def test_an_unreadable_older_version_plays_no_part(make: Callable[..., dict[str, Any]]) -> None:
    documents = of(unreadable(make("x", "1")), entry(make("x", "2")))
    assert documents.unusable == {}
    assert [each.problem is None for each in documents.entries] == [True, False]


def test_a_row_that_holds_another_document_than_it_says_is_unreadable() -> None:
    good = row(grant("fleet", "1"))
    for changed in (
        DocumentRow(**{**vars(good), "name": "other"}),
        DocumentRow(**{**vars(good), "version": "2"}),
        DocumentRow(**{**vars(good), "kind": "Revocation"}),
    ):
        assert read_row(changed, FOLDER).document is None
    assert read_row(good, FOLDER).document is not None


def naming(path: str) -> dict[str, Any]:
    """Applied when this verifier, or an older one, did not look at what it names."""
    return workload(secrets=[{"guid": str(SECRET_GUID), "source": {"file": path}}])


@pytest.mark.parametrize("path", ["/owner/secret", "/etc/passwd", "../kek.bin", "web/../../kek.bin", "web/..", ".."])
def test_an_applied_document_that_names_a_file_outside_the_folder_is_unusable(path: str) -> None:
    documents = of(entry(naming(path)))
    assert stopped(lambda: documents.workload("web"))
    assert "spec.secrets[0].source.file: must be a path in the folder" in documents.unusable["Workload", "web"]
    # A file of the owner's own may name any other.
    text = json.dumps(naming(path)).encode()
    assert read_document(text, is_json=True, folder=FOLDER, source="web.json").name == "web"


@pytest.mark.parametrize("path", ["secret", "web/secret", "./secret", "..data/secret", "secret.."])
def test_an_applied_document_may_name_files_in_the_folder(path: str) -> None:
    found = of(entry(naming(path))).workload("web")
    assert found is not None
    [secret] = found.secrets
    assert isinstance(secret.source, FileSource)
    assert Path(secret.source.path) == FOLDER / path


def test_a_supposed_document_takes_the_place_of_its_name_alone() -> None:
    documents = of(entry(grant("a")), entry(grant("b", "9")), entry(workload()))
    supposed = documents.supposing([entry(grant("b", "1", suspended=True)), entry(revocation())])
    assert supposed.revision == documents.revision
    assert supposed.grants["b"].suspended
    assert set(supposed.grants) == {"a", "b"}
    assert supposed.revoked.chips == {CHIP}
    assert supposed.workload("web") == documents.workload("web")
    # The snapshot itself is as it was.
    assert not documents.grants["b"].suspended
    assert documents.revoked.chips == frozenset()


def test_an_entry_writes_its_document_out() -> None:
    found = entry(grant())
    assert '"suspended":false' in found.written_out()
    assert len(found.sha256) == 64
    with pytest.raises(InvalidInput):
        unreadable(grant()).written_out()
