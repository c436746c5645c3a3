"""A server that does what no verifier in Python can do without, and nothing else.

gRPC over the same mutual TLS, messages of the same sizes, one P-384 key and one ECDH a launch: it knows no caller,
judges nothing, stores nothing. What it reaches of the bound is all that a verifier could reach.

    python -m tests.bench.bare … CONFIG: takes the place of `sev-verifier serve --config CONFIG`
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import grpc
from cryptography.hazmat.primitives.asymmetric import ec

from common.clock import SystemClock
from common.rpc.server import OPTIONS
from common.rpc.tls import CertificateWatch
from common.telemetry.log import SILENCE
from sevattest.v1 import platform_pb2, verifier_service_pb2
from verifier.config import load_config

_PEER = ec.generate_private_key(ec.SECP384R1()).public_key()
_LAUNCH = verifier_service_pb2.Launch(
    launch_id=str(uuid4()),
    workload="web",
    workload_version="1",
    state=verifier_service_pb2.LAUNCH_STATE_OPEN,
    platform=platform_pb2.PlatformSummary(generation="emulated", fingerprint="0" * 64),
)
_BEGUN = verifier_service_pb2.BeginLaunchResponse(
    launch=_LAUNCH, policy=1, godh=bytes(2084), session=bytes(128), pdh_fingerprint=bytes(32)
)
_RELEASED = verifier_service_pb2.ReleaseSecretResponse(
    launch=_LAUNCH, header=bytes(52), payload=bytes(64), receipt="e" * 1900
)


async def _begin(_request: object, _context: object) -> Any:
    ec.generate_private_key(ec.SECP384R1()).exchange(ec.ECDH(), _PEER)
    return _BEGUN


async def _release(_request: object, _context: object) -> Any:
    return _RELEASED


_METHODS: dict[str, Any] = {
    "BeginLaunch": grpc.unary_unary_rpc_method_handler(
        cast("Any", _begin), verifier_service_pb2.BeginLaunchRequest.FromString, type(_BEGUN).SerializeToString
    ),
    "ReleaseSecret": grpc.unary_unary_rpc_method_handler(
        cast("Any", _release), verifier_service_pb2.ReleaseSecretRequest.FromString, type(_RELEASED).SerializeToString
    ),
}


async def _serve(config: Path) -> None:
    tls = load_config(config, os.environ).server_tls()
    server = grpc.aio.server(options=OPTIONS)
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("sevattest.v1.VerifierService", _METHODS)])
    credentials = CertificateWatch(tls, log=SILENCE, clock=SystemClock()).credentials()
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    print(f"sev-verifier: serving on 127.0.0.1:{port}", flush=True)
    await ended.wait()
    await server.stop(1)


if __name__ == "__main__":
    asyncio.run(_serve(Path(sys.argv[-1])))
