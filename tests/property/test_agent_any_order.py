"""Calls in any order, answers lost, machines dying, kills anywhere: a guest runs with its secret or not at all."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar
from uuid import UUID, uuid4

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from common.errors import SevattestError
from host_agent.hypervisors.base import MachineId
from host_agent.launches import custody
from host_agent.launches.custody import Custody
from host_agent.launches.launch import Launch, decode
from host_agent.launches.ledger import Ledger
from host_agent.launches.runner import Runner, StartRequest
from host_agent.launches.state import BEFORE_INJECTED, FINAL, PACKET_TAKEN, TRANSITIONS
from host_agent.launches.state import LaunchState as S
from host_agent.launches.supervisor import Supervisor
from tests.support.agent import ALICE, BOB, HEADER, LIMITS, POLICY, FakeDevice
from tests.support.fake_machines import FakeHypervisor, Guest, MemoryFolders, Packet
from tests.support.recording_log import RecordingLog
from tests.support.rpc import SettableClock

_T = TypeVar("_T")
DEVICE = FakeDevice()
PACKETS = [(HEADER, bytes([number]) * 16) for number in range(2)]
slots = st.integers(0, 1)
callers = st.sampled_from([ALICE, ALICE, ALICE, BOB])
faults = st.sampled_from([None, "lost", "unheard", "unheard", "refused", "dies"])
fuses = st.one_of(st.none(), st.integers(0, 2), st.integers(0, 8))


def _reachable() -> dict[S, set[S]]:
    reach = {state: {state, *events.values()} for state, events in TRANSITIONS.items()}
    for _ in S:
        reach = {state: set().union(*(reach[target] for target in targets)) for state, targets in reach.items()}
    return reach


REACHABLE = _reachable()


class Killed(BaseException):
    """The agent was killed here: nothing that it would still have done is done."""


class AnyOrder(RuleBasedStateMachine):
    """One agent, two guests, two callers."""

    @initialize()
    def begin(self) -> None:
        self.loop = asyncio.Runner()
        self.folders = MemoryFolders()
        self.hypervisor = FakeHypervisor()
        self.clock = SettableClock()
        self.orders = [self.order(f"guest{number}") for number in range(2)]
        self.seen: dict[UUID, S] = {}
        self.machines: dict[MachineId, UUID] = {}
        # Fakes die at once; there is nothing to wait for.
        self.fuse: int | None = None
        self.patience, custody._DYING = custody._DYING, 0.001
        self.call(self.boot())

    def teardown(self) -> None:
        if hasattr(self, "loop"):
            self.call(self.supervisor.close())
            custody._DYING = self.patience
            self.loop.close()

    def order(self, guest: str) -> StartRequest:
        return StartRequest(
            request_id=uuid4(),
            launch_id=uuid4(),
            guest=guest,
            policy=POLICY,
            godh=b"g" * 2084,
            session=b"s" * 128,
            pdh_fingerprint=DEVICE.pdh.fingerprint,
        )

    def observe(self, _point: str, _launch_id: UUID, /) -> None:
        """Kill the agent at the point that the fuse has come to."""
        if self.fuse is not None:
            self.fuse -= 1
            if self.fuse < 0:
                self.fuse = None
                raise Killed

    def call(self, step: Coroutine[Any, Any, _T], fuse: int | None = None) -> _T | None:
        """Run a step to its end, or to the point where the fuse ends; any typed error is an answer."""
        self.fuse = fuse
        try:
            return self.finish(step)
        except Killed:
            self.the_agent_is_killed()
            return None
        finally:
            self.fuse = None

    def finish(self, step: Coroutine[Any, Any, _T]) -> _T | None:
        """Run a step to its end; anything else than a typed error is a failure of the test."""

        async def bounded() -> _T:
            async with asyncio.timeout(20):
                return await step

        with suppress(SevattestError):
            return self.loop.run(bounded())
        return None

    async def boot(self) -> None:
        """Start the agent's parts over what is kept."""
        ledger = self.ledger = Ledger(self.folders)
        keeper = Custody(ledger=ledger, clock=self.clock, log=RecordingLog(), observe=self.observe)
        self.runner = Runner(ledger=ledger, custody=keeper, hypervisor=self.hypervisor, device=DEVICE, clock=self.clock)
        self.supervisor = Supervisor(
            ledger=ledger,
            custody=keeper,
            hypervisor=self.hypervisor,
            clock=self.clock,
            log=RecordingLog(),
            limits=LIMITS,
        )
        await self.supervisor.recover()
        await self.at_rest()  # a start that went on is done

    async def at_rest(self) -> None:
        """Wait for the steps that are under way."""
        for launch in self.ledger.unfinished():
            async with self.ledger.lock(launch.launch_id):
                pass

    async def looked_after(self) -> None:
        """A look, and another one at what was left alone because a step of it was under way."""
        await self.supervisor.tick()
        await self.at_rest()
        await self.supervisor.tick()

    def on_record(self, slot: int) -> Launch | None:
        """The slot's launch, as a restarted agent would find it."""
        launch_id = self.orders[slot].launch_id
        record = self.folders.kept.get(launch_id)
        return None if record is None else decode(record, launch_id)

    def guest_of(self, slot: int) -> Guest | None:
        """The machine of the slot's launch, as it is on record."""
        launch = self.on_record(slot)
        return None if launch is None or launch.machine is None else self.hypervisor.guests[launch.machine]

    @rule(slot=slots)
    def the_next_step_goes_well(self, slot: int) -> None:
        self.step(slot, ALICE, PACKETS[0], None, None)

    @rule(slot=slots)
    def and_the_next(self, slot: int) -> None:
        self.step(slot, ALICE, PACKETS[0], None, None)

    @rule(slot=slots, packet=st.sampled_from(PACKETS), fault=faults, fuse=fuses)
    def the_next_step_goes_wrong(self, slot: int, packet: Packet, fault: str | None, fuse: int | None) -> None:
        self.step(slot, ALICE, packet, fault, fuse)

    @rule(slot=slots, fault=faults, packet=st.sampled_from(PACKETS))
    def the_packet_comes_again(self, slot: int, fault: str | None, packet: Packet) -> None:
        self.inject(slot, ALICE, packet, fault, None)

    @rule(slot=slots, call=st.sampled_from(list(S)), caller=callers, packet=st.sampled_from(PACKETS), fuse=fuses)
    def any_call(self, slot: int, call: S, caller: str, packet: Packet, fuse: int | None) -> None:
        self.step(slot, caller, packet, None, fuse, of=call)

    def step(
        self, slot: int, caller: str, packet: Packet, fault: str | None, fuse: int | None, *, of: S | None = None
    ) -> None:
        """The call that is due in the state `of`, or in the launch's own."""
        launch = self.on_record(slot)
        state = of or (S.STARTING if launch is None else launch.state)
        launch_id = self.orders[slot].launch_id
        match state:
            case S.STARTING:
                self.hypervisor.start_fault = fault if fault in {"dies", "refused"} else None
                self.call(self.runner.start(caller, self.orders[slot]), fuse)
                self.hypervisor.start_fault = None
            case S.PAUSED:
                self.call(self.runner.measure(caller, launch_id), fuse)
            case S.MEASURED | S.INJECTING:
                self.inject(slot, caller, packet, fault, fuse)
            case S.INJECTED | S.RESUMING | S.RESUMED:
                self.hypervisor.next_fault = fault
                self.call(self.runner.resume(caller, launch_id, uuid4()), fuse)
                self.hypervisor.next_fault = None
            case S.STOPPED:
                self.call(self.runner.abort(caller, launch_id, uuid4()), fuse)
            case S.ABORTED | S.FAILED:
                self.orders[slot] = self.order(self.orders[slot].guest)

    def inject(self, slot: int, caller: str, packet: Packet, fault: str | None, fuse: int | None) -> None:
        self.hypervisor.next_fault = fault
        self.call(self.runner.inject(caller, self.orders[slot].launch_id, uuid4(), *packet), fuse)
        self.hypervisor.next_fault = None

    @rule(slot=slots, what=st.sampled_from(["dies", "is resumed by somebody else", "falls silent", "speaks again"]))
    def the_machine(self, slot: int, what: str) -> None:
        guest = self.guest_of(slot)
        if guest is None:
            return
        if what == "dies":
            guest.die()
        elif what.startswith("is resumed") and guest.released:
            guest.run()
        guest.silent = what == "falls silent"

    @rule(slot=slots, what=st.sampled_from(["disk full", "disk", "second", "minute", "quarter", "killed", "killed"]))
    def the_world(self, slot: int, what: str) -> None:
        match what:
            case "disk full" | "disk":
                self.folders.full = what == "disk full"
            case "killed":
                self.the_agent_is_killed()
            case _:
                self.clock.advance(timedelta(seconds={"second": 1, "minute": 60, "quarter": 901}[what]))
                self.call(self.supervisor.tick())
        if self.folders.full:
            # Whatever else happens, not for long: nothing can be said of a launch that cannot be written down.
            self.step(slot, ALICE, PACKETS[1], None, None)
            self.folders.full = False

    def the_agent_is_killed(self) -> None:
        self.call(self.supervisor.close())
        self.hypervisor.agent_died()
        self.folders.full = False
        self.call(self.boot())

    def launches(self) -> list[Launch]:
        return [decode(record, launch) for launch, record in self.folders.kept.items()]

    @invariant()
    def a_machine_takes_one_packet_at_most(self) -> None:
        for guest in getattr(self, "hypervisor", FakeHypervisor()).guests.values():
            assert len(set(guest.packets)) <= 1

    @invariant()
    def a_launch_moves_along_the_table(self) -> None:
        if not hasattr(self, "folders"):
            return
        for launch in self.launches():
            before = self.seen.get(launch.launch_id, S.STARTING)
            assert launch.state in REACHABLE[before], (before, launch.state)
            self.seen[launch.launch_id] = launch.state

    @invariant()
    def a_guest_that_counts_as_attested_has_its_packet(self) -> None:
        if not hasattr(self, "folders"):
            return
        for launch in self.launches():
            if launch.machine is not None:
                self.machines[launch.machine] = launch.launch_id
            if launch.state in PACKET_TAKEN and launch.machine is not None:
                assert self.hypervisor.guests[launch.machine].packets

    @invariant()
    def what_the_agent_has_looked_at_does_not_run_unattested(self) -> None:
        """After a look, with disk and monitor in order, no guest runs without its packet, and no end has a machine."""
        if not hasattr(self, "folders") or self.folders.full:
            return
        self.clock.advance(LIMITS.check_interval)
        self.call(self.looked_after())
        for launch in self.launches():
            assert launch.ending is None, launch
            overdue = self.clock.now() - launch.create_time > LIMITS.lifetime
            assert not overdue or launch.state in FINAL | {S.RESUMED, S.RESUMING}, launch
            for identity, of in self.machines.items():
                guest = self.hypervisor.guests[identity]
                if of == launch.launch_id and launch.state in FINAL:
                    assert not guest.alive, launch
                if of == launch.launch_id and launch.state in BEFORE_INJECTED and not guest.silent:
                    assert not guest.running, launch
        for guest in self.hypervisor.guests.values():
            assert not guest.alive or guest.identity in self.machines, "a machine that nobody knows"


AnyOrder.TestCase.settings = settings(
    max_examples=200, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestAnyOrder = AnyOrder.TestCase
