"""The verifier signs where its log stands, and no log that does not follow from what it signed before."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from common.audit.chain import Head, record_hash
from common.audit.checkpoint import checkpoint_claims, read_checkpoint, verify_checkpoints
from common.audit.jws import CHECKPOINT_TYPE, read_key_set
from common.errors import Reason, Refused, SevattestError, Unavailable
from tests.support.desk import START, VERIFIER, Desk, desk
from tests.support.recording_log import RecordingLog
from tests.support.store_rows import audit
from verifier.chores import Checkpoints, sweep
from verifier.config import AuditConfig
from verifier.keys.signer import Signer
from verifier.launches.broker import Broker
from verifier.store.rows import Checkpoint
from verifier.store.sql_rows import AUDIT_COLUMNS
from verifier.store.sqlite_file import FILE_NAME


@pytest.fixture
async def d(tmp_path: Path) -> AsyncIterator[Desk]:
    async with desk(tmp_path) as opened:
        yield opened


def checkpoints(d: Desk) -> Checkpoints:
    """One process's, which signs every two records."""
    return Checkpoints(
        store=d.store,
        signer=d.dependencies.signer,
        issuer=VERIFIER,
        time=d.dependencies.time,
        config=AuditConfig(checkpoint_records=2, checkpoint_interval=86_400),
    )


async def record(d: Desk, count: int) -> None:
    for _ in range(count):
        await d.store.record(audit(time=d.clock.now()))


async def signed(d: Desk) -> list[int]:
    """The numbers of the records that were signed."""
    keys = read_key_set(json.dumps(d.dependencies.signer.jwks()).encode())
    tokens = [each.token for each in await d.store.checkpoints(after=0, limit=100)]
    return [each.head.number for each in verify_checkpoints(tokens, keys)]


async def times(d: Desk) -> list[datetime]:
    """When the log says that it was signed."""
    keys = read_key_set(json.dumps(d.dependencies.signer.jwks()).encode())
    found = [read_checkpoint(each.token, keys).iat for each in await d.store.checkpoints(after=0, limit=100)]
    return [datetime.fromtimestamp(iat, UTC) for iat in found]


def write_anew(d: Desk, number: int, body: str, *, head: int | None = None) -> None:
    """Change a record and all hashes after it, so that the log fits again, and take all checkpoints away.

    Args:
        d: whose log.
        number: of the record.
        body: what it gets.
        head: of the record that becomes the last one; None leaves the end where it is.
    """
    connection = sqlite3.connect(d.folder / "state" / FILE_NAME, isolation_level=None)
    try:
        for (trigger,) in connection.execute("SELECT name FROM sqlite_schema WHERE type='trigger'").fetchall():
            connection.execute(f"DROP TRIGGER {trigger}")
        connection.execute("DELETE FROM checkpoint")
        connection.execute("UPDATE audit SET body=? WHERE number=?", (body, number))
        if head is not None:
            connection.execute("DELETE FROM audit WHERE number>?", (head,))
        digest, last = bytes(32), 0
        rows = connection.execute(f"SELECT number, {AUDIT_COLUMNS} FROM audit ORDER BY number").fetchall()  # noqa: S608 -- constants
        for last, *values in rows:
            digest = record_hash(digest, last, dict(zip(AUDIT_COLUMNS.split(", "), values, strict=True)))
            connection.execute("UPDATE audit SET hash=? WHERE number=?", (digest, last))
        connection.execute("UPDATE audit_head SET number=?, hash=?", (last, digest))
    finally:
        connection.close()


async def test_the_head_is_signed_when_enough_was_recorded_and_at_the_end(
    d: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("verifier.chores._RECORDS", 2)  # so that a page is full, and the next one empty
    chore = checkpoints(d)
    await record(d, 1)
    await chore.maybe()  # the first one of a process is due at once
    for count in (1, 3, 4):
        await record(d, count)
        await chore.maybe()
    await record(d, 1)
    await chore.maybe()
    assert await signed(d) == [1, 5, 9]
    await chore.finish()
    await chore.finish()
    assert await signed(d) == [1, 5, 9, 10]
    assert (chore.number, chore.signed and chore.signed.number, chore.signed_time) == (10, 10, START)


async def test_a_log_that_was_written_anew_with_all_its_hashes_is_not_signed(d: Desk) -> None:
    chore = checkpoints(d)
    await record(d, 3)
    await chore.maybe()
    await record(d, 2)
    write_anew(d, 2, '{"nothing":"was released"}')
    await record(d, 2)
    for sign in (chore.maybe, chore.finish):
        with pytest.raises(Refused) as caught:
            await sign()
        assert caught.value.reason is Reason.BAD_SIGNATURE
        assert caught.value.fields["number"] == "4"
    assert await signed(d) == []


async def test_a_log_that_lost_what_was_signed_is_not_signed_until_it_is_that_long_again_nor_then(d: Desk) -> None:
    chore = checkpoints(d)
    await record(d, 5)
    await chore.maybe()
    write_anew(d, 1, "{}", head=2)
    for count in (1, 1, 4):  # 3 records, 4, 8
        await record(d, count)
        for sign in (chore.maybe, chore.finish):
            with pytest.raises(Refused):
                await sign()
    assert await signed(d) == []


async def test_a_clock_that_was_ahead_for_a_moment_accuses_nobody(d: Desk) -> None:
    chore = checkpoints(d)
    await record(d, 2)
    d.clock.advance(timedelta(minutes=30))
    await chore.maybe()
    d.clock.advance(timedelta(minutes=-29))
    await record(d, 2)
    await chore.maybe()
    assert await signed(d) == [2, 4]


async def test_replicas_sign_one_time_for_one_record_whichever_of_them_wrote_it(d: Desk) -> None:
    """One of them is half an hour ahead, writes a record, and the others' were under way."""
    one, other = checkpoints(d), checkpoints(d)
    await record(d, 2)
    await one.maybe()
    await d.store.record(audit(time=START))
    await d.store.record(audit(time=START + timedelta(minutes=30)))
    await other.maybe()
    await d.store.record(audit(time=START))
    await one.finish()
    await d.store.record(audit(time=START))
    await checkpoints(d).maybe()
    assert await signed(d) == [2, 4, 5, 6]
    assert await times(d) == [START, *[START + timedelta(minutes=30)] * 3]


async def test_a_log_that_was_set_back_and_went_on_is_found_with_a_kept_checkpoint(d: Desk) -> None:
    await record(d, 5)
    await checkpoints(d).maybe()
    kept = [each.token for each in await d.store.checkpoints(after=0, limit=1)]
    write_anew(d, 1, "{}", head=2)
    d.clock.advance(timedelta(minutes=11))
    await record(d, 1)
    await checkpoints(d).maybe()
    assert await signed(d) == [3]  # alone, it says nothing of it
    keys = read_key_set(json.dumps(d.dependencies.signer.jwks()).encode())
    tokens = [each.token for each in await d.store.checkpoints(after=0, limit=1)]
    with pytest.raises(Refused, match="record 5 was signed before record 3, which is older: the log was set back"):
        verify_checkpoints([*kept, *tokens], keys)


async def test_what_another_replica_recorded_and_signed_is_signed_on(d: Desk) -> None:
    one, other = checkpoints(d), checkpoints(d)
    for chore in (one, other, one, other):
        await record(d, 3)
        await chore.maybe()
    assert await signed(d) == [3, 6, 9, 12]


@pytest.mark.parametrize(
    ("error", "event"),
    [
        (Unavailable(Reason.STORE_UNAVAILABLE, "the store is full"), "store.unavailable"),
        (Refused(Reason.BAD_SIGNATURE, "record 2 does not hold"), "audit.broken"),
    ],
)
async def test_a_log_that_cannot_be_read_is_not_called_broken(
    d: Desk, monkeypatch: pytest.MonkeyPatch, error: SevattestError, event: str
) -> None:
    log, unready, looked = RecordingLog(), list[str](), asyncio.Event()

    async def fail() -> None:
        looked.set()
        raise error

    signing = checkpoints(d)
    monkeypatch.setattr(signing, "maybe", fail)
    dependencies = d.dependencies
    task = asyncio.create_task(
        sweep(
            broker=Broker(dependencies),
            store=d.store,
            time=dependencies.time,
            sealing=dependencies.sealing,
            checkpoints=signing,
            documents=d.library.look,
            interval=3600,
            ready=lambda cause, ready: None if ready else unready.append(cause),
            log=log,
        )
    )
    await looked.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert [each.name for each in log.events if each.level == "error"] == [event]
    assert unready == ["audit"]


async def plant(d: Desk, number: int, token: str) -> None:
    await d.store.keep_checkpoint(Checkpoint(number=number, token=token))


@pytest.mark.parametrize("planted", ["an earlier one", "another's", "none at all"])
async def test_a_checkpoint_that_somebody_put_into_the_place_of_the_next_is_no_checkpoint(
    d: Desk, planted: str
) -> None:
    chore = checkpoints(d)
    await record(d, 2)
    await chore.maybe()
    (earlier,) = await d.store.checkpoints(after=0, limit=2)
    claims = checkpoint_claims(Head(number=4, hash=bytes(32)), time=START, issuer=VERIFIER)
    another = Signer(ec.generate_private_key(ec.SECP256R1())).sign(claims, typ=CHECKPOINT_TYPE)
    await plant(d, 4, {"an earlier one": earlier.token, "another's": another, "none at all": "x"}[planted])
    await record(d, 2)
    for _ in range(2):  # until somebody has looked
        with pytest.raises(
            Refused, match="record 4 was signed, and its checkpoint is not kept: another one stands there"
        ):
            await chore.maybe()
    assert chore.signed is not None
    assert chore.signed.number == 2  # which is what the metrics say, too
    await record(d, 2)
    await chore.maybe()
    assert chore.signed.number == 6


async def test_the_checkpoint_of_another_replica_in_the_place_of_ours_is_as_good(d: Desk) -> None:
    one, other = checkpoints(d), checkpoints(d)
    await record(d, 2)
    for chore in (one, other):
        await chore.maybe()
        assert chore.signed is not None
        assert chore.signed.number == 2
    assert await signed(d) == [2]
