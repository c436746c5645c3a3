"""The guest owner's side over gRPC: a verifier that the orchestrator calls."""

from __future__ import annotations

from uuid import UUID

import grpc.aio

from common import wire
from common.errors import InvalidInput, PlatformFailed, Reason
from common.rpc.client import call
from orchestrator.drivers.base import Evidence, Measured, Packet, Session
from sevattest.v1 import platform_pb2
from sevattest.v1 import verifier_service_pb2 as pb
from sevattest.v1.verifier_service_pb2_grpc import VerifierServiceStub


class VerifierOwner:
    """A guest owner, through their verifier."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = VerifierServiceStub(channel)

    async def begin(
        self, evidence: Evidence, workload: str, grant: str | None, *, request_id: UUID, within: float
    ) -> Session:
        """Have the platform verified and a launch opened (`BeginLaunch`).

        Raises:
            PlatformFailed: the verifier's answer names no launch.
        """
        request = pb.BeginLaunchRequest(
            request_id=str(request_id),
            platform=platform_pb2.PlatformEvidence(chain=evidence.chain, chip_id=evidence.chip_id),
            workload=workload,
            grant=grant,
        )
        answer = await call(self._stub.BeginLaunch, request, timeout=within, mutating=True)
        try:
            launch_id = wire.launch_id(answer.launch.launch_id)
        except InvalidInput as error:
            raise PlatformFailed(Reason.INTERNAL, f"the verifier's answer cannot be used: {error.message}") from error
        return Session(
            launch_id=launch_id,
            workload_version=answer.launch.workload_version,
            generation=answer.launch.platform.generation,
            fingerprint=answer.launch.platform.fingerprint,
            policy=answer.policy,
            godh=answer.godh,
            blob=answer.session,
            pdh_fingerprint=answer.pdh_fingerprint,
        )

    async def release(self, launch_id: UUID, measured: Measured, *, request_id: UUID, within: float) -> Packet:
        """Have the measurement judged; the answer is the secret packet for it (`ReleaseSecret`)."""
        request = pb.ReleaseSecretRequest(
            request_id=str(request_id),
            launch_id=str(launch_id),
            measurement=measured.blob,
            firmware=wire.firmware_version_to_proto(measured.firmware),
        )
        answer = await call(self._stub.ReleaseSecret, request, timeout=within, mutating=True)
        return Packet(header=answer.header, payload=answer.payload, receipt=answer.receipt)

    async def abandon(self, launch_id: UUID, reason: Reason | None, *, request_id: UUID, within: float) -> None:
        """Give the launch up; its keys are erased (`AbandonLaunch`)."""
        request = pb.AbandonLaunchRequest(
            request_id=str(request_id), launch_id=str(launch_id), reason=wire.reason_to_proto(reason)
        )
        await call(self._stub.AbandonLaunch, request, timeout=within, mutating=True)

    async def state(self, launch_id: UUID, *, within: float) -> str:
        """Where the launch stands at the verifier (`GetLaunch`), for example `refused`."""
        request = pb.VerifierServiceGetLaunchRequest(launch_id=str(launch_id))
        answer = await call(self._stub.GetLaunch, request, timeout=within, mutating=False)
        return pb.LaunchState.Name(answer.launch.state).removeprefix("LAUNCH_STATE_").lower()
