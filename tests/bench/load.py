"""The load generator: a process of its own that plays datacenter, told what to do by lines of JSON on stdin.

It keeps its connections between commands, so that no measurement holds a handshake. The host's half of a launch (one
ECDH and a few MACs) is the emulator's; no guest is started. Whatever a verifier refuses ends the process: a figure
over refusals would mean nothing.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import msgspec
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from common.rpc.client import open_channel
from common.rpc.tls import ClientTls
from common.sev.abi import MEASUREMENT_BLOB_SIZE
from emulator import channel as firmware
from sevattest.v1 import platform_pb2, verifier_service_pb2, verifier_service_pb2_grpc

_TIMEOUT_S = 55.0
_API, _BUILD = (1, 55), 24


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """Whom to call as whom, and what the host has. The first line on stdin.

    Attributes:
        addresses: the workers', `HOST:PORT`.
        callers: certificate and key of each caller; every caller has one connection to every worker.
        server_ca: the verifier's CA.
        chain: the platform's, 8336 bytes.
        pdh: the private key of its PDH, PEM.
        workload: what is launched.
        digest: a launch digest that it allows.
    """

    addresses: list[str]
    callers: list[tuple[str, str]]
    server_ca: str
    chain: bytes
    pdh: bytes
    workload: str
    digest: bytes


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """One line on stdin.

    Attributes:
        kind: `launch` is begin and release one after the other, as in life; `begin` and `release` are the halves, of
            which the second releases what the first has begun; `calls` is both, for a server
            whose answers mean nothing.
        count: how many.
        at_once: how many are under way at the same time; with a rate, the most.
        rate: begin so many a second, at random moments; None for as soon as the one before has ended.
    """

    kind: str
    count: int
    at_once: int
    rate: float | None = None


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What a task took: the line on stdout.

    Attributes:
        seconds: from its first call to its last answer.
        begin_ms: what each `BeginLaunch` took, from the moment at which it was due.
        release_ms: what each `ReleaseSecret` took.
    """

    seconds: float
    begin_ms: list[float] = []
    release_ms: list[float] = []


@dataclass(kw_only=True)
class _Load:
    setting: Setting
    pdh: ec.EllipticCurvePrivateKey
    launches: Any
    begun: deque[tuple[Any, Any]] = field(default_factory=deque)
    begin_ms: list[float] = field(default_factory=list)
    release_ms: list[float] = field(default_factory=list)

    async def launch(self, due: float) -> None:
        ready = self.measured(*await self.begin(due))
        await self.release(time.monotonic(), ready)

    async def calls(self, due: float) -> None:
        stub, begun = await self.begin(due)
        nothing = bytes(MEASUREMENT_BLOB_SIZE)
        await self.release(time.monotonic(), (stub, self.request(begun, nothing)))

    async def begin_half(self, due: float) -> None:
        self.begun.append(await self.begin(due))

    async def release_half(self, due: float) -> None:
        await self.release(due, self.begun.popleft())

    async def begin(self, due: float) -> tuple[Any, Any]:
        stub = next(self.launches)
        request = verifier_service_pb2.BeginLaunchRequest(
            request_id=str(uuid4()),
            platform=platform_pb2.PlatformEvidence(chain=self.setting.chain),
            workload=self.setting.workload,
        )
        begun = await stub.BeginLaunch(request, timeout=_TIMEOUT_S)
        self.begin_ms.append((time.monotonic() - due) * 1000)
        return stub, begun

    def measured(self, stub: Any, begun: Any) -> tuple[Any, Any]:
        """What the host makes of the owner's answer: the request to release."""
        keys = firmware.open_channel(pdh_key=self.pdh, godh=begun.godh, session=begun.session, policy=begun.policy)
        nonce = os.urandom(16)
        measured = firmware.measure(keys.tik, _API, _BUILD, begun.policy, self.setting.digest, nonce)
        return stub, self.request(begun, measured + nonce)

    def request(self, begun: Any, blob: bytes) -> Any:
        return verifier_service_pb2.ReleaseSecretRequest(
            request_id=str(uuid4()),
            launch_id=begun.launch.launch_id,
            measurement=blob,
            firmware=platform_pb2.FirmwareVersion(api_major=_API[0], api_minor=_API[1], build=_BUILD),
        )

    async def release(self, due: float, ready: tuple[Any, Any]) -> None:
        stub, request = ready
        await stub.ReleaseSecret(request, timeout=_TIMEOUT_S)
        self.release_ms.append((time.monotonic() - due) * 1000)

    async def run(self, task: Task) -> Result:
        self.begin_ms, self.release_ms = [], []
        steps: dict[str, Callable[[float], Awaitable[None]]] = {
            "launch": self.launch,
            "begin": self.begin_half,
            "release": self.release_half,
            "calls": self.calls,
        }
        step = steps[task.kind]
        if task.kind == "release":
            # Before the clock starts: this is the hosts' work.
            self.begun = deque(self.measured(*each) for each in self.begun)
        start = time.monotonic()
        if task.rate is None:
            await _closed(step, task)
        else:
            await _open(step, task, task.rate)
        seconds = time.monotonic() - start
        return Result(seconds=seconds, begin_ms=self.begin_ms, release_ms=self.release_ms)


async def _closed(step: Callable[[float], Awaitable[None]], task: Task) -> None:
    left = iter(range(task.count))

    async def one_after_the_other() -> None:
        for _ in left:
            await step(time.monotonic())

    async with asyncio.TaskGroup() as group:
        for _ in range(task.at_once):
            group.create_task(one_after_the_other())


async def _open(step: Callable[[float], Awaitable[None]], task: Task, rate: float) -> None:
    """Arrivals that do not wait for answers: whoever does not keep up is seen not to."""
    slots = asyncio.Semaphore(task.at_once)
    due = time.monotonic()

    async def at(due: float) -> None:
        async with slots:
            await step(due)

    async with asyncio.TaskGroup() as group:
        for _ in range(task.count):
            due += random.expovariate(rate)
            await asyncio.sleep(due - time.monotonic())
            group.create_task(at(due))


async def _main(lines: Iterable[str]) -> None:
    first, *_ = itertools.islice(lines, 1)
    setting = msgspec.json.decode(first, type=Setting)
    pdh = load_pem_private_key(setting.pdh, None)
    assert isinstance(pdh, ec.EllipticCurvePrivateKey)
    channels = [
        open_channel(address, ClientTls(cert=Path(cert), key=Path(key), server_ca=Path(setting.server_ca)))
        for cert, key in setting.callers
        for address in setting.addresses
    ]
    load = _Load(
        setting=setting,
        pdh=pdh,
        launches=itertools.cycle([verifier_service_pb2_grpc.VerifierServiceStub(each) for each in channels]),
    )
    for line in lines:
        result = await load.run(msgspec.json.decode(line, type=Task))
        print(json.dumps(msgspec.to_builtins(result)), flush=True)
    await asyncio.gather(*(each.close() for each in channels))


if __name__ == "__main__":
    asyncio.run(_main(sys.stdin))
