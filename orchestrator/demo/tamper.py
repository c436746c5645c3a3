"""The dishonest hosts of `sevattest demo --tamper`: each cheats on the host's side alone, and the owner must notice.

Nothing here reaches the verifier: its configuration, documents and process are the same for all of them, and what it
says about the cheating it finds out by itself (tests/integration/test_launch_demo.py compares).
"""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from uuid import UUID

from orchestrator.demo.artefacts import OLD
from orchestrator.demo.site import HostPlay
from orchestrator.drivers.base import Evidence, Host, Measured, Packet, Session


class Tamper(StrEnum):
    """What a host may try."""

    FIRMWARE = "firmware"
    KERNEL = "kernel"
    CMDLINE = "cmdline"
    POLICY = "policy"
    REPLAY = "replay"
    CHAIN = "chain"


HONEST = HostPlay()
# What the host starts the guest from; where it is honest about that, it cheats elsewhere.
PLAYS: dict[Tamper, HostPlay] = {
    Tamper.FIRMWARE: HostPlay(firmware=OLD),
    Tamper.KERNEL: HostPlay(kernel=OLD),
    Tamper.CMDLINE: HostPlay(cmdline=OLD),
    Tamper.POLICY: HostPlay(lowered=True),
    Tamper.REPLAY: HONEST,
    Tamper.CHAIN: HONEST,
}

STORIES: dict[Tamper, str] = {
    Tamper.FIRMWARE: "the host starts the guest from version 1 of the firmware",
    Tamper.KERNEL: "the host starts the guest from version 1 of the kernel",
    Tamper.CMDLINE: "the host starts the guest with version 1 of the command line, which opens a debug shell",
    Tamper.POLICY: "the host starts the guest without the owner's session, and with debugging allowed",
    Tamper.REPLAY: "the host hands in the measurement of an earlier, honest launch",
    Tamper.CHAIN: "the host shows a platform whose root is self-made and carries AMD's key ids",
}


class RelayingHost:
    """A host as another one is; what is dishonest about it overrides."""

    def __init__(self, honest: Host) -> None:
        self._honest = honest

    async def export_chain(self, *, within: float) -> Evidence:
        """As the honest host does."""
        return await self._honest.export_chain(within=within)

    async def start(self, session: Session, guest: str, *, request_id: UUID, within: float) -> None:
        """As the honest host does."""
        await self._honest.start(session, guest, request_id=request_id, within=within)

    async def measure(self, launch_id: UUID, *, within: float) -> Measured:
        """As the honest host does."""
        return await self._honest.measure(launch_id, within=within)

    async def inject(self, launch_id: UUID, packet: Packet, *, request_id: UUID, within: float) -> None:
        """As the honest host does."""
        await self._honest.inject(launch_id, packet, request_id=request_id, within=within)

    async def resume(self, launch_id: UUID, *, request_id: UUID, within: float) -> None:
        """As the honest host does."""
        await self._honest.resume(launch_id, request_id=request_id, within=within)

    async def abort(self, launch_id: UUID, *, request_id: UUID, within: float) -> None:
        """As the honest host does."""
        await self._honest.abort(launch_id, request_id=request_id, within=within)


class ReplayingHost(RelayingHost):
    """A host that is honest until it is asked for a measurement: then it shows one of another launch."""

    def __init__(self, honest: Host, earlier: Measured) -> None:
        super().__init__(honest)
        self._earlier = earlier

    async def measure(self, launch_id: UUID, *, within: float) -> Measured:
        """The measurement of the earlier launch, whatever the platform measured now."""
        await super().measure(launch_id, within=within)
        return self._earlier


class ImpostorHost(RelayingHost):
    """A host whose platform has a root of its own making: it shows a CEK that this root has signed.

    The firmware exports its CEK unsigned; the key service that the owner asks does not know this chip, so the host
    brings the signature along. Every signature of the chain is good, and the root claims AMD's key ids.
    """

    def __init__(self, honest: Host, key_service: Path) -> None:
        super().__init__(honest)
        self._key_service = key_service

    async def export_chain(self, *, within: float) -> Evidence:
        """The platform's certificates, the last of them (the CEK) as the self-made root has signed it."""
        exported = await super().export_chain(within=within)
        signed = (self._key_service / f"{exported.chip_id.hex().upper()}.cert").read_bytes()
        return replace(exported, chain=exported.chain[: -len(signed)] + signed)
