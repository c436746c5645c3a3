"""Callers as orchestrators are: they begin, measure and release, repeat what they do not know the end of, and die."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from uuid import uuid4

from common.errors import (
    LimitExceeded,
    OutcomeUnknown,
    Reason,
    Refused,
    SevattestError,
    Unavailable,
    WrongState,
)
from common.rpc.client import call
from emulator import channel as psp
from sevattest.v1 import platform_pb2, reason_pb2, verifier_service_pb2
from tests.hammer.plan import GRANT, Answer, Plan, Tally
from tests.support.chains import SyntheticPlatform
from tests.support.documents import SECRET

_TIMEOUT_S = 10.0
_WAIT_S = (0.02, 0.8)  # before a repeat: the first time at least, and at most
_FIRMWARE = platform_pb2.FirmwareVersion(api_major=1, api_minor=55, build=24)


class Verifiers(Protocol):
    """Where callers call."""

    def stub(self, name: str, draw: random.Random) -> Any:
        """The stub of an orchestrator at any of the replicas, whether it is up or not."""
        ...


class Exhausted(Exception):
    """The grant is used up: there is nothing left to do."""


class Over(Exception):
    """This launch has ended before its caller was done with it."""


@dataclass(kw_only=True)
class Caller:
    """One caller.

    Attributes:
        name: of the orchestrator that it is a part of.
        draw: what it decides by.
        plan: the run.
        tally: where it tells what it did.
        verifiers: whom it calls.
        platform: its host's.
        digest: that a good guest has.
    """

    name: str
    draw: random.Random
    plan: Plan
    tally: Tally
    verifiers: Verifiers
    platform: SyntheticPlatform
    digest: bytes

    async def work(self) -> None:
        """Launch guests until the grant is used up."""
        while True:
            try:
                await self._launch()
            except Over:
                self.tally.add("overtaken")
            except Exhausted:
                self.tally.add("told that the grant is used up")
                return

    async def _launch(self) -> None:
        number, begun = await self._begin()
        await asyncio.sleep(self.draw.uniform(*self.plan.boot))
        fate = self.plan.fates[number] if number < len(self.plan.fates) else "release"
        if fate == "die":
            self.tally.add("deaths")
        elif fate == "die late":
            self.tally.add("deaths with a release under way")
            await self._die(begun)
        elif fate == "give up":
            await self._abandon(begun)
        elif fate == "lie":
            await self._lie(begun)
        else:
            await self._release(begun)

    # The steps.

    async def _begin(self) -> tuple[int, Any]:
        """A launch, and how many were begun before it."""
        request = verifier_service_pb2.BeginLaunchRequest(
            request_id=str(uuid4()),
            platform=platform_pb2.PlatformEvidence(chain=self.platform.chain.to_bytes()),
            workload="web",
            grant=GRANT,
        )
        try:
            begun = await self._answered("BeginLaunch", request)
        except Refused as error:
            if error.reason is Reason.GRANT_EXHAUSTED:
                raise Exhausted from None
            raise
        number = self.tally.counts["begun"]
        self.tally.add("begun")
        if self.draw.random() < 0.1:
            again = await self._answered("BeginLaunch", request)
            self.tally.add("repeats")
            assert (again.godh, again.session) == (begun.godh, begun.session)
        return number, begun

    async def _release(self, begun: Any) -> None:
        """Hand in a measurement, or two of the same launch at once, of which one at most gets a packet."""
        count = 2 if self.draw.random() < 0.3 else 1
        won = await asyncio.gather(*(self._hand_in(begun) for _ in range(count)))
        if not any(won):
            raise Over
        if count == 2:
            self.tally.add("races")
        if self.draw.random() < 0.2 and await self._hand_in(begun):
            raise AssertionError("a second measurement was released")

    async def _hand_in(self, begun: Any) -> bool:
        """Hand in a new measurement; whether there was a packet for it."""
        keys, blob = self._measure(begun, self.digest)
        request = _release_request(begun, blob)
        answer = self.tally.answers.setdefault(begun.launch.launch_id, Answer(launch_id=begun.launch.launch_id))
        try:
            released = await self._answered("ReleaseSecret", request)
        except Over:
            return False
        _note(answer, released)
        self.tally.add("answered with a packet")
        table = psp.open_packet(
            keys,
            header=released.header,
            payload=released.payload,
            guest_length=len(released.payload),
            measurement=blob[:32],
        )
        answer.opened = SECRET in table
        if self.draw.random() < 0.3:
            _note(answer, await self._answered("ReleaseSecret", request))
            self.tally.add("repeats")
        return True

    async def _lie(self, begun: Any) -> None:
        _, blob = self._measure(begun, bytes(32))
        try:
            await self._answered("ReleaseSecret", _release_request(begun, blob))
        except Refused as error:
            if error.reason is not Reason.MEASUREMENT_REFUSED:
                raise
        else:
            raise AssertionError("a wrong measurement was released")
        self.tally.add("lies refused")

    async def _abandon(self, begun: Any) -> None:
        request = verifier_service_pb2.AbandonLaunchRequest(
            request_id=str(uuid4()), launch_id=begun.launch.launch_id, reason=reason_pb2.REASON_GUEST_GONE
        )
        await self._answered("AbandonLaunch", request)

    async def _die(self, begun: Any) -> None:
        """Go away with a release under way, of which nobody here learns the end."""
        _, blob = self._measure(begun, self.digest)
        stub = self.verifiers.stub(self.name, self.draw)
        under_way = stub.ReleaseSecret(_release_request(begun, blob), timeout=_TIMEOUT_S)
        await asyncio.sleep(self.draw.uniform(0, 0.02))
        under_way.cancel()

    def _measure(self, begun: Any, digest: bytes) -> tuple[psp.Channel, bytes]:
        keys = psp.open_channel(
            pdh_key=self.platform.keys.pdh, godh=begun.godh, session=begun.session, policy=begun.policy
        )
        nonce = os.urandom(16)
        return keys, psp.measure(keys.tik, (1, 55), 24, begun.policy, digest, nonce) + nonce

    # Calling.

    async def _answered(self, method: str, request: Any) -> Any:
        """The answer to a request, which is repeated as it is until there is one.

        Raises:
            Over: the launch has ended.
            SevattestError: any other refusal.
        """
        wait = _WAIT_S[0]
        while True:
            stub = self.verifiers.stub(self.name, self.draw)
            try:
                return await call(getattr(stub, method), request, timeout=_TIMEOUT_S, mutating=True)
            except (Unavailable, OutcomeUnknown) as error:
                self.tally.add(f"retries after {error.reason}")
            except LimitExceeded as error:
                self.tally.add(f"waits for {error.reason}")
            except WrongState as error:
                if error.reason not in _ENDS:
                    raise
                raise Over from error
            await asyncio.sleep(self.draw.uniform(wait / 2, wait))
            wait = min(wait * 2, _WAIT_S[1])


# What may have become of a launch while its caller repeated itself.
_ENDS = frozenset({Reason.LAUNCH_EXPIRED, Reason.ALREADY_RELEASED})


def _release_request(begun: Any, blob: bytes) -> Any:
    return verifier_service_pb2.ReleaseSecretRequest(
        request_id=str(uuid4()), launch_id=begun.launch.launch_id, measurement=blob, firmware=_FIRMWARE
    )


def _note(answer: Answer, released: Any) -> None:
    answer.packets.add(released.header + released.payload)
    answer.receipts.add(released.receipt)


async def all_at_work(callers: Sequence[Caller], stopped: Callable[[], None]) -> None:
    """Let all callers work until each was told that the grant is used up; the first error ends them all."""
    try:
        async with asyncio.TaskGroup() as group:
            for caller in callers:
                group.create_task(caller.work())
    except* SevattestError as errors:
        raise errors.exceptions[0] from None
    finally:
        stopped()
