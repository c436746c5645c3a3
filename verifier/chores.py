"""What a verifier does by itself, beside its calls: each chore goes on until it is cancelled, whatever fails.

All replicas do the same chores; what two do at once is done once, by compare-and-set in the store.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from datetime import datetime
from typing import NoReturn

import msgspec

from common.amd.kds import KeyService
from common.audit.chain import Head, broken, verify_chain
from common.audit.checkpoint import checkpoint_claims, read_checkpoint
from common.audit.jws import CHECKPOINT_TYPE, read_key_set
from common.errors import InvalidInput, Reason, Refused, SevattestError
from common.sev.certs.roots import Root
from common.telemetry.log import Log
from verifier.config import AuditConfig
from verifier.keys.base import SealingKey
from verifier.keys.rewrap import Rewrap
from verifier.keys.signer import Signer
from verifier.launches.broker import Broker
from verifier.launches.platforms import DenyList
from verifier.launches.release import REPEATS
from verifier.launches.timekeeper import Timekeeper
from verifier.store.base import Store
from verifier.store.rows import Checkpoint

# A key service that did not answer is asked again for the deny-list's chips after this time.
_RESOLVE_AGAIN_S = 600.0
# … and one that did not know some of them (a folder gets its files by hand; a service that is down says so, too).
RESOLVE_UNKNOWN_S = 3600.0
_REWRAP_BATCH = 100
_RECORDS = 200  # verified at once before a checkpoint: some milliseconds
# Where nothing is left to re-wrap; new keys come with a SIGHUP, which wakes the chore.
_REWRAP_PAUSE_S = 60.0
# Whatever was looked at: it is the store that did not answer, and nothing is said of what could not be read.
_STORE = frozenset({Reason.STORE_UNAVAILABLE, Reason.OUTCOME_UNKNOWN})
_AHEAD = "the clock is, or just was, far ahead of what others store; or theirs is behind"


class Checkpoints:
    """Signs the head of the audit log, now and then.

    What was signed last is remembered, and nothing is signed that does not follow from it: who has the database alone
    could otherwise write the log anew and have that signed. Nor does a checkpoint count as signed that is not kept:
    somebody could have put another one into its place.

    The time of a checkpoint is the log's own: so all replicas sign the same for the same record, and never an earlier
    one for a later record, whatever their clocks say at the moment.

    Attributes:
        number: of the last record, as of the last look; None before the first.
        signed: the head that this process signed last; None before the first.
        signed_time: when it was signed, by this process's time.
    """

    def __init__(self, *, store: Store, signer: Signer, issuer: str, time: Timekeeper, config: AuditConfig) -> None:
        """Take the means. What the log is at first is believed."""
        self._store = store
        self._signer = signer
        self._issuer = issuer
        self._time = time
        self._config = config
        self.number: int | None = None
        self.signed: Head | None = None
        self.signed_time: datetime | None = None
        self._latest: datetime | None = None  # the log's time where it was signed last
        self._keys = read_key_set(msgspec.json.encode(signer.jwks()))
        self._clock = asyncio.get_running_loop().time
        self._last = float("-inf")

    async def maybe(self) -> None:
        """Sign the head if enough records or enough time have passed since the last one.

        Raises:
            Unavailable: the store has no answer.
            Refused: the log is not the one that was signed, and it is not signed; or the checkpoint is not kept
                (BAD_SIGNATURE).
        """
        new = await self._new()
        due = new >= self._config.checkpoint_records
        due |= new > 0 and self._clock() - self._last >= self._config.checkpoint_interval
        if due:
            await self._sign()

    async def finish(self) -> None:
        """Sign the head, where it is not signed yet: a service that stops leaves nothing unsigned.

        Raises:
            Unavailable, Refused: see `maybe`.
        """
        if await self._new() > 0:
            await self._sign()

    async def _new(self) -> int:
        """How many records there are since this process signed last."""
        number, _, _ = await self._store.head()
        self.number = number
        signed = 0 if self.signed is None else self.signed.number
        if number < signed:
            raise broken(number + 1, f"is missing: the log was signed up to record {signed}")
        return number - signed

    async def _head(self) -> tuple[Head, datetime]:
        """Where the log stands and its latest time, as its records lead there from what was signed last."""
        if self.signed is None or self._latest is None:
            number, digest, latest = await self._store.head()
            if latest is None:
                raise ValueError("a log with records has a time")
            return Head(number=number, hash=digest), latest
        head, time, full = self.signed, self._latest, True
        while full:
            found = await self._store.records(None, after=head.number, limit=_RECORDS)
            head, full = verify_chain((each.link for each in found), head), len(found) == _RECORDS
            time = max([time, *(each.record.time for each in found)])
        return head, time

    async def _sign(self) -> None:
        (head, latest), now = await self._head(), await self._time.now()
        token = self._signer.sign(checkpoint_claims(head, time=latest, issuer=self._issuer), typ=CHECKPOINT_TYPE)
        if not await self._store.keep_checkpoint(Checkpoint(number=head.number, token=token)):
            await self._require_kept(head)
        self.signed, self._latest, self.signed_time, self._last = head, latest, now, self._clock()

    async def _require_kept(self, head: Head) -> None:
        """Return if the checkpoint of another replica, which stands in the place of ours, says the same."""
        for kept in await self._store.checkpoints(after=head.number - 1, limit=1):
            with suppress(InvalidInput, Refused):
                if read_checkpoint(kept.token, self._keys).head == head:
                    return
        raise broken(head.number, "was signed, and its checkpoint is not kept: another one stands there")


async def sweep(
    *,
    broker: Broker,
    store: Store,
    time: Timekeeper,
    sealing: SealingKey,
    checkpoints: Checkpoints,
    documents: Callable[[], Awaitable[object]],
    interval: float,
    ready: Callable[[str, bool], None],
    log: Log,
) -> NoReturn:
    """Ends launches whose time ran out, erases packets a day after release, signs the log.

    Watches what no launch goes on without, too: the store, the clock, the sealing key, a log that is the one it signed,
    documents that are as they were sealed (`documents` reads them again). Each is looked at whatever became of the
    others: who has broken one must not have the next go unseen.
    """

    async def tend() -> None:
        await broker.expire_overdue()
        await store.erase_packets(await time.now() - REPEATS)
        await store.flush_erased()
        await store.check()

    async def compare() -> None:
        ahead = await time.ahead()
        if ahead is not None:
            log.warning("clock.ahead", text=_AHEAD, seconds=int(ahead.total_seconds()))
        await time.now_for_decisions()

    async def seal() -> None:
        sealing.seal(b"", b"sevattest readiness")  # kept nowhere

    watched: tuple[tuple[str, str, Callable[[], Awaitable[object]]], ...] = (
        ("store", "store.unavailable", tend),
        ("clock", "clock.behind", compare),
        ("keys", "keys.unavailable", seal),
        ("audit", "audit.broken", checkpoints.maybe),
        ("documents", "documents.unavailable", documents),
    )
    while True:
        said = set[tuple[str, str]]()
        for cause, event, look in watched:
            try:
                await look()
                ready(cause, True)  # noqa: FBT003 -- a cause and whether it holds
            except SevattestError as error:
                ready(cause, False)  # noqa: FBT003 -- the same
                line = ("store.unavailable" if error.reason in _STORE else event, error.message)
                if line not in said:  # a store that is away is so for all of them
                    log.error(line[0], error=error)  # noqa: TRY400 -- our log's own method
                said.add(line)
        await asyncio.sleep(interval)


async def rewrap(chore: Rewrap, wake: asyncio.Event, log: Log) -> NoReturn:
    """Seals again under the key that seals now what is sealed under older ones."""
    moved = 0
    while True:
        wake.clear()
        try:
            while count := await chore.some(_REWRAP_BATCH):
                moved += count
            if moved:
                log.info("keys.rewrapped", blobs=moved)
                moved = 0
        except SevattestError as error:
            log.error("keys.rewrap_failed", error=error)  # noqa: TRY400 -- the same
        with suppress(TimeoutError):
            async with asyncio.timeout(_REWRAP_PAUSE_S):
                await wake.wait()


async def resolve_denied(
    denied: DenyList, service: KeyService, roots: Sequence[Root], wake: asyncio.Event, log: Log
) -> NoReturn:
    """Learns the keys behind denied chip ids: at start, when the list changes, and again where there was no key.

    Apart from the sweep: a key service that is slow to answer must not keep spent keys on the disk.
    """
    while True:
        wake.clear()
        complete = await denied.resolve(service, roots, log)
        with suppress(TimeoutError):
            async with asyncio.timeout(RESOLVE_UNKNOWN_S if complete else _RESOLVE_AGAIN_S):
                await wake.wait()
