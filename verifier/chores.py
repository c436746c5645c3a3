"""What a verifier does by itself, beside its calls: each chore goes on until it is cancelled, whatever fails.

All replicas do the same chores; what two do at once is done once, by compare-and-set in the store.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import NoReturn

from common.amd.kds import KeyService
from common.audit.chain import Head
from common.audit.checkpoint import checkpoint_claims
from common.audit.jws import CHECKPOINT_TYPE
from common.errors import SevattestError
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
_REWRAP_BATCH = 100
# Where nothing is left to re-wrap; new keys come with a SIGHUP, which wakes the chore.
_REWRAP_PAUSE_S = 60.0


class Checkpoints:
    """Signs the head of the audit log, now and then."""

    def __init__(self, *, store: Store, signer: Signer, issuer: str, time: Timekeeper, config: AuditConfig) -> None:
        self._store = store
        self._signer = signer
        self._issuer = issuer
        self._time = time
        self._config = config
        self._signed = 0  # number of the last record that is known to be signed
        self._clock = asyncio.get_running_loop().time
        self._last = float("-inf")

    async def maybe(self) -> None:
        """Sign the head if enough records or enough time have passed since the last one.

        Raises:
            Unavailable: the store has no answer.
        """
        number, digest = await self._store.head()
        new = number - self._signed
        due = new >= self._config.checkpoint_records
        due |= new > 0 and self._clock() - self._last >= self._config.checkpoint_interval
        if due:
            await self._sign(Head(number=number, hash=digest))

    async def finish(self) -> None:
        """Sign the head, where it is not signed yet: a service that stops leaves nothing unsigned."""
        number, digest = await self._store.head()
        if number > self._signed:
            await self._sign(Head(number=number, hash=digest))

    async def _sign(self, head: Head) -> None:
        claims = checkpoint_claims(head, time=await self._time.now(), issuer=self._issuer)
        token = self._signer.sign(claims, typ=CHECKPOINT_TYPE)
        await self._store.keep_checkpoint(Checkpoint(number=head.number, token=token))
        self._signed, self._last = head.number, self._clock()


async def sweep(
    *,
    broker: Broker,
    store: Store,
    time: Timekeeper,
    sealing: SealingKey,
    checkpoints: Checkpoints,
    renew: Callable[[], Awaitable[object]],
    interval: float,
    ready: Callable[[str, bool], None],
    log: Log,
) -> NoReturn:
    """Ends launches whose time ran out, erases packets a day after release, signs the log.

    Watches what no launch goes on without, too: the store, the clock, the sealing key.
    """

    async def tend() -> None:
        await broker.expire_overdue()
        await store.erase_packets(await time.now() - REPEATS)
        await store.flush_erased()
        await store.check()
        await checkpoints.maybe()
        await renew()

    async def seal() -> None:
        sealing.seal(b"", b"sevattest readiness")  # kept nowhere

    watched: tuple[tuple[str, str, Callable[[], Awaitable[object]]], ...] = (
        ("store", "store.unavailable", tend),
        ("clock", "clock.behind", time.now_for_decisions),
        ("keys", "keys.unavailable", seal),
    )
    while True:
        for cause, event, look in watched:
            try:
                await look()
                ready(cause, True)  # noqa: FBT003 -- a cause and whether it holds
            except SevattestError as error:
                ready(cause, False)  # noqa: FBT003 -- the same
                log.error(event, error=error)  # noqa: TRY400 -- our log's own method
                break  # the next one may need it
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
    """Learns the keys behind denied chip ids: at start, when the list changes, and again where there was no answer.

    Apart from the sweep: a key service that is slow to answer must not keep spent keys on the disk.
    """
    while True:
        wake.clear()
        complete = await denied.resolve(service, roots, log)
        with suppress(TimeoutError):
            async with asyncio.timeout(None if complete else _RESOLVE_AGAIN_S):
                await wake.wait()
