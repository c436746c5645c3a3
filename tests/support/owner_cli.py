"""`sevattest owner` against a verifier that the tests of a module share."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import yaml

from common.errors import SevattestError
from common.rpc.client import call
from sevattest.v1 import platform_pb2, verifier_service_pb2
from tests.cli.transcripts import Said, run
from tests.support.owner_process import OwnersVerifier, owners_verifier

CHECKPOINTS = "[audit]\ncheckpoint_records = 1\n\n[limits]\nsweep_interval = 1\n"


@pytest.fixture(scope="module")
def served() -> Iterator[OwnersVerifier]:
    with owners_verifier(CHECKPOINTS) as serving:
        yield serving


@pytest.fixture
def name() -> str:
    """A name of the test's own: the verifier is shared."""
    return f"n-{uuid4().hex[:12]}"


def owner(served: OwnersVerifier, *words: str | Path) -> Said:
    return run("owner", *words, environ=served.environ)


def write(folder: Path, content: dict[str, Any], file: str = "document.yaml") -> Path:
    path = folder / file
    path.write_text(json.dumps(content) if file.endswith(".json") else yaml.safe_dump(content, sort_keys=False))
    return path


def begin(served: OwnersVerifier, name: str, *, release: bool = False) -> str:
    """A launch of `web` by the orchestrator `name`; with `release` it is refused for its measurement."""

    async def ask() -> str:
        async with served.site.channel(served.launches, name=name) as channel:
            stub = served.site.stub(channel)
            request = verifier_service_pb2.BeginLaunchRequest(
                request_id=str(uuid4()),
                platform=platform_pb2.PlatformEvidence(chain=served.site.platform.chain.to_bytes()),
                workload="web",
            )
            begun = await call(stub.BeginLaunch, request, timeout=20, mutating=True)
            if release:
                measured = verifier_service_pb2.ReleaseSecretRequest(
                    request_id=str(uuid4()),
                    launch_id=begun.launch.launch_id,
                    measurement=bytes(48),
                    firmware=platform_pb2.FirmwareVersion(api_major=1, api_minor=55, build=24),
                )
                with pytest.raises(SevattestError):
                    await call(stub.ReleaseSecret, measured, timeout=20, mutating=True)
            return str(begun.launch.launch_id)

    return asyncio.run(ask())


def orchestrator(name: str) -> str:
    return f"spiffe://datacenter.example/orchestrator/{name}"
