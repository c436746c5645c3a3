"""`sevattest owner` where answers get lost: what is repeated, with which id, and how it ends."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cli.transcripts import Said
from tests.support.documents import grant, revocation
from tests.support.local_admin import LocalAdmin, local_admin
from tests.support.owner_site import text


@pytest.fixture
def admin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> LocalAdmin:
    return local_admin(tmp_path / "desk", monkeypatch, capsys)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "grant.json"
    path.write_bytes(text(grant()))
    return path


def ids(admin: LocalAdmin, method: str) -> list[str]:
    return [request.request_id for called, request in admin.faults.requests if called == method]


def test_a_lost_answer_is_asked_for_again_under_the_same_id(admin: LocalAdmin, file: Path) -> None:
    admin.faults.script["ApplyDocument"] = ["after"] * 2
    said = admin.run("apply", "-f", file)
    assert (said.out, said.code) == ("grant fleet 1: applied\n", 0)
    assert len(ids(admin, "ApplyDocument")) == 3
    assert len(set(ids(admin, "ApplyDocument"))) == 1


def test_the_same_file_twice_on_purpose_is_two_requests(admin: LocalAdmin, file: Path) -> None:
    assert [admin.run("apply", "-f", file).out for _ in range(2)] == [
        "grant fleet 1: applied\n",
        "grant fleet 1: unchanged\n",
    ]
    assert len(set(ids(admin, "ApplyDocument"))) == 2


def test_a_version_that_is_not_in_force_is_said_to_be_and_ends_with_1(admin: LocalAdmin, tmp_path: Path) -> None:
    def file(version: str, **changes: object) -> Path:
        path = tmp_path / f"{version}.json"
        path.write_bytes(text(grant("fleet", version, **changes)))
        return path

    newest, stop = file("10"), file("9", suspended=True)
    warning = "warning: metadata.version: 10 is newer and stays in force\n"
    assert admin.run("apply", "-f", newest).code == 0
    told = "grant fleet 9: would be kept, NOT in force: 10 is\n"
    assert admin.run("apply", "--dry-run", "-f", stop) == Said(out=told, err=warning, code=1)
    diff = admin.run("diff", "-f", stop)
    assert (diff.err, diff.code) == (f"sevattest: {stop}: would be kept, NOT in force: 10 is\n", 1)
    told = "grant fleet 9: kept, NOT in force: 10 is\n"
    assert admin.run("apply", "-f", stop) == Said(out=told, err=warning, code=1)
    told = "grant fleet 9: unchanged, NOT in force: 10 is\n"
    assert admin.run("apply", "-f", stop) == Said(out=told, err=warning, code=1)
    # What is meant is no failure; the words are the same.
    assert admin.run("apply", "--allow-older", "-f", stop, newest) == Said(
        out=f"{told}grant fleet 10: unchanged\n", err=warning, code=0
    )
    [shown] = json.loads(admin.run("apply", "--json", "-f", stop).out)
    assert shown["document"]["newer_version"] == "10"


def test_one_version_that_is_not_in_force_leaves_none_of_the_others_out(admin: LocalAdmin, tmp_path: Path) -> None:
    files = []
    for version in ("10", "9", "11"):
        files.append(tmp_path / f"{version}.json")
        files[-1].write_bytes(text(grant("fleet", version)))
    said = admin.run("apply", "-f", *files)
    assert (said.out.splitlines(), said.code) == (
        ["grant fleet 10: applied", "grant fleet 9: kept, NOT in force: 10 is", "grant fleet 11: applied"],
        1,
    )
    # In the order of their versions each is in force when it is applied.
    assert admin.run("delete", "grant", "fleet").code == 0
    assert admin.run("apply", "-f", *sorted(files, key=lambda each: int(each.stem))).code == 0


def test_a_secret_whose_answer_is_lost_gets_one_version(admin: LocalAdmin, tmp_path: Path) -> None:
    value = tmp_path / "secret"
    value.write_bytes(b"value")
    admin.faults.script["PutSecret"] = ["after"] * 1
    assert admin.run("secret", "put", "disk", "--file", value).out == "secret disk: version 1, 5 bytes\n"
    assert admin.run("secret", "put", "disk", "--file", value).out == "secret disk: version 2, 5 bytes\n"


def test_a_delete_whose_answer_is_lost_is_no_error(admin: LocalAdmin, file: Path) -> None:
    admin.run("apply", "-f", file)
    admin.faults.script["DeleteDocument"] = ["after"] * 1
    assert admin.run("delete", "grant", "fleet").out == "grant fleet: deleted\n"
    again = admin.run("delete", "grant", "fleet")
    assert (again.err, again.code) == ("sevattest: there is no Grant fleet\n", 2)


def test_a_secret_whose_erasure_is_lost_on_its_way_is_counted_all_the_same(admin: LocalAdmin, tmp_path: Path) -> None:
    value = tmp_path / "secret"
    value.write_bytes(b"value")
    for _ in range(3):
        admin.run("secret", "put", "disk", "--file", value)
    admin.faults.script["DeleteSecret"] = ["after"] * 1
    assert admin.run("secret", "delete", "disk").out == "secret disk: erased, with all its versions (3)\n"
    assert len(set(ids(admin, "DeleteSecret"))) == 1
    assert admin.run("secret", "delete", "disk").code == 2


def test_an_outcome_that_stays_unknown_ends_with_4_and_says_where_to_look(admin: LocalAdmin, file: Path) -> None:
    admin.faults.script["ApplyDocument"] = ["after"] * 100
    said = admin.run("apply", "-f", file)
    assert (said.out, said.code) == ("", 4)
    assert "hint: look with sevattest owner get" in said.err
    assert len(set(ids(admin, "ApplyDocument"))) == 1
    admin.faults.script.clear()
    assert admin.run("apply", "-f", file).out == "grant fleet 1: unchanged\n"


def test_what_was_never_reached_after_a_lost_answer_is_still_unknown(admin: LocalAdmin, file: Path) -> None:
    admin.faults.script["ApplyDocument"] = ["after", *["unreachable"] * 100]
    assert admin.run("apply", "-f", file).code == 4
    assert len(ids(admin, "ApplyDocument")) == 1
    admin.faults.script["ApplyDocument"] = ["after", "unreachable"]
    assert admin.run("apply", "-f", file).out == "grant fleet 1: unchanged\n"


def test_what_was_turned_away_after_a_lost_answer_is_still_unknown(admin: LocalAdmin, file: Path) -> None:
    admin.faults.script["ApplyDocument"] = ["after", "turned away"]
    assert admin.run("apply", "-f", file).code == 4
    admin.faults.script["ApplyDocument"] = ["turned away"]
    assert admin.run("apply", "-f", file).code == 3
    assert admin.run("apply", "-f", file).out == "grant fleet 1: unchanged\n"


def _of_no_time(answer: Any) -> Any:
    answer.documents[0].apply_time.seconds = 1 << 60
    return answer


def _of_a_later_kind(answer: Any) -> Any:
    answer.documents[0].kind = 99
    return answer


@pytest.mark.parametrize("spoil", [_of_no_time, _of_a_later_kind])
def test_an_answer_that_cannot_be_understood_is_the_verifiers_failure(
    admin: LocalAdmin, file: Path, spoil: Callable[[Any], Any]
) -> None:
    admin.run("apply", "-f", file)
    admin.faults.spoil = {"ListDocuments": spoil}
    said = admin.run("get", "grant")
    assert (said.out, said.code) == ("", 3)
    assert said.err.startswith("sevattest: the verifier's answer cannot be used: ")


def test_a_verifier_that_is_not_there_is_said_at_once(admin: LocalAdmin, file: Path) -> None:
    admin.faults.script["ApplyDocument"] = ["unreachable"] * 1
    said = admin.run("apply", "-f", file)
    assert (said.out, said.code) == ("", 3)
    assert said.err.startswith(f"sevattest: {file}: the service cannot be reached")
    assert ids(admin, "ApplyDocument") == []


def test_a_question_is_not_repeated(admin: LocalAdmin) -> None:
    admin.faults.script["ListDocuments"] = ["before"] * 1
    assert admin.run("get", "grant").code == 3
    assert len(admin.faults.requests) == 1


def test_an_error_names_the_file_that_it_is_about(admin: LocalAdmin, file: Path) -> None:
    bad = file.with_name("bad.json")
    bad.write_bytes(text(grant(launches=0)))
    said = admin.run("apply", "-f", bad)
    assert said.code == 2
    assert said.err.startswith(f"sevattest: {bad}: ")


def test_a_version_that_is_not_there_is_named(admin: LocalAdmin, file: Path) -> None:
    admin.run("apply", "-f", file)
    assert admin.run("get", "grant", "fleet", "--version", "7").err == "sevattest: there is no Grant fleet 7\n"
    assert admin.run("get", "grant", "fleet", "--version", "1").code == 0


def test_a_bad_revocation_is_named_by_its_file(admin: LocalAdmin, tmp_path: Path) -> None:
    bad = tmp_path / "bad.json"
    bad.write_bytes(text(revocation(ceks=["zz", "yy"])))
    said = admin.run("revocation", "impact", "-f", bad)
    assert [line.startswith(f"sevattest: {bad}: spec.ceks[") for line in said.err.splitlines()] == [True, True]
    assert said.code == 2


def test_every_problem_of_a_document_is_a_line(admin: LocalAdmin, file: Path) -> None:
    bad = file.with_name("bad.json")
    bad.write_bytes(text(grant(callers=[f"nobody-{number}" for number in range(30)], launches=0)))
    for command in (("apply", "-f", bad), ("diff", "-f", bad)):
        said = admin.run(*command)
        lines = said.err.splitlines()
        assert (said.out, said.code, len(lines)) == ("", 2, 31)
        assert all(line.startswith(f"sevattest: {bad}: spec.") for line in lines)


def test_every_page_is_read(admin: LocalAdmin, tmp_path: Path) -> None:
    files = []
    for number in range(3):
        path = tmp_path / f"{number}.json"
        path.write_bytes(text(revocation(f"r-{number}", ceks=[f"{n:064x}" for n in range(3000)])))
        files.append(path)
    assert admin.run("apply", "-f", *files).code == 0
    names = [each["metadata"]["name"] for each in json.loads(admin.run("get", "revocations", "--json").out)]
    assert names == ["r-0", "r-1", "r-2"]
    assert [called for called, _ in admin.faults.requests].count("ListDocuments") == 3


def test_what_moves_a_terminals_cursor_is_not_printed(admin: LocalAdmin, file: Path) -> None:
    def spoil(answer: object) -> object:
        answer.document.warnings.append("\x1b[2Jgone\x07")  # type: ignore[attr-defined]
        return answer

    admin.faults.spoil = {"ApplyDocument": spoil}
    assert "warning: ?[2Jgone?\n" in admin.run("apply", "-f", file).err


def test_several_documents_as_yaml_are_several_documents(admin: LocalAdmin, tmp_path: Path) -> None:
    for name in ("a", "b"):
        path = tmp_path / "grant.json"
        path.write_bytes(text(grant(name)))
        admin.run("apply", "-f", path)
    shown = list(yaml.safe_load_all(admin.run("get", "grant", "-o", "yaml").out))
    assert [each["metadata"]["name"] for each in shown] == ["a", "b"]


@pytest.mark.parametrize("words", [["get", "grant"], ["keys"], ["audit", "verify"], ["launches", "list"]])
def test_nobody_is_asked_for_more_than_a_command_needs(admin: LocalAdmin, words: list[str]) -> None:
    assert admin.run(*words).code == 0
    assert all(not called.startswith(("Apply", "Delete", "Put")) for called, _ in admin.faults.requests)


def _grants(tmp_path: Path, *spelled: tuple[str, str, bool]) -> list[Path]:
    files = []
    for name, version, suspended in spelled:
        files.append(tmp_path / name)
        files[-1].write_bytes(text(grant("fleet", version, suspended=suspended)))
    return files


@pytest.mark.parametrize("versions", [("1", "1"), ("1.0", "1.00")])
@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_two_texts_of_one_version_in_one_set_are_refused_before_the_first_is_applied(
    admin: LocalAdmin, tmp_path: Path, dry: list[str], versions: tuple[str, str]
) -> None:
    first, second = _grants(tmp_path, ("first.json", versions[0], False), ("second.json", versions[1], True))
    said = admin.run("apply", *dry, "-f", first, second)
    assert (said.out, said.code) == ("", 1)
    assert said.err.startswith(f"sevattest: {second}: grant fleet {versions[0]} is in {first} with another text")
    assert admin.run("get", "grants", "--json").out.strip() == "[]"
    # The same text twice is one document, and other names have versions of their own.
    second.write_bytes(first.read_bytes())
    (tmp_path / "other.json").write_bytes(text(grant("other", versions[0], suspended=True)))
    assert admin.run("apply", *dry, "-f", first, second, tmp_path / "other.json").code == 0


@pytest.mark.parametrize(
    ("order", "lines", "code"),
    [
        (("10", "9"), ["10: {}applied", "9: {}kept, NOT in force: 10 is"], 1),
        (("9", "10"), ["9: {}applied", "10: {}applied"], 0),
        (("9", "11", "10"), ["9: {}applied", "11: {}applied", "10: {}kept, NOT in force: 11 is"], 1),
        (("11", "10", "9"), ["11: {}applied", *(f"{each}: {{}}kept, NOT in force: 11 is" for each in (10, 9))], 1),
    ],
)
def test_a_dry_run_of_several_files_says_what_applying_them_does(
    admin: LocalAdmin, tmp_path: Path, order: tuple[str, ...], lines: list[str], code: int
) -> None:
    files = _grants(tmp_path, *((f"{version}.json", version, version == "9") for version in order))
    dry = admin.run("apply", "--dry-run", "-f", *files)
    applied = admin.run("apply", "-f", *files)
    for said, would in ((dry, "would be "), (applied, "")):
        assert said.out.splitlines() == [f"grant fleet {line.format(would)}" for line in lines]
    assert (dry.code, dry.err) == (applied.code, applied.err)
    assert dry.code == code
