"""`sevattest owner audit verify` against verifiers that lie about their log: each lie is found and named."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from common.audit.chain import Head, record_hash
from tests.support.documents import grant
from tests.support.local_admin import LocalAdmin, local_admin
from tests.support.owner_site import sign_head
from verifier.keys.signer import Signer

RECORDS = 6


@pytest.fixture
def admin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> LocalAdmin:
    """A desk whose log has six records and a checkpoint after the fourth."""
    made = local_admin(tmp_path / "desk", monkeypatch, capsys)
    asyncio.run(_fill(made))
    return made


async def _fill(admin: LocalAdmin) -> None:
    async with admin.open() as site:
        for number in range(RECORDS):
            await site.apply(grant("fleet", str(number)))
            if number == 3:
                await sign_head(site)


def test_an_honest_log_is_whole(admin: LocalAdmin) -> None:
    said = admin.run("audit", "verify")
    assert said.code == 0
    assert said.out == (
        "the audit log is whole: records 1 to 6, checkpoints: 1\n"
        "signed up to record 4; 2 came after the newest checkpoint\n"
    )
    assert said.err.startswith("warning: the keys are the verifier's own word")


def test_a_log_that_nobody_signed_yet_is_said_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    admin = local_admin(tmp_path, monkeypatch, capsys)

    async def fill() -> None:
        async with admin.open() as site:
            await site.apply(grant("fleet", "1"))

    asyncio.run(fill())
    said = admin.run("audit", "verify")
    assert said.code == 0
    assert said.out == (
        "the audit log is whole: records 1 to 1, checkpoints: 0\n"
        "nothing of it is signed: the verifier has no checkpoint yet\n"
    )


def test_a_kept_file_that_is_none_is_named(admin: LocalAdmin, tmp_path: Path) -> None:
    junk = tmp_path / "junk"
    junk.write_text("no key and no checkpoint")
    for option in ("--jwks", "--checkpoint", "--since-checkpoint"):
        said = admin.run("audit", "verify", option, junk)
        assert (said.out, said.code) == ("", 2)
        assert f"sevattest: {junk}: a " in said.err


def _changed(records: Any) -> None:
    members = json.loads(records[1].json)
    members["caller"] = "spiffe://owner.example/owner/eve"
    records[1].json = json.dumps(members, separators=(",", ":"), sort_keys=True)


def _removed(records: Any) -> None:
    del records[1]


def _renumbered(records: Any) -> None:
    del records[1]
    for number, record in enumerate(records, start=1):
        record.number = number


def _swapped(records: Any) -> None:
    first, second = records[1].json, records[2].json
    records[1].json, records[2].json = second, first


def _moved(records: Any) -> None:
    records.sort(key=lambda each: -each.number)


def _repeated(records: Any) -> None:
    records.insert(1, records[1])


def _cut(records: Any) -> None:
    del records[3:]


def _emptied(records: Any) -> None:
    del records[:]


def _garbled(records: Any) -> None:
    records[2].json = "}{"


def _nested(records: Any) -> None:
    records[2].json = "[" * 100_000


def _deep(records: Any) -> None:
    records[2].json = '{"body":' * 900 + "1" + "}" * 900


def _another_hash(records: Any) -> None:
    records[5].hash = bytes(32)


@pytest.mark.parametrize(
    ("lie", "number"),
    [
        (_changed, 2),
        (_removed, 2),
        (_renumbered, 2),
        (_swapped, 2),
        (_moved, 1),
        (_repeated, 2),
        (_cut, 4),
        (_emptied, 1),
        (_garbled, 3),
        (_nested, 3),
        (_deep, 3),
        (_another_hash, 6),
    ],
)
def test_a_log_that_was_meddled_with_is_refused_at_the_record(
    admin: LocalAdmin, lie: Callable[[Any], None], number: int
) -> None:
    def spoil(answer: Any) -> Any:
        records = list(answer.records)
        lie(records)
        del answer.records[:]
        answer.records.extend(records)
        return answer

    admin.faults.spoil = {"ListAuditRecords": spoil}
    said = admin.run("audit", "verify")
    assert (said.out, said.code) == ("", 1)
    assert said.err.startswith(f"sevattest: audit log: record {number} ")


def test_a_log_that_was_cut_together_with_its_checkpoints_is_found_with_a_kept_one(
    admin: LocalAdmin, tmp_path: Path
) -> None:
    kept = tmp_path / "checkpoint"
    assert admin.run("audit", "verify", "--keep", kept).code == 0

    def cut(answer: Any) -> Any:
        del answer.records[3:]
        return answer

    def unsigned(answer: Any) -> Any:
        del answer.checkpoints[:]
        return answer

    admin.faults.spoil = {"ListAuditRecords": cut, "ListCheckpoints": unsigned}
    assert admin.run("audit", "verify").code == 0  # nothing contradicts it
    for option in ("--checkpoint", "--since-checkpoint"):
        found = admin.run("audit", "verify", option, kept)
        assert (found.out, found.code) == ("", 1)
        assert "record 4 is missing: the log was signed up to record 4" in found.err


def _written_anew(records: Any) -> None:
    last = bytes(32)
    for record in records:
        members = {**json.loads(record.json), "caller": "spiffe://owner.example/owner/eve"}
        record.json = json.dumps(members, separators=(",", ":"), sort_keys=True)
        record.hash = last = record_hash(last, record.number, members)


def _without_the_signed_one(records: Any) -> None:
    del records[3]


def _signed_one_moved(records: Any) -> None:
    records[3], records[4] = records[4], records[3]


def _signed_one_twice(records: Any) -> None:
    records.insert(4, records[3])


@pytest.mark.parametrize(
    ("lie", "sentence"),
    [
        (_cut, "record 4 is missing: the log was signed up to record 4"),
        (_emptied, "record 1 is missing: the log was signed up to record 4"),
        (_written_anew, "record 4 is not the one that was signed: the log was written anew up to there"),
        (_without_the_signed_one, "record 4 is missing"),
        (_signed_one_moved, "record 4 is missing"),
        (_signed_one_twice, "record 4 stands again, or out of order, where record 5 belongs"),
        (_another_hash, "record 6 is not the one that was written"),
    ],
)
def test_a_log_is_refused_from_a_kept_checkpoint_on_as_with_it(
    admin: LocalAdmin, tmp_path: Path, lie: Callable[[Any], None], sentence: str
) -> None:
    kept = tmp_path / "checkpoint"
    assert admin.run("audit", "verify", "--keep", kept).code == 0
    honest = admin.run("audit", "verify", "--since-checkpoint", kept)
    assert (honest.code, honest.out.splitlines()[0]) == (0, "the audit log is whole: records 5 to 6, checkpoints: 1")

    def spoil(answer: Any) -> Any:
        records = list(answer.records)
        lie(records)
        del answer.records[:]
        answer.records.extend(records)
        return answer

    def unsigned(answer: Any) -> Any:
        del answer.checkpoints[:]
        return answer

    admin.faults.spoil = {"ListAuditRecords": spoil, "ListCheckpoints": unsigned}
    for option in ("--checkpoint", "--since-checkpoint"):
        said = admin.run("audit", "verify", option, kept)
        assert (said.out, said.code) == ("", 1)
        assert said.err.startswith(f"sevattest: audit log: {sentence}")


def test_an_older_checkpoint_must_hold_from_a_newer_one_on_too(admin: LocalAdmin, tmp_path: Path) -> None:
    older, newer = tmp_path / "older", tmp_path / "newer"
    assert admin.run("audit", "verify", "--keep", older).code == 0

    async def sign() -> None:
        async with admin.open() as site:
            await sign_head(site)

    asyncio.run(sign())
    assert admin.run("audit", "verify", "--keep", newer).code == 0
    words = ("audit", "verify", "--checkpoint", older, "--since-checkpoint", newer)
    assert admin.run(*words).code == 0

    def spoil(answer: Any) -> Any:
        answer.records[3].hash = bytes(32)
        return answer

    admin.faults.spoil = {"ListAuditRecords": spoil}
    said = admin.run(*words)
    assert (said.out, said.code) == ("", 1)
    assert "record 4 is not the one that was signed" in said.err


def test_records_before_a_kept_checkpoint_are_passed_by(admin: LocalAdmin, tmp_path: Path) -> None:
    kept = tmp_path / "checkpoint"
    assert admin.run("audit", "verify", "--keep", kept).code == 0

    def spoil(answer: Any) -> Any:
        _changed(answer.records)
        return answer

    admin.faults.spoil = {"ListAuditRecords": spoil}
    assert admin.run("audit", "verify", "--since-checkpoint", kept).code == 0
    assert "record 2 is not the one that was written" in admin.run("audit", "verify", "--checkpoint", kept).err


def test_a_kept_checkpoint_gives_way_to_newer_ones_only(admin: LocalAdmin, tmp_path: Path) -> None:
    kept = tmp_path / "checkpoint"

    def keep(*words: Any) -> str:
        said = admin.run("audit", "verify", "--keep", kept, *words)
        assert said.code == 0, said.err
        return kept.read_text()

    async def sign() -> None:
        async with admin.open() as site:
            await sign_head(site)

    older = keep()
    asyncio.run(sign())
    newer = keep()
    assert newer != older

    def unsigned(answer: Any) -> Any:
        del answer.checkpoints[1:]
        return answer

    admin.faults.spoil = {"ListCheckpoints": unsigned}  # the log is whole; the newest checkpoint is shown no more
    assert [keep("--checkpoint", kept), keep("--since-checkpoint", kept), keep()] == [newer] * 3
    before = tmp_path / "before"
    before.write_text(newer)
    kept.unlink()
    assert keep("--checkpoint", before) == newer


def test_what_would_be_replaced_by_keeping_must_hold_and_is_left_where_it_does_not(
    admin: LocalAdmin, tmp_path: Path
) -> None:
    kept = tmp_path / "checkpoint"
    assert admin.run("audit", "verify", "--keep", kept).code == 0
    token = kept.read_text()

    def cut(answer: Any) -> Any:
        del answer.records[3:]
        return answer

    def unsigned(answer: Any) -> Any:
        del answer.checkpoints[:]
        return answer

    admin.faults.spoil = {"ListAuditRecords": cut, "ListCheckpoints": unsigned}
    found = admin.run("audit", "verify", "--keep", kept)
    assert (found.out, found.code) == ("", 1)
    assert "record 4 is missing" in found.err
    assert kept.read_text() == token
    admin.faults.spoil = {}
    kept.write_text("notes of mine")
    found = admin.run("audit", "verify", "--keep", kept)
    assert (found.out, found.code) == ("", 2)
    assert kept.read_text() == "notes of mine"


def test_a_checkpoint_of_another_log_is_refused(admin: LocalAdmin) -> None:
    async def fork() -> None:
        async with admin.open() as site:
            await sign_head(site, Head(number=5, hash=bytes(32)))

    asyncio.run(fork())
    said = admin.run("audit", "verify")
    assert said.code == 1
    assert "record 5 is not the one that was signed" in said.err


def test_keys_that_were_kept_find_a_replaced_signer(admin: LocalAdmin, tmp_path: Path) -> None:
    keys = tmp_path / "jwks.json"
    keys.write_text(admin.run("keys").out)
    said = admin.run("audit", "verify", "--jwks", keys)
    assert (said.code, said.err) == (0, "")
    keys.write_text(json.dumps(Signer(ec.generate_private_key(ec.SECP256R1())).jwks()))
    assert admin.run("audit", "verify", "--jwks", keys).code == 1
    keys.write_text("no keys")
    assert admin.run("audit", "verify", "--jwks", keys).code == 2


def test_what_was_kept_and_is_no_checkpoint_is_bad_input(admin: LocalAdmin, tmp_path: Path) -> None:
    bad = tmp_path / "checkpoint"
    for content in (b"", b"a.b.c", b"\xff\xfe", b"x" * 20000):
        bad.write_bytes(content)
        for option in ("--checkpoint", "--since-checkpoint"):
            said = admin.run("audit", "verify", option, bad)
            assert (said.out, said.code) == ("", 2), content
            assert "Traceback" not in said.err


def test_nothing_can_be_kept_of_a_log_that_was_never_signed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "checkpoint"
    said = local_admin(tmp_path / "desk", monkeypatch, capsys).run("audit", "verify", "--keep", kept)
    assert "warning: the verifier has signed no checkpoint yet, so none was kept\n" in said.err
    assert not kept.exists()


def test_a_verification_says_what_it_covers_as_json(admin: LocalAdmin) -> None:
    seen = json.loads(admin.run("audit", "verify", "--json").out)
    assert {name: seen[name] for name in ("records", "first", "checkpoints", "covered", "pinned")} == {
        "records": 6,
        "first": 1,
        "checkpoints": 1,
        "covered": 4,
        "pinned": False,
    }


def test_an_empty_log_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    admin = local_admin(tmp_path, monkeypatch, capsys)
    said = admin.run("audit", "verify", "--json")
    assert (json.loads(said.out)["records"], said.code) == (0, 0)
    assert admin.run("audit", "verify").out.startswith("the audit log is whole: no record after 0, ")


@pytest.mark.parametrize(
    "body",
    [
        {"findings": [{"rule": "r\x1b[2J", "message": "m\x1b[2J"}], "explanation": {"sentence": "s\x1b[2J"}},
        {"name": "n\x1b[2J", "findings": 5},
        {"findings": [{}], "explanation": 5},
        [],
        "\x1b[2J",
    ],
)
def test_a_record_that_somebody_wrote_is_shown_and_tells_no_terminal_what_to_do(admin: LocalAdmin, body: Any) -> None:
    def spoil(answer: Any) -> Any:
        record = answer.records[1]
        members = json.loads(record.json) | {"body": json.dumps(body), "caller": "c\x1b[2J"}
        record.event, record.audit_id, record.json = "e\x1b[2J", "i\x1b[2J", json.dumps(members)
        return answer

    admin.faults.spoil = {"ListAuditRecords": spoil}
    said = admin.run("audit", "list")
    assert (said.code, said.err) == (0, "")
    assert "i?[2J" in said.out
    assert "\x1b" not in said.out
    assert len(said.out.split("audit id")) == RECORDS + 1
    assert admin.run("audit", "list", "--json").code == 0
