"""Hosts, or networks, that meddle with a launch between its orchestrator and its agent."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import replace
from uuid import UUID

from common.errors import SevattestError
from orchestrator.demo.tamper import RelayingHost
from orchestrator.drivers.base import Host, Measured, Packet, Session
from orchestrator.flow import Step
from tests.e2e.scene import Scene


class SessionSwapping(RelayingHost):
    """Starts the guest under another launch's session blob, with that launch's certificate or with this one's."""

    def __init__(self, honest: Host, other: Session, *, certificate: bool) -> None:
        super().__init__(honest)
        self._other, self._certificate = other, certificate

    async def start(self, session: Session, guest: str, *, request_id: UUID, within: float) -> None:
        godh = self._other.godh if self._certificate else session.godh
        await super().start(
            replace(session, godh=godh, blob=self._other.blob), guest, request_id=request_id, within=within
        )


class PacketChanging(RelayingHost):
    """Hands another packet to the agent than the owner made."""

    def __init__(self, honest: Host, change: Callable[[Packet], Packet]) -> None:
        super().__init__(honest)
        self._change = change

    async def inject(self, launch_id: UUID, packet: Packet, *, request_id: UUID, within: float) -> None:
        changed = self._change(packet)
        assert (changed.header, changed.payload) != (packet.header, packet.payload)
        await super().inject(launch_id, changed, request_id=request_id, within=within)


class Resuming(RelayingHost):
    """Lets the guest run, past its agent, before a step."""

    def __init__(self, honest: Host, scene: Scene, before: Step) -> None:
        super().__init__(honest)
        self._scene, self._before = scene, before

    async def measure(self, launch_id: UUID, *, within: float) -> Measured:
        if self._before is Step.MEASURE:
            self._resume(launch_id)
        return await super().measure(launch_id, within=within)

    async def inject(self, launch_id: UUID, packet: Packet, *, request_id: UUID, within: float) -> None:
        if self._before is Step.INJECT:
            self._resume(launch_id)
        await super().inject(launch_id, packet, request_id=request_id, within=within)

    def _resume(self, launch_id: UUID) -> None:
        with self._scene.monitor(launch_id) as machine:
            machine.ask("cont")


class LookingAtHashes(RelayingHost):
    """Looks at the kernel hashes in the guest's RAM around an injection that its agent refuses.

    Attributes:
        seen: what is there before, after, and when the packet was then injected past the agent.
    """

    def __init__(self, honest: Host, scene: Scene) -> None:
        super().__init__(honest)
        self._scene = scene
        self.seen: list[bytes] = []

    async def inject(self, launch_id: UUID, packet: Packet, *, request_id: UUID, within: float) -> None:
        self._look(launch_id)
        try:
            await super().inject(launch_id, packet, request_id=request_id, within=within)
        except SevattestError:
            self._look(launch_id)
            header, secret = (base64.b64encode(part).decode() for part in (packet.header, packet.payload))
            with self._scene.monitor(launch_id) as machine:
                machine.ask("sev-inject-launch-secret", packet_header=header, secret=secret)
            self._look(launch_id)
            raise

    def _look(self, launch_id: UUID) -> None:
        self.seen.append(self._scene.ram(launch_id, self._scene.bench.footer.hashes_area))


def flipped(packet: Packet, part: str) -> Packet:
    """The packet with one bit changed.

    Args:
        packet: as the owner made it.
        part: `flags`, `iv`, `mac` (AMD SEV API, Table 62: bytes 0, 4 and 20 of the header) or `payload`.
    """
    if part == "payload":
        return replace(packet, payload=_flip(packet.payload, len(packet.payload) // 2))
    return replace(packet, header=_flip(packet.header, {"flags": 1, "iv": 7, "mac": 33}[part]))


def _flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]
