"""The whole of sevattest as real processes, for integration tests: software platform, verifier, agent, mutual TLS.

The processes are those of the demonstration (`orchestrator.demo.stack`); what is here gives them a short folder, drives
launches against them, and crashes them where a test wants it.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar
from uuid import UUID, uuid4

from common.errors import OutcomeUnknown, Reason, SevattestError
from common.ids import step_request_id
from common.rpc.client import open_channel
from common.rpc.tls import ClientTls
from emulator.keys import DEFAULT_GENERATION
from orchestrator.demo.site import ORCHESTRATOR, WORKLOAD, HostPlay, Site
from orchestrator.demo.stack import Stack
from orchestrator.demo.story import GuestSecret, read_secrets
from orchestrator.drivers.agent import AgentHost
from orchestrator.drivers.base import Evidence, Measured, Packet, Session
from orchestrator.drivers.verifier import VerifierOwner
from orchestrator.flow import Launch, Order, Outcome, Patience, Step
from tests.support.platform import give_chip

_T = TypeVar("_T")

# Services come back within a second or two; asking more often than a person would keeps the tests short.
PATIENCE = Patience(first=0.1, longest=0.5, attempts=40)


@contextlib.contextmanager
def running_stack(
    guests: dict[str, HostPlay], *, impostor: bool = False, edit: Callable[[Site], None] = lambda _site: None
) -> Iterator[Stack]:
    """All processes, ready; ended and cleared away afterwards.

    Args:
        guests: the agent's guests and what the host starts them from.
        impostor: the host shows a platform whose root the owner does not name.
        edit: changes configurations and documents before the services start.
    """
    # Not tmp_path: a unix socket's path has at most 107 bytes.
    root = Path(tempfile.mkdtemp(prefix="sevattest-test-"))
    try:
        with Stack(Site(root=root)) as stack:
            give_chip(stack.site.platform, DEFAULT_GENERATION)
            stack.prepare(impostor=impostor)
            stack.site.write_host(guests, stack.site.impostor if impostor else stack.site.platform)
            edit(stack.site)
            stack.start_services(guests)
            yield stack
    finally:
        shutil.rmtree(root, ignore_errors=True)


@dataclass
class Sides:
    """Both services as the orchestrator sees them, and what a test asks of them."""

    stack: Stack
    host: AgentHost
    owner: VerifierOwner

    def launch(self, order: Order, *, crash: Crash | None = None) -> Launch:
        """The flow over both services, with crashes on the way if asked for."""
        if crash is None:
            return Launch(host=self.host, owner=self.owner, order=order, patience=PATIENCE)
        host, owner = CrashingHost(self.host, crash), CrashingOwner(self.owner, crash)
        return Launch(host=host, owner=owner, order=order, patience=PATIENCE)

    async def steps(self, order: Order, last: Step) -> Session | None:
        """Take the steps up to `last` as an orchestrator that is then killed: nobody gives anything up."""
        taken = list(Step)[: list(Step).index(last) + 1]
        evidence = await self.host.export_chain(within=20)
        if Step.BEGIN not in taken:
            return None
        session = await self.owner.begin(evidence, order.workload, None, request_id=order.request_id, within=20)
        launch_id = session.launch_id
        packet: Packet | None = None
        measured: Measured | None = None
        for step in taken[2:]:
            request_id = step_request_id(launch_id, step)
            match step:
                case Step.START:
                    await self.host.start(session, order.guest, request_id=request_id, within=20)
                case Step.MEASURE:
                    measured = await self.host.measure(launch_id, within=20)
                case Step.RELEASE:
                    assert measured
                    packet = await self.owner.release(launch_id, measured, request_id=request_id, within=20)
                case Step.INJECT:
                    assert packet
                    await self.host.inject(launch_id, packet, request_id=request_id, within=20)
                case _:
                    await self.host.resume(launch_id, request_id=request_id, within=20)
        return session

    async def end(self, outcome: Outcome | Session | None) -> None:
        """End the guest of a launch, so that the next test finds it free."""
        session = outcome.session if isinstance(outcome, Outcome) else outcome
        if session is not None:
            with contextlib.suppress(SevattestError):
                await self.host.abort(session.launch_id, request_id=uuid4(), within=20)

    def secrets_read(self, guest: str, *, wait: bool = False) -> list[GuestSecret]:
        """The secrets that the guest wrote to its serial line; `wait` until it has said something."""
        ends = time.monotonic() + 30
        while wait and not self.stack.serial(guest).endswith("\n") and time.monotonic() < ends:
            time.sleep(0.01)
        return read_secrets(self.stack.serial(guest))


@contextlib.asynccontextmanager
async def sides(stack: Stack) -> AsyncIterator[Sides]:
    """Channels to both services with the orchestrator's identity."""
    tls = orchestrator_tls(stack.site)
    async with (
        open_channel(stack.agent.where, tls) as agent,
        open_channel(stack.verifier.where, replace(tls, server_ca=stack.site.pki / "owner-ca.pem")) as verifier,
    ):
        yield Sides(stack=stack, host=AgentHost(agent), owner=VerifierOwner(verifier))


def orchestrator_tls(site: Site) -> ClientTls:
    """The orchestrator's identity, towards the agent."""
    name = f"orchestrator-{ORCHESTRATOR}"
    return ClientTls(
        cert=site.pki / f"{name}.pem", key=site.pki / f"{name}.key", server_ca=site.pki / "datacenter-ca.pem"
    )


def order(guest: str, timeout: float = 60.0) -> Order:
    """A launch of the demonstration's workload under a request id of its own."""
    return Order(guest=guest, workload=WORKLOAD, request_id=uuid4(), timeout=timeout)


@dataclass
class Crash:
    """What to do around which steps, each once.

    Attributes:
        before: called before the step's request is sent.
        after: called after the step's answer has come; the flow is then told that no answer came.
        packets: every packet that the owner has answered with.
    """

    before: dict[Step, Callable[[], None]] = field(default_factory=dict)
    after: dict[Step, Callable[[], None]] = field(default_factory=dict)
    packets: set[tuple[bytes, bytes]] = field(default_factory=set)

    async def around(self, step: Step, call: Callable[[], Awaitable[_T]]) -> _T:
        """Make the call, with what was asked for before and after it."""
        if act := self.before.pop(step, None):
            act()
        answer = await call()
        if act := self.after.pop(step, None):
            act()
            raise OutcomeUnknown(Reason.OUTCOME_UNKNOWN, "the service was killed before its answer came")
        return answer


class CrashingHost:
    """A host whose services crash on the way."""

    def __init__(self, host: AgentHost, crash: Crash) -> None:
        self._host, self._crash = host, crash

    async def export_chain(self, *, within: float) -> Evidence:
        return await self._crash.around(Step.EXPORT, lambda: self._host.export_chain(within=within))

    async def start(self, session: Session, guest: str, *, request_id: UUID, within: float) -> None:
        await self._crash.around(
            Step.START, lambda: self._host.start(session, guest, request_id=request_id, within=within)
        )

    async def measure(self, launch_id: UUID, *, within: float) -> Measured:
        return await self._crash.around(Step.MEASURE, lambda: self._host.measure(launch_id, within=within))

    async def inject(self, launch_id: UUID, packet: Packet, *, request_id: UUID, within: float) -> None:
        await self._crash.around(
            Step.INJECT, lambda: self._host.inject(launch_id, packet, request_id=request_id, within=within)
        )

    async def resume(self, launch_id: UUID, *, request_id: UUID, within: float) -> None:
        await self._crash.around(
            Step.RESUME, lambda: self._host.resume(launch_id, request_id=request_id, within=within)
        )

    async def abort(self, launch_id: UUID, *, request_id: UUID, within: float) -> None:
        await self._host.abort(launch_id, request_id=request_id, within=within)


class CrashingOwner:
    """An owner whose services crash on the way."""

    def __init__(self, owner: VerifierOwner, crash: Crash) -> None:
        self._owner, self._crash = owner, crash

    async def begin(
        self, evidence: Evidence, workload: str, grant: str | None, *, request_id: UUID, within: float
    ) -> Session:
        return await self._crash.around(
            Step.BEGIN, lambda: self._owner.begin(evidence, workload, grant, request_id=request_id, within=within)
        )

    async def release(self, launch_id: UUID, measured: Measured, *, request_id: UUID, within: float) -> Packet:
        async def release() -> Packet:
            packet = await self._owner.release(launch_id, measured, request_id=request_id, within=within)
            self._crash.packets.add((packet.header, packet.payload))
            return packet

        return await self._crash.around(Step.RELEASE, release)

    async def abandon(self, launch_id: UUID, reason: Reason | None, *, request_id: UUID, within: float) -> None:
        await self._owner.abandon(launch_id, reason, request_id=request_id, within=within)
