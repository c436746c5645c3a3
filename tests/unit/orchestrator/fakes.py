"""Both sides of a launch as fakes: they keep state as the services do, and fail where a test asks them to."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from uuid import UUID, uuid5

from common.errors import InvalidInput, NotFound, OutcomeUnknown, Reason, Refused, SevattestError, WrongState
from common.sev.measurement import FirmwareVersion
from orchestrator.drivers.base import Evidence, Measured, Packet, Session

FIRMWARE = FirmwareVersion(1, 55, 24)
EVIDENCE = Evidence(chain=bytes(8336), chip_id=bytes(64))
_IDS = UUID("8f6b2b0e-6ef4-4a7e-9d0c-0d5b3f6f7a10")


@dataclass
class Faults:
    """Errors to come, by call: `before` the call has any effect, or `after` it (the answer is lost).

    A call in `hanging` has its effect and never answers; `hangs` says that one does.
    """

    before: dict[str, list[SevattestError]] = field(default_factory=dict)
    after: dict[str, list[SevattestError]] = field(default_factory=dict)
    hanging: set[str] = field(default_factory=set)
    hangs: asyncio.Event = field(default_factory=asyncio.Event)
    calls: list[str] = field(default_factory=list)

    async def enter(self, call: str) -> None:
        self.calls.append(call)
        await asyncio.sleep(0)
        if queue := self.before.get(call):
            raise queue.pop(0)

    async def leave(self, call: str) -> None:
        if call in self.hanging:
            self.hangs.set()
            await asyncio.Event().wait()
        if queue := self.after.get(call):
            raise queue.pop(0)


@dataclass
class FakeOwner:
    """A verifier: opens launches, releases each at most once, answers a repeat as it answered the first."""

    faults: Faults = field(default_factory=Faults)
    launches: dict[UUID, str] = field(default_factory=dict)
    claims: dict[UUID, Reason | None] = field(default_factory=dict)
    packets: list[Packet] = field(default_factory=list)
    expected: bytes | None = None
    _begun: dict[UUID, tuple[tuple[object, ...], Session]] = field(default_factory=dict)
    _released: dict[UUID, tuple[tuple[object, ...], Packet]] = field(default_factory=dict)

    async def begin(
        self, evidence: Evidence, workload: str, grant: str | None, *, request_id: UUID, within: float
    ) -> Session:
        assert within > 0
        await self.faults.enter("begin")
        content = (evidence, workload, grant)
        if request_id not in self._begun:
            launch_id = uuid5(_IDS, str(len(self._begun)))
            self.launches[launch_id] = "open"
            self._begun[request_id] = (
                content,
                Session(
                    launch_id=launch_id,
                    workload_version="2",
                    generation="emulated",
                    fingerprint="ab" * 32,
                    policy=0x0F,
                    godh=bytes(2084),
                    blob=bytes(128),
                    pdh_fingerprint=bytes(32),
                ),
            )
        before, session = self._begun[request_id]
        if before != content:
            raise InvalidInput(Reason.REQUEST_ID_REUSED, "the request id was used for another launch")
        await self.faults.leave("begin")
        return session

    async def release(self, launch_id: UUID, measured: Measured, *, request_id: UUID, within: float) -> Packet:
        assert within > 0
        await self.faults.enter("release")
        if launch_id not in self.launches:
            raise NotFound(Reason.NOT_FOUND, "there is no such launch")
        content = (request_id, measured)
        if launch_id in self._released:
            before, packet = self._released[launch_id]
            if before != content:
                raise WrongState(Reason.ALREADY_RELEASED, "the launch has released its secrets")
        elif self.launches[launch_id] != "open":
            raise WrongState(Reason.LAUNCH_ABANDONED, "the launch was given up")
        elif self.expected not in {None, measured.blob}:
            self.launches[launch_id] = "refused"
            raise Refused(Reason.MEASUREMENT_REFUSED, "the measurement is not one that the owner expects", audit_id="7")
        else:
            packet = Packet(header=bytes(52), payload=bytes(16), receipt=json.dumps({"launch_id": str(launch_id)}))
            self.launches[launch_id] = "released"
            self.packets.append(packet)
            self._released[launch_id] = (content, packet)
        await self.faults.leave("release")
        return packet

    async def abandon(self, launch_id: UUID, reason: Reason | None, *, request_id: UUID, within: float) -> None:
        assert request_id.version == 5
        assert within > 0
        await self.faults.enter("abandon")
        if self.launches.get(launch_id) != "open":
            raise WrongState(Reason.WRONG_STATE, "the launch has ended")
        self.launches[launch_id] = "abandoned"
        self.claims[launch_id] = reason


@dataclass
class FakeHost:
    """A host agent: one machine a launch, resumed only with its secret."""

    faults: Faults = field(default_factory=Faults)
    machines: dict[UUID, str] = field(default_factory=dict)
    spawned: int = 0
    blob: bytes = b"m" * 48
    _seen: dict[tuple[str, UUID], UUID] = field(default_factory=dict)

    async def export_chain(self, *, within: float) -> Evidence:
        assert within > 0
        await self.faults.enter("export")
        await self.faults.leave("export")
        return EVIDENCE

    async def start(self, session: Session, guest: str, *, request_id: UUID, within: float) -> None:
        assert guest
        assert within > 0
        await self._change("start", session.launch_id, request_id, (None,), "paused")

    async def measure(self, launch_id: UUID, *, within: float) -> Measured:
        assert within > 0
        await self.faults.enter("measure")
        if launch_id not in self.machines:
            raise NotFound(Reason.NOT_FOUND, "there is no such launch")
        if self.machines[launch_id] == "paused":
            self.machines[launch_id] = "measured"
        await self.faults.leave("measure")
        return Measured(blob=self.blob, firmware=FIRMWARE)

    async def inject(self, launch_id: UUID, packet: Packet, *, request_id: UUID, within: float) -> None:
        assert len(packet.header) == 52
        assert within > 0
        await self._change("inject", launch_id, request_id, ("measured",), "injected")

    async def resume(self, launch_id: UUID, *, request_id: UUID, within: float) -> None:
        assert within > 0
        await self._change("resume", launch_id, request_id, ("injected",), "resumed")

    async def abort(self, launch_id: UUID, *, request_id: UUID, within: float) -> None:
        assert request_id.version == 5
        assert within > 0
        await self.faults.enter("abort")
        if launch_id not in self.machines:
            raise NotFound(Reason.NOT_FOUND, "there is no such launch")
        self.machines[launch_id] = "aborted"

    async def _change(
        self, call: str, launch_id: UUID, request_id: UUID, allowed: tuple[str | None, ...], then: str
    ) -> None:
        await self.faults.enter(call)
        if (call, launch_id) not in self._seen:
            if self.machines.get(launch_id) not in allowed:
                raise WrongState(Reason.WRONG_STATE, f"the launch is {self.machines.get(launch_id)}")
            self._seen[call, launch_id] = request_id
            self.machines[launch_id] = then
            self.spawned += call == "start"
        elif self._seen[call, launch_id] != request_id:
            raise InvalidInput(Reason.REQUEST_ID_REUSED, "another request did this")
        await self.faults.leave(call)


@dataclass
class FakeTime:
    """A clock that only sleeping moves."""

    now: float = 0.0
    slept: list[float] = field(default_factory=list)

    def clock(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(0)
        self.slept.append(seconds)
        self.now += seconds


def lost() -> OutcomeUnknown:
    """The link broke in the middle of the call."""
    return OutcomeUnknown(Reason.OUTCOME_UNKNOWN, "the link broke before the answer came")


def many(make: Callable[[], SevattestError], count: int = 50) -> list[SevattestError]:
    """The same error again and again."""
    return [make() for _ in range(count)]
