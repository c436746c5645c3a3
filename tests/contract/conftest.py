"""Fixtures of the contract suites: a store of each kind."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from tests.support.postgres import Server, own_postgres_server, postgres_schema, postgres_server
from tests.support.stores import Place
from verifier.store.postgres import PostgresStore
from verifier.store.sql_store import SqlStore

__all__ = ["own_postgres_server", "place", "postgres_schema", "postgres_server", "shared", "store"]


@pytest.fixture(params=["sqlite", "postgres"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """Where a store of each kind can be made."""
    if request.param == "sqlite":
        return Place("sqlite", str(tmp_path / "state"))
    server: Server = request.getfixturevalue("postgres_server")
    return Place("postgres", server.dsn, request.getfixturevalue("postgres_schema"))


@pytest.fixture
async def store(place: Place) -> AsyncIterator[SqlStore]:
    """An open store of each kind."""
    made = place.store()
    await made.open(make=True)
    yield made
    await made.close()


@pytest.fixture
def shared(postgres_server: Server, postgres_schema: str) -> Callable[..., PostgresStore]:
    """Makes stores over a schema in the server that all tests share."""

    def make(more: str = "", on_step: Callable[[str], None] = lambda _step: None) -> PostgresStore:
        return PostgresStore(f"{postgres_server.dsn} {more}", on_step, schema=postgres_schema)

    return make
