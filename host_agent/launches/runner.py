"""The steps of a launch: what its caller may ask, in the order that the state table allows.

Each step holds the launch's lock from its first look to its last write, writes its intent down before it acts, and acts
on a machine only after it has seen how that stands (`custody.py`). Steps must run to their end once begun: the servicer
shields them. A step that fails says so in one of three ways:

* nothing was done, and the launch is as it was (`Unavailable`, refusals of the request itself): ask again;
* nobody knows (`OutcomeUnknown`): the launch stays in INJECTING or RESUMING; ask again, with the same bytes;
* the launch is over (whatever a machine or the firmware answers against it): its machine was ended first.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncGenerator, Collection
from contextlib import suppress
from dataclasses import dataclass
from uuid import UUID

from common.clock import Clock
from common.errors import LimitExceeded, NotFound, Reason, SevattestError, WrongState
from common.sev.digest.ovmf import Area
from host_agent.devices import Device, pdh_fingerprint
from host_agent.hypervisors.base import Hypervisor, Inspection, StartOrder
from host_agent.launches.custody import Custody
from host_agent.launches.launch import Failure, Launch, Request, content
from host_agent.launches.ledger import Ledger
from host_agent.launches.state import PACKET_TAKEN, Event, LaunchState

_S, _E = LaunchState, Event
_NEVER_RAN = frozenset({_S.FAILED, _S.ABORTED})


@dataclass(frozen=True, kw_only=True)
class StartRequest:
    """StartLaunch, its form already checked.

    Attributes:
        request_id: the caller's.
        launch_id: the verifier's.
        guest: name in the configuration.
        policy: the guest policy, 32 bits.
        godh: a certificate of usage PDH, 2084 bytes.
        session: 128 bytes.
        pdh_fingerprint: of the PDH that the session was made for, 32 bytes.
    """

    request_id: UUID
    launch_id: UUID
    guest: str
    policy: int
    godh: bytes
    session: bytes
    pdh_fingerprint: bytes

    @property
    def request(self) -> Request:
        """What is remembered of it."""
        parts = (
            self.launch_id.bytes,
            self.guest.encode(),
            self.policy.to_bytes(4, "little"),
            self.godh,
            self.session,
            self.pdh_fingerprint,
        )
        return Request(method="StartLaunch", request_id=self.request_id, content=content(*parts))


class Runner:
    """Runs steps on launches; see the module."""

    def __init__(
        self, *, ledger: Ledger, custody: Custody, hypervisor: Hypervisor, device: Device, clock: Clock
    ) -> None:
        self._ledger = ledger
        self._custody = custody
        self._hypervisor = hypervisor
        self._device = device
        self._clock = clock
        self._admission = asyncio.Lock()

    async def start(self, caller: str, order: StartRequest) -> Launch:
        """Start a guest paused, under the owner's session.

        Raises:
            InvalidInput: `REQUEST_ID_REUSED`.
            NotFound: no such guest, or the launch is another caller's.
            WrongState: `GUEST_BUSY`, `SESSION_STALE`, `NO_SECRET_AREA`, or the launch exists or was given up.
            SevattestError: the machine or the firmware failed; the launch is `FAILED`.
        """
        async with self._ledger.lock(order.launch_id):
            known = self._ledger.repeated(caller, order.request)
            if known is not None:
                launch = self._ledger.get(caller, known)
                if launch.state is _S.STARTING:
                    # Its start failed, and the store had no room for that.
                    launch, _ = await self._custody.settle(launch)
                if launch.state in _NEVER_RAN:
                    raise launch.refusal("StartLaunch")
                return launch
            self._check_admission(caller, order)
            area = await asyncio.to_thread(self._hypervisor.secret_area, order.guest)
            if area is None:
                raise WrongState(
                    Reason.NO_SECRET_AREA,
                    "the guest's firmware has no area for secrets: it is not an AmdSev build of OVMF",
                )
            await self._check_pdh(order.pdh_fingerprint)
            launch = await self._admit(caller, order, area)
            return await self._bring_up(launch, order)

    async def measure(self, caller: str, launch_id: UUID) -> Launch:
        """Read the measurement; the launch that is returned holds it. Read once, it is answered from the record.

        Raises:
            WrongState: it is not its turn, or the machine has ended.
            SevattestError: the machine gave no answer, or none that makes sense.
        """
        async with self._ledger.lock(launch_id):
            launch = self._ledger.get(caller, launch_id)
            if launch.measurement is not None and launch.state not in _NEVER_RAN:
                return launch
            launch, seen = await self._settled(launch, "GetMeasurement", {_S.PAUSED})
            machine = self._custody.machine(launch_id)
            assert seen is not None and machine is not None  # noqa: S101, PT018 -- so it is settled in PAUSED
            blob = await self._custody.look(launch, machine.measurement())
            self._custody.observe("measure: read", launch_id)
            launch = await self._ledger.save(
                launch.moved(_E.MEASURED, self._clock.now(), measurement=blob, firmware=seen.firmware)
            )
            self._custody.observe("measure: done", launch_id)
            return launch

    async def inject(self, caller: str, launch_id: UUID, request_id: UUID, header: bytes, payload: bytes) -> Launch:
        """Hand the owner's packet to the firmware, once.

        Args:
            caller: who asks.
            launch_id: the launch.
            request_id: the caller's.
            header: 52 bytes.
            payload: a multiple of 16 bytes.

        Raises:
            InvalidInput: `REQUEST_ID_REUSED`.
            WrongState: `SECRET_TOO_LARGE`, `PACKET_DIFFERS`, `GUEST_NOT_PAUSED`, or not its turn.
            OutcomeUnknown: the packet may have reached the firmware; the same bytes may be sent again.
            SevattestError: the firmware or the machine refused the packet; the launch is `FAILED`.
        """
        packet = content(header, payload)
        request = Request(
            method="InjectSecret", request_id=request_id, content=content(launch_id.bytes, header, payload)
        )
        async with self._ledger.lock(launch_id):
            launch = self._ledger.with_request(self._ledger.get(caller, launch_id), request)
            if launch.state in _NEVER_RAN:
                raise launch.refusal("InjectSecret")
            if launch.packet is not None and not hmac.compare_digest(launch.packet, packet):
                raise WrongState(Reason.PACKET_DIFFERS, "another packet was injected into this launch")
            if launch.state in PACKET_TAKEN:
                return await self._remembered(launch)
            if len(payload) > launch.secret_area.size:
                raise WrongState(
                    Reason.SECRET_TOO_LARGE,
                    f"the payload has {len(payload)} bytes, the firmware's area {launch.secret_area.size}",
                )
            launch, _ = await self._settled(launch, "InjectSecret", {_S.MEASURED, _S.INJECTING})
            machine = self._custody.machine(launch_id)
            assert machine is not None  # noqa: S101 -- so it is settled before its end
            launch = await self._ledger.save(launch.moved(_E.INJECT_BEGUN, self._clock.now(), packet=packet))
            self._custody.observe("inject: written down", launch_id)
            await self._custody.hand_over(launch, machine.inject(header, payload))
            self._custody.observe("inject: answered", launch_id)
            launch = await self._custody.handed_over(launch)
            self._custody.observe("inject: done", launch_id)
            return launch

    async def resume(self, caller: str, launch_id: UUID, request_id: UUID) -> Launch:
        """Let a guest run that has its secret.

        Raises:
            InvalidInput: `REQUEST_ID_REUSED`.
            WrongState: the platform has not taken a packet, or the launch has ended.
            OutcomeUnknown: the guest may run; ask again.
            SevattestError: the guest was not resumed; ask again, or give the launch up.
        """
        request = Request(method="ResumeGuest", request_id=request_id, content=content(launch_id.bytes))
        async with self._ledger.lock(launch_id):
            launch = self._ledger.with_request(self._ledger.get(caller, launch_id), request)
            if launch.state in {_S.RESUMED, _S.STOPPED}:
                return await self._remembered(launch)
            launch, _ = await self._settled(launch, "ResumeGuest", {_S.INJECTED, _S.RESUMING, _S.RESUMED})
            if launch.state is _S.RESUMED:
                return await self._remembered(launch)
            launch = await self._ledger.save(launch.moved(_E.RESUME_BEGUN, self._clock.now()))
            self._custody.observe("resume: written down", launch_id)
            launch = await self._custody.resume(launch)
            self._custody.observe("resume: done", launch_id)
            return launch

    async def abort(self, caller: str, launch_id: UUID, request_id: UUID) -> Launch:
        """End a launch and the machine that was started for it; of one that has ended, nothing.

        Raises:
            InvalidInput: `REQUEST_ID_REUSED`.
            NotFound: no such launch; a StartLaunch of that id that is still on its way will start nothing.
        """
        request = Request(method="AbortLaunch", request_id=request_id, content=content(launch_id.bytes))
        async with self._ledger.lock(launch_id):
            try:
                launch = self._ledger.get(caller, launch_id)
            except NotFound:
                self._ledger.give_up(caller, launch_id, self._clock.now())
                raise
            # Whatever was asked before, an end is never refused; it is the same end without being remembered.
            with suppress(LimitExceeded):
                launch = self._ledger.with_request(launch, request)
            if launch.is_final:
                return await self._remembered(launch)
            if launch.state is _S.RESUMING:
                # Whether it ran decides what its end is called. A machine that does not say is ended all the same.
                with suppress(SevattestError):
                    launch, _ = await self._custody.settle(launch)
            return launch if launch.is_final else await self._custody.end(launch, _E.ABORTED, None)

    async def report(self, caller: str, launch_id: UUID, nonce: bytes) -> bytes:
        """An attestation report over the caller's nonce (16 bytes), 208 bytes.

        Raises:
            WrongState: the machine is not up, or has ended.
            SevattestError: the firmware refused, or gave no answer.
        """
        async with self._ledger.lock(launch_id):
            launch = self._ledger.get(caller, launch_id)
            up = {_S.PAUSED, _S.MEASURED, _S.INJECTING, _S.INJECTED, _S.RESUMING, _S.RESUMED}
            launch, _ = await self._settled(launch, "GetAttestationReport", up)
            machine = self._custody.machine(launch_id)
            assert machine is not None  # noqa: S101 -- so it is settled before its end
            return await self._custody.look(launch, machine.report(nonce))

    def get(self, caller: str, launch_id: UUID) -> Launch:
        """The caller's launch, as it stands; raises `NotFound`."""
        return self._ledger.get(caller, launch_id)

    def launches(self, caller: str) -> list[Launch]:
        """The caller's launches, newest first."""
        return self._ledger.of(caller)

    def watch(self, caller: str) -> AsyncGenerator[Launch, None]:
        """The caller's launches as they are, then each change, until the agent stops."""
        return self._ledger.watch(caller)

    def end_watches(self) -> None:
        """Let every `watch` end: the agent stops, and waits for those who are being served."""
        self._ledger.end_watches()

    async def _settled(
        self, launch: Launch, wanted: str, states: Collection[LaunchState]
    ) -> tuple[Launch, Inspection | None]:
        """The launch, in line with its machine and in one of `states`, or the refusal of the step `wanted`."""
        if launch.state not in states:
            raise launch.refusal(wanted)
        launch, seen = await self._custody.settle(launch)
        if launch.state not in states:
            raise launch.refusal(wanted)
        return launch, seen

    async def _remembered(self, launch: Launch) -> Launch:
        """Keep the request of a call that changes nothing else, if it is a new one."""
        known = self._ledger.find(launch.launch_id)
        return launch if known is not None and known.requests == launch.requests else await self._ledger.save(launch)

    async def _check_pdh(self, expected: bytes) -> None:
        """The session opens only under the PDH that it was made for; better said now than by a dying QEMU."""
        actual = pdh_fingerprint(await self._device.export_chain())
        if not hmac.compare_digest(actual, expected):
            raise WrongState(Reason.SESSION_STALE, "the platform's PDH is not the one that the session was made for")

    def _check_admission(self, caller: str, order: StartRequest) -> None:
        if self._ledger.find(order.launch_id) is not None:
            # Another caller's is told apart from none by nobody.
            launch = self._ledger.get(caller, order.launch_id)
            raise WrongState(Reason.WRONG_STATE, "the launch was started by another request", state=launch.state.value)
        if self._ledger.was_given_up(caller, order.launch_id, self._clock.now()):
            raise WrongState(Reason.WRONG_STATE, "the launch was given up before it was started")
        if self._ledger.of_guest(order.guest) is not None:
            raise WrongState(Reason.GUEST_BUSY, "the guest has a launch or a running machine", guest=order.guest)

    async def _admit(self, caller: str, order: StartRequest, area: Area) -> Launch:
        # Looked at again: other launches of this guest, or with this request id, may have got here first. Only one
        # passes here at a time.
        async with self._admission:
            self._ledger.repeated(caller, order.request)
            self._check_admission(caller, order)
            now = self._clock.now()
            launch = Launch(
                launch_id=order.launch_id,
                caller=caller,
                guest=order.guest,
                policy=order.policy,
                secret_area=area,
                driver=self._hypervisor.driver(order.guest),
                state=_S.STARTING,
                create_time=now,
                update_time=now,
                requests=(order.request,),
            )
            self._custody.observe("start: begun", order.launch_id)
            return await self._ledger.save(launch)

    async def _bring_up(self, launch: Launch, order: StartRequest) -> Launch:
        launch_id = launch.launch_id
        self._custody.observe("start: written down", launch_id)
        try:
            machine = await self._hypervisor.create(
                StartOrder(
                    launch=launch_id,
                    guest=launch.guest,
                    policy=launch.policy,
                    godh=order.godh,
                    session=order.session,
                    folder=self._ledger.folders.folder(launch_id),
                )
            )
            self._custody.take(launch_id, machine)
            self._custody.observe("start: machine held", launch_id)
            launch = await self._ledger.save(launch.amended(machine=machine.identity))
            self._custody.observe("start: machine written down", launch_id)
            machine.release()
            self._custody.observe("start: machine released", launch_id)
            return await self._custody.check_started(launch)
        except SevattestError as error:
            await self._custody.end(launch, _E.FAILED, Failure.of(error))
            raise
        except Exception:
            # A defect of ours: whatever it is, no machine is left behind.
            internal = Failure(reason=Reason.INTERNAL, message="the agent failed", fields={})
            await self._custody.end(launch, _E.FAILED, internal)
            raise
