"""The commands that serve nothing, but for `check-config`: transcripts that a person could read."""

from __future__ import annotations

import asyncio
import json
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.store_rows import audit as record
from tests.support.verifier_process import VerifierSite
from verifier.cli import main
from verifier.config import (
    load_config,
)
from verifier.keys.file import read_key_file
from verifier.store.sqlite import SqliteStore
from verifier.store.sqlite_file import FILE_NAME


@pytest.fixture
def site(tmp_path: Path) -> VerifierSite:
    (tmp_path / "kds").mkdir()
    return VerifierSite.make(tmp_path, extra='[kds]\nsource = "kds"', init=False)


def command(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(words)
    out, err = capsys.readouterr()
    return code, out, err


def test_keygen_makes_a_file_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "kek.bin"
    code, out, err = command(capsys, "keygen", str(path))
    key = read_key_file(path).key_id.hex()
    assert (code, out, err) == (0, f"{path}: key {key}; keep a copy where the database's backups are not\n", "")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    content = path.read_bytes()
    code, _, err = command(capsys, "keygen", str(path))
    assert (code, err) == (2, f"sev-verifier: {path}: exists, and is never overwritten\n")
    assert path.read_bytes() == content


def test_audit_without_a_store_is_told(site: VerifierSite, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = command(capsys, "audit", "--config", str(site.config))
    assert (code, out) == (3, "")
    folder = load_config(site.config, {}).folder
    assert err.startswith(f"sev-verifier: there is no store in {folder}\nhint: a disk that is not mounted")
    folder.mkdir()
    (folder / FILE_NAME).symlink_to("elsewhere")
    code, out, err = command(capsys, "audit", "--config", str(site.config))
    assert (code, out) == (3, "")
    assert err.startswith(f"sev-verifier: the store cannot open {folder / FILE_NAME}: ")


@pytest.mark.parametrize(
    "body",
    [
        '{"findings": [{"rule": "r\\u001b[2J", "message": "m"}], "explanation": {"sentence": "s\\u001b[2J"}}',
        '{"findings": 5}',
        '{"explanation": {}}',
        "[" * 100_000,
        "[]",
        "{",
    ],
)
def test_audit_shows_what_somebody_wrote_and_tells_no_terminal_what_to_do(
    site: VerifierSite, capsys: pytest.CaptureFixture[str], body: str
) -> None:
    async def fill() -> None:
        store = SqliteStore(site.folder / "state")
        await store.open(make=True)
        for event, said in (("launch.refused\x1b[2J", body), ("launch.begun", "{}")):
            await store.record(replace(record(event, body=said), caller="c\x1b[2J"))
        await store.close()

    asyncio.run(fill())
    code, out, err = command(capsys, "audit", "--config", str(site.config))
    assert (code, err) == (0, "")
    assert "launch.refused?[2J" in out
    assert "\x1b" not in out
    assert out.count("  audit id ") == 2
    code, out, _ = command(capsys, "audit", "--config", str(site.config), "--json")
    assert [json.loads(line)["event"] for line in out.splitlines()] == ["launch.refused\x1b[2J", "launch.begun"]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ((), "the following arguments are required: COMMAND"),
        (("fly",), "invalid choice: 'fly'"),
        (("serve",), "the following arguments are required: --config"),
    ],
)
def test_bad_usage_ends_with_2(capsys: pytest.CaptureFixture[str], words: tuple[str, ...], complaint: str) -> None:
    code, _, err = command(capsys, *words)
    assert code == 2
    assert complaint in err


def test_a_launch_that_is_no_id_and_a_missing_file_are_bad_input(
    site: VerifierSite, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = command(capsys, "audit", "--config", str(site.config), "--launch", "1")
    assert (code, err) == (2, "sev-verifier: --launch: must be an id (a UUID)\n")
    code, _, err = command(capsys, "health", "--config", str(site.folder / "none.toml"))
    assert code == 2
    assert "none.toml" in err
