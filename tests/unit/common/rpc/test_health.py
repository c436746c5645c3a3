"""Being ready: every cause has its say, and watchers hear of each change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from common.errors import InvalidInput, NotFound
from common.rpc.health import Health, socket_target

_CONTEXT: Any = None


async def _ready(health: Health, service: str = "") -> bool:
    answer = await health.Check(HealthCheckRequest(service=service), _CONTEXT)
    return bool(answer.status == HealthCheckResponse.SERVING)


async def test_a_process_is_ready_when_nothing_speaks_against_it() -> None:
    health = Health()
    assert not await _ready(health)
    health.set("starting", ready=True)
    assert await _ready(health)
    health.set("store", ready=False)
    health.set("clock", ready=False)
    health.set("store", ready=True)
    assert not await _ready(health)
    health.set("clock", ready=True)
    assert await _ready(health)


async def test_every_cause_that_was_spoken_of_is_known_and_how_it_stands() -> None:
    health = Health()
    assert health.causes == {"starting": False}
    health.set("starting", ready=True)
    health.set("store", ready=False)
    assert health.causes == {"starting": True, "store": False}


async def test_each_service_answers_as_the_process_does_and_others_are_not_found() -> None:
    health = Health()
    health.add_services(["a.Service"])
    health.set("starting", ready=True)
    assert await _ready(health, "a.Service")
    assert set((await health.List(None, _CONTEXT)).statuses) == {"", "a.Service"}
    with pytest.raises(NotFound):
        await _ready(health, "b.Service")


async def test_a_watcher_hears_the_state_and_then_each_change() -> None:
    health = Health()
    watch = health.Watch(HealthCheckRequest(), _CONTEXT)
    assert (await anext(watch)).status == HealthCheckResponse.NOT_SERVING
    health.set("starting", ready=True)
    assert (await anext(watch)).status == HealthCheckResponse.SERVING
    health.set("store", ready=False)
    health.set("clock", ready=False)
    assert (await anext(watch)).status == HealthCheckResponse.NOT_SERVING
    await watch.aclose()  # type: ignore[attr-defined]  # declared as the iterator that gRPC knows


async def test_a_watcher_of_an_unknown_service_hears_that_it_is_unknown() -> None:
    watch = Health().Watch(HealthCheckRequest(service="b.Service"), _CONTEXT)
    assert (await anext(watch)).status == HealthCheckResponse.SERVICE_UNKNOWN
    await watch.aclose()  # type: ignore[attr-defined]  # the same


def test_a_socket_path_that_no_address_can_hold_is_refused() -> None:
    assert socket_target(Path("/run/x.sock")) == "unix:/run/x.sock"
    with pytest.raises(InvalidInput, match="at most 107 bytes"):
        socket_target(Path("/" + "x" * 107))
