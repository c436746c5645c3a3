"""The serving side: one listener over mutual TLS behind a gatekeeper, and a Unix socket for health probes.

Life: construct (reads and checks the certificates), `add` servicers, `start`, … `stop`. Not ready before `start` has
returned, not ready from the moment that `stop` is called.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import grpc
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server

from common.clock import Clock, SystemClock
from common.config import listen_address
from common.errors import InvalidInput, Reason
from common.rpc import MAX_STREAMS, steps
from common.rpc.authz import METHODS
from common.rpc.health import Health, socket_target
from common.rpc.identity import Identity
from common.rpc.interceptors import Gatekeeper, Limits, check_handler
from common.rpc.metrics import CERTIFICATE, READY, UNDER_WAY
from common.rpc.tls import CertificateWatch, ServerTls, single_ca
from common.telemetry.log import Log
from common.telemetry.metrics import UNMEASURED, Meter

__all__ = ["OPTIONS", "Limits", "Server"]

_S_contra = TypeVar("_S_contra", contravariant=True)
_Servicer = TypeVar("_Servicer")

# Each limit is here for a measured attack or surprise: docs/identities.md has the table.
OPTIONS: tuple[tuple[str, int], ...] = (
    # A second process on the port would share the calls without anybody noticing.
    ("grpc.so_reuseport", 0),
    # Half-open streams of one connection.
    ("grpc.max_concurrent_streams", MAX_STREAMS),
    # Counting streams that have ended but are not yet freed refuses a fifth of an honest client's burst
    # (REFUSED_STREAM); rapid resets are held off by the caps on pending requests and by the caller's own.
    ("grpc.http.overload_protection", 0),
    # A certificate is looked at by TLS only when a connection is made.
    ("grpc.max_connection_age_ms", 180_000),
    # Longer than the longest call, or a step that began at the wrong moment would end with its outcome unknown.
    ("grpc.max_connection_age_grace_ms", 65_000),
    ("grpc.max_connection_idle_ms", 300_000),
    # Connections that never finish their handshake, or speak no HTTP/2 after it.
    ("grpc.server_handshake_timeout_ms", 5_000),
    ("grpc.http2.settings_timeout", 5_000),
    ("grpc.max_allowed_incoming_connections", 4096),
    # Without these a burst loses a third of its calls with CANCELLED, never run.
    ("grpc.server.max_pending_requests", 8192),
    ("grpc.server.max_pending_requests_hard_limit", 16384),
    # Dead clients, and how often live ones may ask whether we are alive.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 20_000),
)

# How often the certificate's files are looked at, seconds.
_POLL = 2.0


class _Adder(Protocol[_S_contra]):
    """A generated `add_…Servicer_to_server`."""

    def __call__(self, servicer: _S_contra, server: Any, /) -> None: ...


class Server:
    """One listener.

    Attributes:
        health: what probes are told; a service adds its own causes of not being ready.
        certificates: the certificate in use.
    """

    def __init__(
        self,
        *,
        listen: str,
        tls: ServerTls,
        log: Log,
        limits: Limits | None = None,
        health_socket: Path | None = None,
        clock: Clock | None = None,
        meter: Meter = UNMEASURED,
    ) -> None:
        """Check the settings and read the certificates; nothing is opened yet.

        Args:
            listen: `HOST:PORT`; port 0 takes any that is free.
            tls: certificates and callers.
            log: where the calls and certificate changes go.
            limits: what one caller may ask.
            health_socket: where probes ask; None for no such socket.
            clock: the time that certificates are judged by.
            meter: takes the figures of its calls and its state.

        Raises:
            InvalidInput: `INVALID_CONFIGURATION`.
        """
        self._host, self._port = listen_address(listen)
        self._tls = tls
        self._log = log
        self._clock = clock or SystemClock()
        self._health_socket = health_socket
        self._health_target = None if health_socket is None else socket_target(health_socket)
        self.certificates = CertificateWatch(tls, log=log, clock=self._clock)
        self.health = Health()
        limits = limits or Limits()
        self._options = (
            *OPTIONS,
            ("grpc.max_receive_message_length", limits.message),
            ("grpc.max_send_message_length", limits.message),
        )
        self._gatekeeper = Gatekeeper(
            trust_domain=tls.trust_domain,
            callers=tls.callers,
            limits=limits,
            log=log,
            clock=self._clock,
            meter=meter,
        )
        self._watch_with(meter, callers="+".join(sorted(tls.callers)))
        self._adders: list[Callable[[Any], None]] = []
        self._servers: list[grpc.aio.Server] = []
        self._watch: asyncio.Task[None] | None = None
        self.add(add_HealthServicer_to_server, self.health)

    @property
    def identity(self) -> Identity:
        """Who this server is, by its certificate."""
        return self.certificates.material.identity

    @property
    def single_ca(self) -> bool:
        """Whether one CA stands for both sites here, which banners and receipts must say."""
        return single_ca(self._tls, self.certificates.material)

    def add(self, adder: _Adder[_Servicer], servicer: _Servicer) -> None:
        """Serve `servicer` here.

        Args:
            adder: the generated `add_…Servicer_to_server`.
            servicer: its methods are `async def`, or async generators where they stream.

        Raises:
            TypeError: a method has no row in the table of `authz`, or cannot stand behind the gatekeeper.
        """
        registered = _Registered()
        adder(servicer, registered)
        for method, handler in registered.handlers.items():
            if method not in METHODS:
                raise TypeError(f"{method}: no role may call it (common/rpc/authz.py)")
            check_handler(method, handler)
        self.health.add_services(sorted(registered.services))
        self._adders.append(lambda server: adder(servicer, server))

    async def start(self) -> str:
        """Listen, and answer calls from now on.

        Returns:
            The address that it listens on, `HOST:PORT`.

        Raises:
            InvalidInput: `INVALID_CONFIGURATION`; the address cannot be listened on.
        """
        server = grpc.aio.server(interceptors=[self._gatekeeper], options=self._options)
        for add in self._adders:
            add(server)
        host = f"[{self._host}]" if ":" in self._host else self._host
        try:
            port = server.add_secure_port(f"{host}:{self._port}", self.certificates.credentials())
        except RuntimeError as error:
            raise InvalidInput(
                Reason.INVALID_CONFIGURATION,
                f"cannot listen on {host}:{self._port}: the port is taken or the address is not this machine's",
            ) from error
        if self._health_target is not None:
            await self._start_health_socket(self._health_target)
        await server.start()
        self._servers.append(server)
        self._note_certificate()
        self.health.set("starting", ready=True)
        self._watch = asyncio.create_task(self.certificates.run(_POLL, after=self._note_certificate))
        bound = f"{host}:{port}"
        self._log.info(
            "rpc.listening",
            address=bound,
            identity=str(self.identity),
            callers=sorted(self._tls.callers),
            trust_domain=self._tls.trust_domain,
            single_ca=self.single_ca,
            certificate_ends=self.certificates.material.leaf.not_valid_after_utc,
        )
        return bound

    async def stop(self, grace: float) -> None:
        """Take no more calls, let those under way end, and wait for steps that must not be cut.

        Args:
            grace: seconds until calls under way are cancelled; steps in `shielded` run on to their end.
        """
        self.health.set("stopping", ready=False)
        if self._watch is not None:
            self._watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watch
            self._watch = None
        await asyncio.gather(*(server.stop(grace) for server in self._servers))
        self._servers.clear()
        await steps.drain()
        self._gatekeeper.flush()
        if self._health_socket is not None:
            self._health_socket.unlink(missing_ok=True)

    async def _start_health_socket(self, target: str) -> None:
        assert self._health_socket is not None  # noqa: S101 -- the target was made from it
        server = grpc.aio.server(options=self._options)
        add_HealthServicer_to_server(cast("Any", _Probed(self.health)), server)
        try:
            server.add_insecure_port(target)
        except RuntimeError as error:
            raise InvalidInput(
                Reason.INVALID_CONFIGURATION, f"{self._health_socket}: cannot listen on this socket"
            ) from error
        # Whoever may read the state folder may ask; the umask of a hardened process has said so already.
        self._health_socket.chmod(0o600)
        await server.start()
        self._servers.append(server)

    def _watch_with(self, meter: Meter, callers: str) -> None:
        meter.watch(UNDER_WAY, lambda: {(callers,): self._gatekeeper.under_way})
        meter.watch(CERTIFICATE, lambda: {(callers,): self.certificates.material.leaf.not_valid_after_utc.timestamp()})
        meter.watch(READY, lambda: {(callers, cause): float(ready) for cause, ready in self.health.causes.items()})

    def _note_certificate(self) -> None:
        self.health.set("certificate", ready=not self.certificates.expires_soon())


class _Registered:
    """Stands in for a server while a generated adder registers its handlers, to see which they are."""

    def __init__(self) -> None:
        self.handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
        self.services: set[str] = set()

    def add_generic_rpc_handlers(self, handlers: Sequence[Any]) -> None:
        """The same methods once more."""

    def add_registered_method_handlers(
        self, service: str, handlers: Mapping[str, grpc.RpcMethodHandler[Any, Any]]
    ) -> None:
        """Note the methods of one service."""
        self.services.add(service)
        self.handlers |= {f"/{service}/{name}": handler for name, handler in handlers.items()}


class _Probed:
    """Health for the Unix socket: a probe asks about the whole process, once."""

    def __init__(self, health: Health) -> None:
        self._health = health

    def __getattr__(self, name: str) -> Any:
        # List and Watch are nobody's business here.
        return _unimplemented

    async def Check(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:  # noqa: N802 -- RPC's name
        """Answer for the process."""
        if request.service:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such service here")
        return await self._health.Check(request, context)


async def _unimplemented(_request: object, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    await context.abort(grpc.StatusCode.UNIMPLEMENTED, "no such method")
