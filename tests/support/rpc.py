"""Every service of the contract, found in the generated package, with servicers that only answer.

So a service or method that is added to `proto/` is in the tests of the transport at once.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message_factory import GetMessageClass

import sevattest.v1
from common.rpc.server import Server


@dataclass(frozen=True, kw_only=True)
class Method:
    """One method of the contract."""

    path: str
    streams: bool
    request: type[Any]
    response: type[Any]

    def stub(self, channel: grpc.aio.Channel) -> Callable[..., Any]:
        """What a client calls."""
        make: Callable[..., Any] = channel.unary_stream if self.streams else channel.unary_unary
        stub: Callable[..., Any] = make(
            self.path,
            request_serializer=self.request.SerializeToString,
            response_deserializer=self.response.FromString,
        )
        return stub


@dataclass
class SettableClock:
    """Tells the time that it was told."""

    time: datetime = field(default_factory=lambda: datetime.now(UTC))

    def now(self) -> datetime:
        """The time."""
        return self.time

    def advance(self, by: timedelta) -> None:
        """Let time pass."""
        self.time += by


def services() -> dict[str, tuple[ServiceDescriptor, Any]]:
    """Full name -> descriptor and the generated module with its adder."""
    found: dict[str, tuple[ServiceDescriptor, Any]] = {}
    for module in pkgutil.iter_modules(sevattest.v1.__path__):
        if module.name.endswith("_pb2"):
            messages = importlib.import_module(f"sevattest.v1.{module.name}")
            stubs = importlib.import_module(f"sevattest.v1.{module.name}_grpc")
            for service in messages.DESCRIPTOR.services_by_name.values():
                found[service.full_name] = (service, stubs)
    return found


def methods() -> list[Method]:
    """Every method of every service of the contract, and of the health service that listeners add themselves."""
    from grpc_health.v1 import health_pb2

    health: ServiceDescriptor = cast("Any", health_pb2).DESCRIPTOR.services_by_name["Health"]
    described = [*(service for service, _ in services().values()), health]
    return [_method(service, method) for service in described for method in service.methods]


def _method(service: ServiceDescriptor, method: MethodDescriptor) -> Method:
    return Method(
        path=f"/{service.full_name}/{method.name}",
        streams=method.server_streaming,
        request=GetMessageClass(method.input_type),
        response=GetMessageClass(method.output_type),
    )


def add_everything(server: Server, served: list[str]) -> None:
    """Serve every service of the contract with empty answers; each call that gets through is noted in `served`."""
    for service, stubs in services().values():
        behaviours = {
            method.name: _answer(_method(service, method), served, streams=method.server_streaming)
            for method in service.methods
        }
        servicer = type("Dummy", (), behaviours)()
        server.add(getattr(stubs, f"add_{service.name}Servicer_to_server"), servicer)


def _answer(method: Method, served: list[str], *, streams: bool) -> Callable[..., Any]:
    async def one(_self: object, _request: object, _context: object) -> object:
        served.append(method.path)
        return method.response()

    async def many(_self: object, _request: object, _context: object) -> AsyncIterator[object]:
        served.append(method.path)
        yield method.response()

    return many if streams else one
