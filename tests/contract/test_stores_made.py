"""A store is made when that is asked for, and never by the way: an empty disk is not a new store."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from common.errors import Reason, Unavailable
from tests.support.postgres import Server
from tests.support.store_rows import audit
from tests.support.stores import Place
from verifier.store.sqlite_file import FILE_NAME

HINT = "sev-verifier init --config FILE makes it"


@pytest.fixture
def held(place: Place, request: pytest.FixtureRequest) -> Callable[[], list[str]]:
    """What is at the place."""
    if place.kind == "sqlite":
        return lambda: sorted(path.name for path in Path(place.where).parent.rglob("*"))
    server: Server = request.getfixturevalue("postgres_server")
    query = (
        "SELECT nspname, relname FROM pg_namespace LEFT JOIN pg_class ON relnamespace=pg_namespace.oid "  # noqa: S608 -- a name that we made
        f"WHERE nspname='{place.schema}'"
    )
    return lambda: server.sql(query).split()


async def refused(place: Place) -> Unavailable:
    store = place.store()
    with pytest.raises(Unavailable, match="there is no store in") as caught:
        await store.open()
    await store.close()
    assert caught.value.reason is Reason.STORE_UNAVAILABLE
    assert HINT in caught.value.fields["hint"]
    return caught.value


async def test_where_no_store_was_made_none_is_opened_and_nothing_is_left(
    place: Place, held: Callable[[], list[str]]
) -> None:
    before = held()
    await refused(place)
    assert held() == before


async def test_a_store_that_was_made_is_opened_and_stays_what_it_is(place: Place) -> None:
    for made in (True, False):
        store = place.store()
        assert await store.open(make=True) is made
        await store.record(audit())
        await store.close()
    store = place.store()
    assert await store.open() is False
    assert (await store.head())[0] == 2
    await store.close()


def stand_ins(place: Place, server: Callable[[], Server], aside: Path) -> Iterator[None]:
    """Put one empty thing after the other in a store's place, and in the end the store."""
    if place.kind == "sqlite":
        folder = Path(place.where)
        shutil.move(folder, aside)
        yield
        folder.mkdir(mode=0o700)
        yield
        assert list(folder.iterdir()) == []
        (folder / FILE_NAME).touch(mode=0o600)
        yield
        with contextlib.closing(sqlite3.connect(folder / FILE_NAME)) as other:
            other.execute("CREATE TABLE other (id INTEGER)")
        yield
        shutil.rmtree(folder)
        shutil.move(aside, folder)
        return
    name, sql = place.schema, server().sql
    sql(f"ALTER SCHEMA {name} RENAME TO {name}_aside")
    yield
    sql(f"CREATE SCHEMA {name}")
    yield
    sql(f"DROP SCHEMA {name}", f"ALTER SCHEMA {name}_aside RENAME TO {name}")


async def test_an_empty_thing_in_a_stores_place_is_refused_until_the_store_is_back(
    place: Place, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    store = place.store()
    await store.open(make=True)
    await store.record(audit())
    await store.close()
    tried = 0
    for _ in stand_ins(place, lambda: request.getfixturevalue("postgres_server"), tmp_path / "aside"):
        await refused(place)
        tried += 1
    assert tried >= 2
    store = place.store()
    await store.open()
    assert (await store.head())[0] == 1
    await store.close()
