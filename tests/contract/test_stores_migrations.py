"""The schema's steps over every store: forward only, old and new processes side by side, and never two at once."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path

import psycopg
import pytest

from common.errors import Unavailable
from tests.support.postgres import Server
from tests.support.store_rows import opening
from tests.support.stores import Place
from verifier.store.migrations import Step, migrations, step
from verifier.store.postgres import PostgresStore
from verifier.store.postgres_engine import PostgresEngine
from verifier.store.rows import Outcome
from verifier.store.sqlite_file import FILE_NAME

NOW = [each.name for each in migrations()]
ADDITIVE = step("0003_more", "-- compatible_from: 2\nALTER TABLE launch ADD COLUMN note TEXT;\n")
BREAKING = step("0003_less", "-- compatible_from: 3\nALTER TABLE launch RENAME COLUMN oca TO owner_oca;\n")
BROKEN = step(
    "0003_bad", "-- compatible_from: 2\nCREATE TABLE half (id INTEGER);\nALTER TABLE nothing ADD COLUMN x TEXT;\n"
)


async def opened(place: Place, *more: Step) -> None:
    """A process that knows `more` steps comes and goes."""
    made = place.store(steps=(*migrations(place.kind), *more))
    try:
        await made.open(make=True)
    finally:
        await made.close()


def applied(place: Place, request: pytest.FixtureRequest) -> list[str]:
    query = "SELECT name FROM {}migration ORDER BY number"
    if place.kind == "sqlite":
        connection = sqlite3.connect(Path(place.where) / FILE_NAME)
        rows = [row[0] for row in connection.execute(query.format(""))]
        connection.close()
        return rows
    server: Server = request.getfixturevalue("postgres_server")
    return server.sql(query.format(f'"{place.schema}".')).splitlines()


@pytest.mark.parametrize("dialect", ["sqlite", "postgres"])
def test_steps_are_numbered_without_gaps_and_serve_no_later_than_themselves(dialect: str) -> None:
    steps = migrations(dialect)
    assert [each.number for each in steps] == list(range(1, len(steps) + 1))
    assert all(1 <= each.compatible_from <= each.number for each in steps)


def test_both_dialects_have_the_same_steps() -> None:
    sqlite, postgres = migrations("sqlite"), migrations("postgres")
    assert [(each.name, each.compatible_from) for each in sqlite] == [
        (each.name, each.compatible_from) for each in postgres
    ]


def test_a_step_that_does_not_say_whom_it_serves_is_no_step() -> None:
    with pytest.raises(ValueError, match="compatible_from"):
        step("0003_silent", "CREATE TABLE x (id INTEGER);")


async def test_a_process_that_is_older_than_an_added_column_serves_beside_a_newer_one(
    place: Place, request: pytest.FixtureRequest
) -> None:
    await opened(place)
    await opened(place, ADDITIVE)
    assert applied(place, request) == [*NOW, "0003_more"]
    old = place.store()
    await old.open(make=True)
    new = opening()
    assert await old.open_launch(new) is Outcome.DONE
    assert await old.launch(new.launch.launch_id) == new.launch
    await old.close()
    await opened(place, ADDITIVE)


async def test_a_process_that_is_older_than_a_breaking_step_refuses_to_serve(
    place: Place, request: pytest.FixtureRequest
) -> None:
    await opened(place, BREAKING)
    with pytest.raises(Unavailable, match="the store has schema 3, this version knows up to 2"):
        await opened(place)
    await opened(place, BREAKING)
    assert applied(place, request) == [*NOW, "0003_less"]


async def test_an_added_step_after_a_breaking_one_does_not_let_an_old_process_in(place: Place) -> None:
    added = step("0004_more", "-- compatible_from: 3\nALTER TABLE launch ADD COLUMN note TEXT;\n")
    await opened(place, BREAKING, added)
    with pytest.raises(Unavailable, match="schema 4"):
        await opened(place)
    await opened(place, BREAKING)


async def test_a_step_that_fails_leaves_the_schema_as_it_was(place: Place, request: pytest.FixtureRequest) -> None:
    await opened(place)
    with pytest.raises(Unavailable):
        await opened(place, BROKEN)
    assert applied(place, request) == NOW
    # Nothing of it stayed: the table that its first half made can be made again.
    half = step("0003_half", "-- compatible_from: 2\nCREATE TABLE half (id INTEGER);\n")
    await opened(place, half)
    assert applied(place, request) == [*NOW, "0003_half"]


@pytest.mark.parametrize("place", ["postgres"], indirect=True)
async def test_replicas_that_start_at_once_apply_each_step_once(place: Place, request: pytest.FixtureRequest) -> None:
    await asyncio.gather(*(opened(place, ADDITIVE) for _ in range(6)))
    assert applied(place, request) == [*NOW, "0003_more"]


# What PostgreSQL's other sessions keep.


@pytest.fixture
def impatient(place: Place, monkeypatch: pytest.MonkeyPatch) -> PostgresEngine:
    """The engine of a place whose sessions wait only shortly for a lock; nobody else's."""
    monkeypatch.setattr("verifier.store.postgres_engine.LOCK_TIMEOUT_S", 0.1)
    engine = place.store()._engine
    assert isinstance(engine, PostgresEngine)
    return engine


KEPT = "the store cannot be written: .*lock timeout: another session keeps what it waits for"


@pytest.mark.parametrize("place", ["postgres"], indirect=True)
@pytest.mark.parametrize("made", [False, True], ids=["the first start", "a later one"])
async def test_a_start_waits_for_the_turn_for_so_long_and_no_longer(
    place: Place, impatient: PostgresEngine, request: pytest.FixtureRequest, *, made: bool
) -> None:
    """Another replica may be at a long step: whoever starts meanwhile says why it does not, and is started again."""
    if made:
        await opened(place)
    with psycopg.connect(place.where) as replica:
        replica.execute("SELECT pg_advisory_xact_lock(%s)", [impatient._turn])
        with pytest.raises(Unavailable, match=KEPT):
            await opened(place, ADDITIVE)
    await opened(place, ADDITIVE)
    assert applied(place, request) == [*NOW, "0003_more"]


@pytest.mark.parametrize("place", ["postgres"], indirect=True)
@pytest.mark.usefixtures("impatient")
async def test_a_step_waits_for_a_table_for_so_long_and_no_longer(place: Place, request: pytest.FixtureRequest) -> None:
    await opened(place)
    with psycopg.connect(place.where) as dump:
        dump.execute(f'SELECT count(*) FROM "{place.schema}".launch'.encode())  # noqa: S608 -- the test's
        with pytest.raises(Unavailable, match=KEPT):
            await opened(place, ADDITIVE)
        assert applied(place, request) == NOW
        # The turn was given back: replicas that serve go on.
        store = place.store()
        await store.open(make=True)
        assert await store.open_launch(opening()) is Outcome.DONE
        await store.close()
    await opened(place, ADDITIVE)
    assert applied(place, request) == [*NOW, "0003_more"]


# Commands that only read.


async def read(place: Place, *more: Step) -> None:
    """A command that knows `more` steps reads beside whoever serves."""
    made = place.store(steps=(*migrations(place.kind), *more))
    assert isinstance(made, PostgresStore)
    try:
        await made.open_to_read()
        await made.records(None, after=0, limit=1)
    finally:
        await made.close()


@pytest.mark.parametrize("place", ["postgres"], indirect=True)
async def test_whoever_only_reads_brings_no_schema_forward(place: Place, request: pytest.FixtureRequest) -> None:
    await opened(place)
    await read(place)
    with pytest.raises(Unavailable, match="the store has schema 2, this version reads 3"):
        await read(place, ADDITIVE)
    assert applied(place, request) == NOW
    await opened(place, ADDITIVE)
    await read(place)  # what a newer one only added is in nobody's way


@pytest.mark.parametrize("place", ["postgres"], indirect=True)
async def test_whoever_only_reads_does_not_read_what_a_newer_one_changed(place: Place) -> None:
    await opened(place, BREAKING)
    with pytest.raises(Unavailable, match="the store has schema 3, this version knows up to 2"):
        await read(place)
