"""What is no place for a store: servers that lose commits, databases that are not Unicode, names that need quotes."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable

import pytest

from common.errors import InvalidInput, Unavailable
from tests.support.postgres import Server
from tests.support.store_rows import audit
from verifier.store.engine import Transaction
from verifier.store.postgres import PostgresStore


@pytest.mark.parametrize("setting", ["off", "local", "remote_write"])
async def test_a_server_that_answers_before_a_commit_is_durable_is_refused(
    shared: Callable[..., PostgresStore], setting: str
) -> None:
    store = shared(f"options='-c synchronous_commit={setting}'")
    with pytest.raises(InvalidInput, match=f"synchronous_commit is {setting}, and must be on"):
        await store.open(make=True)
    await store.close()


async def test_a_server_that_waits_for_more_than_durable_is_taken(shared: Callable[..., PostgresStore]) -> None:
    store = shared("options='-c synchronous_commit=remote_apply'")
    await store.open(make=True)
    expected = {
        "synchronous_commit": "remote_apply",
        "transaction_isolation": "read committed",
        "statement_timeout": "10s",
        "lock_timeout": "5s",
        "idle_in_transaction_session_timeout": "3s",
    }

    async def look(transaction: Transaction) -> dict[str, str]:
        return {name: (await transaction.rows(f"SHOW {name}"))[0][0] for name in expected}

    assert await store._engine.read(look) == expected
    assert await store._engine.write("look", look) == expected
    await store.close()


async def test_a_server_that_does_not_sync_is_refused_also_while_serving(own_postgres_server: Server) -> None:
    store = PostgresStore(own_postgres_server.dsn)
    await store.open(make=True)
    own_postgres_server.stop(signal.SIGINT)
    own_postgres_server.start("fsync=off")
    with pytest.raises(Unavailable, match="fsync"):
        await store.check()
    another = PostgresStore(own_postgres_server.dsn)
    with pytest.raises(InvalidInput, match="fsync"):
        await another.open(make=True)
    await another.close()
    own_postgres_server.stop(signal.SIGINT)
    own_postgres_server.start()
    await store.check()
    await store.close()


async def test_a_database_that_is_not_unicode_is_refused(postgres_server: Server, postgres_schema: str) -> None:
    postgres_server.sql(f"CREATE DATABASE \"{postgres_schema}\" ENCODING 'SQL_ASCII' TEMPLATE template0")
    store = PostgresStore(postgres_server.dsn.replace("dbname=postgres", f"dbname={postgres_schema}"))
    with pytest.raises(InvalidInput, match="SQL_ASCII"):
        await store.open(make=True)
    await store.close()
    postgres_server.sql(f'DROP DATABASE "{postgres_schema}"')


@pytest.mark.parametrize("schema", ["", "Upper", 'quo"te', "a b", "1st", "x" * 64])
def test_a_schema_whose_name_would_need_quotes_is_refused(schema: str) -> None:
    with pytest.raises(InvalidInput, match="schema"):
        PostgresStore("host=/nowhere", schema=schema)


async def test_two_schemas_in_one_database_are_two_stores(postgres_server: Server, postgres_schema: str) -> None:
    other_schema = f"{postgres_schema}_2"
    one, other = (PostgresStore(postgres_server.dsn, schema=name) for name in (postgres_schema, other_schema))
    await one.open(make=True)
    await other.open(make=True)
    await one.record(audit())
    assert ((await one.head())[0], (await other.head())[0]) == (1, 0)
    await one.close()
    await other.close()
    postgres_server.sql(f'DROP SCHEMA "{other_schema}" CASCADE')


@pytest.mark.parametrize(
    "dsn",
    [
        "postgresql://sev:hunter2@/x?host=/nowhere/at/all",
        "host=/nowhere/at/all user=sev password=hunter2",
        "host=localhost hostaddr=127.0.0.1 port=1 user=sev password=hunter2",
        "host=127.0.0.1,127.0.0.1 port=1,1 user=sev password=hunter2",
        "postgres://sev:hunter2@[broken",
        "password=hunter2 and nonsense",
    ],
)
async def test_no_error_tells_anything_of_the_dsn(dsn: str) -> None:
    async def use() -> None:
        store = PostgresStore(dsn)
        try:
            assert "hunter2" not in repr(store._engine)
            await store.open(make=True)
        finally:
            await store.close()

    with pytest.raises((InvalidInput, Unavailable)) as caught:
        await use()
    told = [str(caught.value), str(caught.value.fields)]
    for private in ("hunter2", "sev", "nowhere", "127.0.0.1", "localhost", "nonsense"):
        assert not [words for words in told if private in words]
    assert len(told[0]) > len("the store cannot be reached: ")
    assert caught.value.__cause__ is None


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "verifier.store.postgres_engine", None)
    with pytest.raises(InvalidInput, match=r"sevattest\[postgres\]"):
        PostgresStore("host=/nowhere")


def test_a_store_in_sqlite_needs_no_psycopg() -> None:
    program = "import sys; sys.modules['psycopg'] = None; import verifier.store.sqlite, verifier.store.postgres"
    subprocess.run([sys.executable, "-c", program], check=True)
