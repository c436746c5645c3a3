"""`HostAgentService` over gRPC: each request checked field by field, handed to the runner, answered as a message.

The only module of the agent that knows the generated code. Who may call what is the gatekeeper's business
(common/rpc/authz.py); whose launch it is, the runner's.
"""

from __future__ import annotations

import asyncio
import hmac
import re
from collections.abc import AsyncIterator
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from typing import Any, TypeAlias
from uuid import UUID

import grpc

from common import wire
from common.errors import InvalidInput, Reason, SevattestError
from common.rpc.identity import caller
from common.rpc.steps import shielded
from common.sev.abi import (
    KEY_SIZE,
    PACKET_HEADER_SIZE,
    PACKET_MAX_SIZE,
    SESSION_SIZE,
    SEV_CERT_SIZE,
    Usage,
)
from common.sev.certs.sev import SevCertificate
from common.sev.errors import ParseError
from common.sev.policy import GuestPolicy
from host_agent.devices import Device, pdh_fingerprint
from host_agent.launches.launch import Launch
from host_agent.launches.ledger import age
from host_agent.launches.runner import Runner, StartRequest
from sevattest.v1 import host_agent_service_pb2 as pb
from sevattest.v1 import platform_pb2
from sevattest.v1.host_agent_service_pb2_grpc import HostAgentServiceServicer, add_HostAgentServiceServicer_to_server

__all__ = ["HostAgentService", "add_HostAgentServiceServicer_to_server"]

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

_BLOCK = 16  # the firmware decrypts whole AES blocks
_PDH_FINGERPRINT_SIZE = 32
# Of a page of launches, well below the 64 KiB that a message may have.
_PAGE_BYTES = 48 * 1024
_PAGE_TOKEN = re.compile(r"(\d{1,18})-([0-9a-f-]{36})", re.ASCII)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class HostAgentService(HostAgentServiceServicer):
    """The servicer; the contract is in proto/sevattest/v1/host_agent_service.proto."""

    def __init__(self, *, runner: Runner, device: Device) -> None:
        self._runner = runner
        self._device = device

    async def ExportChain(self, _request: pb.ExportChainRequest, _context: Context) -> pb.ExportChainResponse:  # noqa: N802 -- the RPC's name
        """The platform's certificates and chip id, as the firmware gives them."""
        chain, chip_id = await asyncio.gather(self._device.export_chain(), self._device.chip_id())
        return pb.ExportChainResponse(platform=platform_pb2.PlatformEvidence(chain=chain, chip_id=chip_id))

    async def GetPlatform(self, _request: pb.GetPlatformRequest, _context: Context) -> pb.GetPlatformResponse:  # noqa: N802 -- the RPC's name
        """The platform's state; a field that the device does not tell is left out, which reads as its zero."""
        # The certificates first: exporting them may initialise the platform, and the state is to be true afterwards.
        chain = await self._device.export_chain()
        status = await self._device.status()
        return pb.GetPlatformResponse(
            firmware=None if status.firmware is None else wire.firmware_version_to_proto(status.firmware),
            state=pb.GetPlatformResponse.State.Value(f"STATE_{status.state.name}"),
            externally_owned=bool(status.externally_owned),
            es_enabled=bool(status.es_enabled),
            guest_count=status.guest_count or 0,
            pdh_fingerprint=pdh_fingerprint(chain),
        )

    async def StartLaunch(self, request: pb.StartLaunchRequest, _context: Context) -> pb.StartLaunchResponse:  # noqa: N802 -- the RPC's name
        """Start a guest paused."""
        order = StartRequest(
            request_id=wire.request_id(request.request_id),
            launch_id=wire.launch_id(request.launch_id),
            guest=wire.name("guest", request.guest),
            policy=_policy(request.policy),
            godh=_godh(request.godh),
            session=_session(request.session),
            pdh_fingerprint=wire.exactly("pdh_fingerprint", request.pdh_fingerprint, _PDH_FINGERPRINT_SIZE),
        )
        launch = await shielded(self._runner.start(_me(), order))
        return pb.StartLaunchResponse(launch=_message(launch))

    async def GetMeasurement(self, request: pb.GetMeasurementRequest, _context: Context) -> pb.GetMeasurementResponse:  # noqa: N802 -- the RPC's name
        """Read the launch measurement."""
        launch = await shielded(self._runner.measure(_me(), wire.launch_id(request.launch_id)))
        assert launch.measurement is not None and launch.firmware is not None  # noqa: S101, PT018 -- it was measured
        return pb.GetMeasurementResponse(
            measurement=launch.measurement,
            firmware=wire.firmware_version_to_proto(launch.firmware),
            launch=_message(launch),
        )

    async def InjectSecret(self, request: pb.InjectSecretRequest, _context: Context) -> pb.InjectSecretResponse:  # noqa: N802 -- the RPC's name
        """Hand the owner's packet to the firmware."""
        request_id, launch_id = wire.request_id(request.request_id), wire.launch_id(request.launch_id)
        header = wire.exactly("header", request.header, PACKET_HEADER_SIZE)
        payload = wire.at_most("payload", request.payload, PACKET_MAX_SIZE)
        if len(payload) % _BLOCK:
            raise _invalid("payload", f"must be a multiple of {_BLOCK} bytes, not {len(payload)}")
        launch = await shielded(self._runner.inject(_me(), launch_id, request_id, header, payload))
        return pb.InjectSecretResponse(launch=_message(launch))

    async def ResumeGuest(self, request: pb.ResumeGuestRequest, _context: Context) -> pb.ResumeGuestResponse:  # noqa: N802 -- the RPC's name
        """Let a guest run that has its secret."""
        request_id, launch_id = wire.request_id(request.request_id), wire.launch_id(request.launch_id)
        launch = await shielded(self._runner.resume(_me(), launch_id, request_id))
        return pb.ResumeGuestResponse(launch=_message(launch))

    async def AbortLaunch(self, request: pb.AbortLaunchRequest, _context: Context) -> pb.AbortLaunchResponse:  # noqa: N802 -- the RPC's name
        """End a launch and its machine."""
        request_id, launch_id = wire.request_id(request.request_id), wire.launch_id(request.launch_id)
        launch = await shielded(self._runner.abort(_me(), launch_id, request_id))
        return pb.AbortLaunchResponse(launch=_message(launch))

    async def GetLaunch(  # noqa: N802 -- the RPC's name
        self, request: pb.HostAgentServiceGetLaunchRequest, _context: Context
    ) -> pb.HostAgentServiceGetLaunchResponse:
        """Read one launch."""
        launch = self._runner.get(_me(), wire.launch_id(request.launch_id))
        return pb.HostAgentServiceGetLaunchResponse(launch=_message(launch))

    async def ListLaunches(self, request: pb.ListLaunchesRequest, _context: Context) -> pb.ListLaunchesResponse:  # noqa: N802 -- the RPC's name
        """List the caller's launches, newest first; a page ends early where it would grow too long for a message."""
        most = wire.page_size(request.page_size)
        before = _position(request.page_token) if request.page_token else None
        due = [launch for launch in self._runner.launches(_me()) if before is None or _place(launch) < before]
        page = pb.ListLaunchesResponse()
        size = 0
        for launch in due[:most]:
            message = _message(launch)
            size += message.ByteSize() + 4
            if size > _PAGE_BYTES:
                break
            page.launches.append(message)
        if len(page.launches) < len(due):
            page.next_page_token = "{}-{}".format(*_place(due[len(page.launches) - 1]))
        return page

    async def WatchLaunches(  # noqa: N802 -- the RPC's name
        self, _request: pb.WatchLaunchesRequest, _context: Context
    ) -> AsyncIterator[pb.WatchLaunchesResponse]:
        """Send the caller's launches, then each change."""
        async with aclosing(self._runner.watch(_me())) as launches:
            async for launch in launches:
                yield pb.WatchLaunchesResponse(launch=_message(launch))

    async def GetAttestationReport(  # noqa: N802 -- the RPC's name
        self, request: pb.GetAttestationReportRequest, _context: Context
    ) -> pb.GetAttestationReportResponse:
        """Fetch a report that the platform's PEK signs."""
        launch_id = wire.launch_id(request.launch_id)
        nonce = wire.exactly("nonce", request.nonce, KEY_SIZE)
        report = await shielded(self._runner.report(_me(), launch_id, nonce))
        return pb.GetAttestationReportResponse(report=report)


def _me() -> str:
    """What the caller's launches are bound to."""
    return caller().spiffe_id


def _message(launch: Launch) -> pb.GuestLaunch:
    return pb.GuestLaunch(
        launch_id=str(launch.launch_id),
        guest=launch.guest,
        state=pb.GuestLaunchState.Value(f"GUEST_LAUNCH_STATE_{launch.state.name}"),
        reason=wire.reason_to_proto(None if launch.failure is None else launch.failure.reason),
        policy=launch.policy,
        create_time=wire.timestamp(launch.create_time),
        update_time=wire.timestamp(launch.update_time),
    )


def _policy(word: int) -> int:
    try:
        return GuestPolicy.parse(word).value
    except ParseError as error:
        raise _invalid("policy", error.message) from error


def _godh(data: bytes) -> bytes:
    certificate = wire.exactly("godh", data, SEV_CERT_SIZE)
    try:
        usage = SevCertificate.parse(certificate).usage
    except ParseError as error:
        raise _invalid("godh", error.message) from error
    if usage is not Usage.PDH:
        raise _invalid("godh", f"must be a certificate for Diffie-Hellman (usage PDH), not {usage.name}")
    return certificate


def _session(data: bytes) -> bytes:
    session = wire.exactly("session", data, SESSION_SIZE)
    # Without a session the firmware takes keys of zeros, which everybody knows.
    if hmac.compare_digest(session, bytes(SESSION_SIZE)):
        raise _invalid("session", "must not be all zeros")
    return session


def _place(launch: Launch) -> tuple[int, UUID]:
    """A launch's place in the list, exact to the microsecond, as a page token says it."""
    created, launch_id = age(launch)
    return ((created - _EPOCH) // timedelta(microseconds=1), launch_id)


def _position(token: str) -> tuple[int, UUID]:
    match = _PAGE_TOKEN.fullmatch(token)
    try:
        if match is None:
            raise _invalid("page_token", "is not from an earlier answer")
        return (int(match[1]), wire.launch_id(match[2]))
    except SevattestError:
        raise _invalid("page_token", "is not from an earlier answer") from None


def _invalid(field: str, message: str) -> InvalidInput:
    return InvalidInput(Reason.INVALID_ARGUMENT, f"{field}: {message}", field=field)
