"""One run of the hammer: set up, let everybody loose, and gather what is left."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path
from typing import Any

import psycopg

from common.audit.jws import read_key_set
from common.errors import Unavailable
from common.rpc.identity import Role
from orchestrator.demo.processes import script
from tests.hammer.callers import Caller, all_at_work
from tests.hammer.chaos import Chaos, Replica, Replicas
from tests.hammer.plan import GRANT, Plan, Tally
from tests.hammer.proof import Evidence
from tests.support.documents import write_document
from tests.support.postgres import Server
from tests.support.verifier_process import VerifierSite
from verifier.library.artefacts import ArtefactShelf
from verifier.library.documents import snapshot
from verifier.library.folder import read_folder
from verifier.library.prepared import prepare
from verifier.store.postgres import PostgresStore
from verifier.store.rows import ChainedRecord, LaunchFilter
from verifier.store.sql_store import SqlStore
from verifier.store.sqlite import SqliteStore
from verifier.store.sqlite_file import FILE_NAME, connect_reader

_EXTRA = """\
[limits]
sweep_interval = 1
[audit]
checkpoint_records = 20
"""
_SAMPLE = (
    "SELECT (SELECT count(*) FROM {0}launch WHERE state='open'), l.open, l.released "  # noqa: S608 -- constants
    "FROM {0}ledger l WHERE grant_name='" + GRANT + "'"
)
_SAMPLE_EVERY_S = 0.05
_SHOWN = 40  # lines of a log, where a run breaks off


async def hammer(plan: Plan, server: Server | None) -> tuple[Tally, Evidence]:
    """Run the plan, over the PostgreSQL `server` or over SQLite, and give what is left of it."""
    folder = Path(tempfile.mkdtemp(prefix="sevattest-h-"))
    try:
        return await _run(plan, server, folder)
    except BaseException as error:
        error.add_note(f"seed {plan.seed}; the verifiers' errors:\n{_errors(folder / 'log')}")
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _errors(log: Path) -> str:
    """The last errors in a log."""
    lines = log.read_text().splitlines() if log.exists() else []
    return "\n".join([line for line in lines if '"level":"error"' in line or not line.startswith("{")][-_SHOWN:])


async def _run(plan: Plan, server: Server | None, folder: Path) -> tuple[Tally, Evidence]:
    tally = Tally()
    dsn = None if server is None else server.dsn
    workload, grant = plan.documents()
    site = VerifierSite.make(folder, content=workload, extra=_EXTRA, dsn=dsn, owners=True)
    write_document(folder / "documents", grant, "grant.yaml")
    for name in plan.names:
        site.pki.issue(Role.ORCHESTRATOR, name)
    names = tuple(plan.names)
    replicas = Replicas([Replica(site, number, names) for number in range(plan.replicas)])
    try:
        # One after the other, as the first makes the identities while the second waits for neither.
        for replica in replicas.all:
            await replica.start(tally)
        await _rage(plan, tally, site, replicas, server)
        keys = await _owner_verifies(site, replicas)
        for replica in replicas.all:
            await replica.stop()
    finally:
        for replica in replicas.all:
            await replica.close()
    store = SqliteStore(folder / "state") if dsn is None else PostgresStore(dsn)
    await store.open()
    try:
        return tally, await _evidence(plan, tally, store, keys)
    finally:
        await store.close()


async def _rage(plan: Plan, tally: Tally, site: VerifierSite, replicas: Replicas, server: Server | None) -> None:
    chaos = Chaos(plan, tally, replicas, server)
    digest = _good_digest(site)
    callers = [
        Caller(
            name=plan.names[number % plan.identities],
            draw=random.Random(f"{plan.seed} caller {number}"),  # noqa: S311 -- not a secret
            plan=plan,
            tally=tally,
            verifiers=replicas,
            platform=site.platform,
            digest=digest,
        )
        for number in range(plan.callers)
    ]
    started = time.monotonic()
    async with asyncio.timeout(plan.patience), _sampled(tally, _sampler(site, server)), asyncio.TaskGroup() as group:
        group.create_task(chaos.watch())
        group.create_task(chaos.rage())
        group.create_task(all_at_work(callers, chaos.stop))
    tally.seconds = time.monotonic() - started


def _good_digest(site: VerifierSite) -> bytes:
    workload = snapshot(0, read_folder(site.folder / "documents")).workloads["web"][0]
    return prepare(workload, ArtefactShelf()).references[0].digest


# Sampling.


def _sampler(site: VerifierSite, server: Server | None) -> Callable[[], tuple[int, int, int] | None]:
    """What reads open launches and the ledger in one statement; None where there is no answer just now."""

    def sqlite() -> tuple[int, int, int] | None:
        with suppress(sqlite3.Error, Unavailable), closing(connect_reader(site.folder / "state" / FILE_NAME)) as reader:
            found: tuple[int, int, int] | None = reader.execute(_SAMPLE.format("")).fetchone()
            return found
        return None

    def postgres() -> tuple[int, int, int] | None:
        assert server is not None
        with suppress(psycopg.Error), psycopg.connect(server.dsn, autocommit=True) as reader:
            row = reader.execute(_SAMPLE.format("sevattest.").encode()).fetchone()
            return None if row is None else (row[0], row[1], row[2])
        return None

    return sqlite if server is None else postgres


@asynccontextmanager
async def _sampled(tally: Tally, sample: Callable[[], tuple[int, int, int] | None]) -> AsyncIterator[None]:
    async def go_on() -> None:
        while True:
            found = await asyncio.to_thread(sample)
            if found is not None:
                tally.samples.append(found)
            await asyncio.sleep(_SAMPLE_EVERY_S)

    task = asyncio.create_task(go_on())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


# What is left.


async def _owner_verifies(site: VerifierSite, replicas: Replicas) -> dict[str, Any]:
    """The owner's commands over the network: the keys, and that the log holds. All replicas but the first stop."""
    first, *others = replicas.all
    for replica in others:
        await replica.stop()
    assert first.serving is not None
    assert first.serving.admin is not None
    owner = site.pki.issue(Role.OWNER, "alice")
    connection = [
        *("--admin", first.serving.admin, "--tls-cert", str(owner.cert), "--tls-key", str(owner.key)),
        *("--admin-ca", str(site.pki.owner_ca)),
    ]
    keys = await asyncio.to_thread(_owner, "keys", *connection)
    kept = site.folder / "keys.json"
    kept.write_text(keys)
    told = json.loads(await asyncio.to_thread(_owner, "audit", "verify", "--json", "--jwks", str(kept), *connection))
    assert told["records"] >= told["covered"] > 0
    return dict(read_key_set(keys.encode()))


def _owner(*words: str) -> str:
    done = subprocess.run(
        [*script("sevattest"), "owner", *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


async def _evidence(plan: Plan, tally: Tally, store: SqlStore, keys: dict[str, Any]) -> Evidence:
    records: list[ChainedRecord] = []
    while page := await store.records(None, after=len(records), limit=1000):
        records += page
    return Evidence(
        plan=plan,
        launches=await store.launches(LaunchFilter(grant=GRANT), before=None, limit=1_000_000),
        ledger=await store.ledger(GRANT),
        records=records,
        checkpoints=[each.token for each in await store.checkpoints(after=0, limit=1_000_000)],
        keys=keys,
        answers=list(tally.answers.values()),
        samples=tuple(tally.samples),
    )


def report(plan: Plan, tally: Tally, evidence: Evidence) -> list[str]:
    """The run in a few lines."""
    ends = ", ".join(f"{len(evidence.ended(end))} {end}" for end in ("released", "refused", "abandoned", "expired"))
    store = "PostgreSQL" if plan.replicas > 1 else "SQLite"
    told = [f"{count} {what}" for what, count in sorted(tally.counts.items())]
    most = max((rows for rows, _, _ in evidence.samples), default=0)
    kept = f"{len(evidence.records)} audit records, {len(evidence.checkpoints)} checkpoints"
    return [
        f"{store}, seed {plan.seed}, {tally.seconds:.1f} seconds",
        f"{plan.callers} callers, {plan.replicas} verifiers, {plan.launches} launches granted, {plan.at_once} at once",
        f"{len(evidence.launches)} launches: {ends}; {kept}; {len(evidence.samples)} samples, up to {most} open",
        f"seen by those who made it happen: {', '.join(told)}",
    ]
