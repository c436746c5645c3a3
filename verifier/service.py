"""`VerifierService`: from messages to values, to the broker, and back. Nothing is judged here.

Every field of a request goes through `common.wire` first. The caller is the identity that the gatekeeper established.
What may change anything runs shielded: a client's deadline or a lost connection does not cut it in the middle.
"""

from __future__ import annotations

from typing import Any

import grpc

from common import wire
from common.errors import InvalidInput, Reason
from common.rpc.identity import caller
from common.rpc.server import Server
from common.rpc.steps import shielded
from common.sev.abi import CHAIN_SIZE, CHIP_ID_SIZE, KEY_SIZE, MEASUREMENT_BLOB_SIZE, REPORT_SIZE
from common.sev.measurement import MeasurementBlob
from sevattest.v1 import platform_pb2, verifier_service_pb2, verifier_service_pb2_grpc
from verifier.launches.broker import Broker
from verifier.launches.launch import AbandonRequest, BeginRequest, Launch, ReleaseRequest
from verifier.launches.release import Releaser
from verifier.launches.reports import ReportVerifier
from verifier.launches.state import State

_Context = grpc.aio.ServicerContext[Any, Any]

STATES = {
    State.OPEN: verifier_service_pb2.LAUNCH_STATE_OPEN,
    State.RELEASED: verifier_service_pb2.LAUNCH_STATE_RELEASED,
    State.REFUSED: verifier_service_pb2.LAUNCH_STATE_REFUSED,
    State.ABANDONED: verifier_service_pb2.LAUNCH_STATE_ABANDONED,
    State.EXPIRED: verifier_service_pb2.LAUNCH_STATE_EXPIRED,
}


class VerifierServicer(verifier_service_pb2_grpc.VerifierServiceServicer):
    """Serves orchestrators."""

    def __init__(self, broker: Broker, releaser: Releaser, reports: ReportVerifier) -> None:
        """Take those who do the work."""
        self._broker = broker
        self._releaser = releaser
        self._reports = reports

    async def BeginLaunch(  # noqa: N802 -- the RPC's name
        self, request: verifier_service_pb2.BeginLaunchRequest, _context: _Context
    ) -> verifier_service_pb2.BeginLaunchResponse:
        """Verify a platform and open a launch."""
        if not request.HasField("platform"):
            raise InvalidInput(Reason.INVALID_ARGUMENT, "platform: is missing", field="platform")
        platform = request.platform
        begun = await shielded(
            self._broker.begin(
                BeginRequest(
                    caller=caller().spiffe_id,
                    request_id=wire.request_id(request.request_id),
                    chain=wire.exactly("platform.chain", platform.chain, CHAIN_SIZE),
                    chip_id=_chip_id(platform.chip_id),
                    workload=wire.name("workload", request.workload),
                    grant=wire.name("grant", request.grant) if request.HasField("grant") else None,
                )
            )
        )
        return verifier_service_pb2.BeginLaunchResponse(
            launch=launch_message(begun.launch),
            policy=begun.policy,
            godh=begun.godh,
            session=begun.session,
            pdh_fingerprint=begun.pdh_fingerprint,
        )

    async def ReleaseSecret(  # noqa: N802 -- the RPC's name
        self, request: verifier_service_pb2.ReleaseSecretRequest, _context: _Context
    ) -> verifier_service_pb2.ReleaseSecretResponse:
        """Judge a measurement and, at most once, answer with the packet for it."""
        measurement = wire.exactly("measurement", request.measurement, MEASUREMENT_BLOB_SIZE)
        released = await shielded(
            self._releaser.release(
                ReleaseRequest(
                    caller=caller().spiffe_id,
                    request_id=wire.request_id(request.request_id),
                    launch_id=wire.launch_id(request.launch_id),
                    blob=MeasurementBlob.parse(measurement),
                    firmware=wire.firmware_version(request),
                )
            )
        )
        return verifier_service_pb2.ReleaseSecretResponse(
            header=released.header,
            payload=released.payload,
            receipt=released.receipt,
            launch=launch_message(released.launch),
        )

    async def AbandonLaunch(  # noqa: N802 -- the RPC's name
        self, request: verifier_service_pb2.AbandonLaunchRequest, _context: _Context
    ) -> verifier_service_pb2.AbandonLaunchResponse:
        """Give a launch up."""
        launch = await shielded(
            self._broker.abandon(
                AbandonRequest(
                    caller=caller().spiffe_id,
                    request_id=wire.request_id(request.request_id),
                    launch_id=wire.launch_id(request.launch_id),
                    reason=wire.reason_from_proto(request.reason),
                )
            )
        )
        return verifier_service_pb2.AbandonLaunchResponse(launch=launch_message(launch))

    async def GetLaunch(  # noqa: N802 -- the RPC's name
        self, request: verifier_service_pb2.VerifierServiceGetLaunchRequest, _context: _Context
    ) -> verifier_service_pb2.VerifierServiceGetLaunchResponse:
        """Read one launch."""
        launch = await shielded(self._broker.get(caller().spiffe_id, wire.launch_id(request.launch_id)))
        return verifier_service_pb2.VerifierServiceGetLaunchResponse(launch=launch_message(launch))

    async def VerifyReport(  # noqa: N802 -- the RPC's name
        self, request: verifier_service_pb2.VerifyReportRequest, _context: _Context
    ) -> verifier_service_pb2.VerifyReportResponse:
        """Judge an attestation report."""
        report = await shielded(
            self._reports.verify(
                caller=caller().spiffe_id,
                launch_id=wire.launch_id(request.launch_id),
                nonce=wire.exactly("nonce", request.nonce, KEY_SIZE),
                report=wire.exactly("report", request.report, REPORT_SIZE),
            )
        )
        return verifier_service_pb2.VerifyReportResponse(digest=report.digest, policy=report.policy.value)


def add_to(server: Server, servicer: VerifierServicer) -> None:
    """Serve it on a listener."""
    server.add(verifier_service_pb2_grpc.add_VerifierServiceServicer_to_server, servicer)


def _chip_id(chip_id: bytes) -> bytes:
    return wire.exactly("platform.chip_id", chip_id, CHIP_ID_SIZE) if chip_id else b""


def launch_message(launch: Launch) -> verifier_service_pb2.Launch:
    """A launch as its caller may see it."""
    return verifier_service_pb2.Launch(
        launch_id=str(launch.launch_id),
        workload=launch.workload,
        workload_version=launch.workload_version,
        state=STATES[launch.state],
        reason=wire.reason_to_proto(launch.reason),
        create_time=wire.timestamp(launch.create_time),
        expire_time=wire.timestamp(launch.expire_time),
        end_time=None if launch.end_time is None else wire.timestamp(launch.end_time),
        platform=platform_pb2.PlatformSummary(generation=launch.generation, fingerprint=launch.fingerprint),
    )
