"""The host's side over gRPC: a host agent that the orchestrator calls."""

from __future__ import annotations

from uuid import UUID

import grpc.aio

from common import wire
from common.errors import InvalidInput, PlatformFailed, Reason
from common.rpc.client import call
from orchestrator.drivers.base import Evidence, Measured, Packet, Session
from sevattest.v1 import host_agent_service_pb2 as pb
from sevattest.v1.host_agent_service_pb2_grpc import HostAgentServiceStub

_MEASUREMENT_BLOB = 48


class AgentHost:
    """A host, through its agent.

    The agent's answers are relayed and not judged: that is the verifier's business.
    """

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = HostAgentServiceStub(channel)

    async def export_chain(self, *, within: float) -> Evidence:
        """Read the platform's certificates and chip id (`ExportChain`)."""
        answer = await call(self._stub.ExportChain, pb.ExportChainRequest(), timeout=within, mutating=False)
        return Evidence(chain=answer.platform.chain, chip_id=answer.platform.chip_id)

    async def start(self, session: Session, guest: str, *, request_id: UUID, within: float) -> None:
        """Start the guest paused, under the owner's session and policy (`StartLaunch`)."""
        request = pb.StartLaunchRequest(
            request_id=str(request_id),
            launch_id=str(session.launch_id),
            guest=guest,
            policy=session.policy,
            godh=session.godh,
            session=session.blob,
            pdh_fingerprint=session.pdh_fingerprint,
        )
        await call(self._stub.StartLaunch, request, timeout=within, mutating=True)

    async def measure(self, launch_id: UUID, *, within: float) -> Measured:
        """Read the paused guest's measurement (`GetMeasurement`).

        Raises:
            PlatformFailed: the agent's answer is no measurement.
        """
        request = pb.GetMeasurementRequest(launch_id=str(launch_id))
        answer = await call(self._stub.GetMeasurement, request, timeout=within, mutating=False)
        try:
            blob = wire.exactly("measurement", answer.measurement, _MEASUREMENT_BLOB)
            return Measured(blob=blob, firmware=wire.firmware_version(answer))
        except InvalidInput as error:
            raise PlatformFailed(Reason.INTERNAL, f"the agent's answer cannot be used: {error.message}") from error

    async def inject(self, launch_id: UUID, packet: Packet, *, request_id: UUID, within: float) -> None:
        """Hand the secret packet to the platform's firmware (`InjectSecret`)."""
        request = pb.InjectSecretRequest(
            request_id=str(request_id), launch_id=str(launch_id), header=packet.header, payload=packet.payload
        )
        await call(self._stub.InjectSecret, request, timeout=within, mutating=True)

    async def resume(self, launch_id: UUID, *, request_id: UUID, within: float) -> None:
        """Let the guest run, which has its secret now (`ResumeGuest`)."""
        request = pb.ResumeGuestRequest(request_id=str(request_id), launch_id=str(launch_id))
        await call(self._stub.ResumeGuest, request, timeout=within, mutating=True)

    async def abort(self, launch_id: UUID, *, request_id: UUID, within: float) -> None:
        """End the launch and the machine that was started for it (`AbortLaunch`)."""
        request = pb.AbortLaunchRequest(request_id=str(request_id), launch_id=str(launch_id))
        await call(self._stub.AbortLaunch, request, timeout=within, mutating=True)

    async def state(self, launch_id: UUID, *, within: float) -> str:
        """Where the launch stands at the agent (`GetLaunch`), for example `aborted`."""
        request = pb.HostAgentServiceGetLaunchRequest(launch_id=str(launch_id))
        answer = await call(self._stub.GetLaunch, request, timeout=within, mutating=False)
        return pb.GuestLaunchState.Name(answer.launch.state).removeprefix("GUEST_LAUNCH_STATE_").lower()
