"""The verifier's commands that only read leave what they find as it was, and be it nothing; only init makes a store."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import pytest

from tests.support.postgres import Server
from tests.support.verifier_process import VerifierSite
from verifier.cli import main

READING = (("audit",), ("audit", "--json"), ("generated", "--launch", str(uuid4())))
NO_SCHEMA = "sev-verifier: the store has no schema: sev-verifier init never made it"


@pytest.fixture
def on_postgres(
    tmp_path: Path, postgres_server: Server, postgres_schema: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[VerifierSite, Callable[[], str]]:
    """A site, and all that is in its schema."""
    monkeypatch.setenv("SEVATTEST_STORE__SCHEMA", postgres_schema)
    site = VerifierSite.make(tmp_path / "owner", dsn=postgres_server.dsn, init=False)

    def held() -> str:
        return postgres_server.sql(
            "SELECT nspname FROM pg_namespace ORDER BY 1",
            "SELECT table_name, query_to_xml(format('SELECT * FROM %I.%I', table_schema, table_name), true, false, '') "  # noqa: S608 -- a name that we made
            f"FROM information_schema.tables WHERE table_schema='{postgres_schema}' ORDER BY 1",
        )

    return site, held


def test_on_an_empty_database_nothing_is_made(
    on_postgres: tuple[VerifierSite, Callable[[], str]], capsys: pytest.CaptureFixture[str]
) -> None:
    site, held = on_postgres
    before = held()
    assert "audit" not in before
    for words in READING:
        assert main([*words, "--config", str(site.config)]) == 3
        assert capsys.readouterr() == (
            "",
            f"{NO_SCHEMA} (the PostgreSQL of [store], as {site.folder / 'dsn'} names it)\n",
        )
    assert main(["check-config", "--config", str(site.config)]) == 0
    assert main(["health", "--config", str(site.config)]) == 3
    assert held() == before


def test_beside_a_verifier_that_has_served_they_read(
    on_postgres: tuple[VerifierSite, Callable[[], str]], capsys: pytest.CaptureFixture[str]
) -> None:
    site, held = on_postgres
    site.init()
    with site.serve():
        pass
    before = held()
    assert "audit" in before
    for words, code in zip(READING, (0, 0, 2), strict=True):
        assert main([*words, "--config", str(site.config)]) == code
    assert "no secret was made" in capsys.readouterr().err
    assert held() == before


def test_in_a_state_folder_nothing_is_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    site = VerifierSite.make(tmp_path / "owner", init=False)
    before = sorted(site.folder.rglob("*"))
    for words in (*READING, ("health",)):
        assert main([*words, "--config", str(site.config)]) == 3
    assert main(["check-config", "--config", str(site.config)]) == 0
    assert sorted(site.folder.rglob("*")) == before
    state = site.folder / "state"
    state.mkdir(mode=0o700)
    (state / "sevattest.sqlite3").touch(mode=0o600)
    capsys.readouterr()
    for words in READING:
        assert main([*words, "--config", str(site.config)]) == 3
        assert capsys.readouterr() == ("", f"{NO_SCHEMA}\n")
    assert [(path.name, path.stat().st_size) for path in state.iterdir()] == [("sevattest.sqlite3", 0)]


def test_init_makes_the_store_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    site = VerifierSite.make(tmp_path / "owner", init=False)
    state = site.folder / "state"
    command = ["init", "--config", str(site.config)]
    assert main(command) == 0
    assert capsys.readouterr() == (f"sev-verifier: made the store in {state}\n", "")
    with site.serve():
        pass
    content = (state / "sevattest.sqlite3").read_bytes()
    assert main(command) == 2
    said = f"sev-verifier: there is a store in {state} already\n"
    assert capsys.readouterr() == ("", said)
    assert (state / "sevattest.sqlite3").read_bytes() == content


def test_init_makes_the_schema_in_the_database_once(
    on_postgres: tuple[VerifierSite, Callable[[], str]], capsys: pytest.CaptureFixture[str], postgres_schema: str
) -> None:
    site, held = on_postgres
    command = ["init", "--config", str(site.config)]
    assert main(command) == 0
    where = f"the PostgreSQL of [store], schema {postgres_schema}"
    assert capsys.readouterr() == (f"sev-verifier: made the store in {where}\n", "")
    before = held()
    assert main(command) == 2
    assert "already" in capsys.readouterr().err
    assert held() == before


def test_a_verifier_does_not_start_on_an_empty_disk(tmp_path: Path) -> None:
    site = VerifierSite.make(tmp_path / "owner")
    with site.serve():
        pass
    # As where its disk is not mounted, and then where the mount point is there.
    state, aside = site.folder / "state", site.folder / "aside"
    state.rename(aside)
    for there in (False, True):
        if there:
            state.mkdir(mode=0o700)
        words = [sys.executable, "-m", "verifier.cli", "serve", "--config", str(site.config)]
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
        assert (done.returncode, done.stdout) == (3, "")
        assert f"sev-verifier: there is no store in {state}\nhint: a disk that is not mounted" in done.stderr
        assert not there or list(state.iterdir()) == []
    state.rmdir()
    aside.rename(state)
    with site.serve():
        pass
