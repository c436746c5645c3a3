"""Where metrics are read: `[metrics]` of both services, and the HTTP endpoint that it asks for.

GET /metrics and nothing else, one request a connection. On a loopback address anybody on the machine may read; on any
other address the endpoint is behind TLS 1.3, and reads who has a certificate from the CA that is named for it.

The endpoint lives in the service's event loop and is bounded: no more than a few connections are accepted at a time
(the rest waits with the kernel, and costs the process nothing), one every so often, and each has some seconds from its
first byte to its last. Who opens connections and says nothing keeps others from reading metrics, and nobody from being
served.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec

from common.config import listen_address
from common.errors import InvalidInput, Reason
from common.private_file import read_private
from common.telemetry.log import Log
from common.telemetry.metrics import Meter

_CONNECTIONS = 4  # of which a monitoring system needs one
_PATIENCE = 5.0  # seconds for a handshake, and again for request and answer
_HEAD_MAX = 8192  # bytes of a request; Prometheus sends some 300
_KEY_MAX = 65536  # bytes of a key's file
_INTERVAL = 0.05  # seconds between two connections: a handshake takes the event loop a millisecond


class MetricsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[metrics]`: where metrics are read; without it there are none.

    Attributes:
        listen: `HOST:PORT`; port 0 takes any that is free.
        cert: PEM, the endpoint's certificate; goes with `key` and `client_ca`.
        key: PEM, its key.
        client_ca: PEM, the CA of those who may read.
    """

    listen: str
    cert: Path | None = None
    key: Path | None = None
    client_ca: Path | None = None

    def __post_init__(self) -> None:
        """Refuse an endpoint that others than this machine could read without showing who they are."""
        try:
            host, _ = listen_address(self.listen)
        except InvalidInput as error:
            raise _bad(f"listen: {error.message}") from error
        named = [file for file in (self.cert, self.key, self.client_ca) if file is not None]
        if named and len(named) != 3:
            raise _bad("cert, key and client_ca go together: with one of them the others must be set")
        if not named and not _is_loopback(host):
            raise _bad(
                f"listen: {self.listen} is not an address of this machine alone (127.0.0.1, [::1]): "
                "cert, key and client_ca must be set"
            )

    def context(self) -> ssl.SSLContext | None:
        """The endpoint's side of TLS, from the files as they are now; None for none.

        Raises:
            InvalidInput: `INVALID_CONFIGURATION`; a file is missing or holds something else.
        """
        if self.cert is None or self.key is None or self.client_ca is None:
            return None
        read_private(self.key, _KEY_MAX)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_verify_locations(self.client_ca)
        except OSError as error:  # ssl's own errors are
            raise _bad(f"metrics.client_ca: {self.client_ca}: holds no certificate authority in PEM form") from error
        try:
            # Never asked for a password on a terminal: an encrypted key is one that cannot be used.
            context.load_cert_chain(self.cert, self.key, password=str)
        except OSError as error:
            raise _bad(
                f"metrics.cert: {self.cert}, {self.key}: are not a certificate and its key in PEM form"
            ) from error
        return context


class Endpoint:
    """Metrics that somebody may read.

    Attributes:
        meter: takes the figures.
    """

    def __init__(self, config: MetricsConfig, log: Log) -> None:
        """Check the settings; nothing is opened yet.

        Raises:
            InvalidInput: `INVALID_CONFIGURATION`; a file is missing or wrong, or the extra `metrics` is not installed.
        """
        try:
            from common.telemetry import prometheus  # noqa: PLC0415 -- an extra, and a twentieth of a second
        except ImportError as error:
            raise InvalidInput(
                Reason.INVALID_CONFIGURATION,
                "metrics: needs the extra sevattest[metrics]",
                hint="pip install 'sevattest[metrics]'",
            ) from error
        config.context()
        meter = prometheus.PrometheusMeter()
        self.meter: Meter = meter
        self._page: Callable[[], Awaitable[bytes]] = meter.page
        self._content_type = prometheus.CONTENT_TYPE
        self._config = config
        self._log = log
        self._places = asyncio.Semaphore(_CONNECTIONS)
        self._listener: socket.socket | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> str:
        """Listen.

        Returns:
            The address, `HOST:PORT`.

        Raises:
            InvalidInput: `INVALID_CONFIGURATION`; the address cannot be listened on.
        """
        host, port = listen_address(self._config.listen)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._listener = socket.create_server((host, port), family=family)
        except OSError as error:
            raise _bad(
                f"metrics.listen: cannot listen on {self._config.listen}: the port is taken or the address is not this "
                "machine's"
            ) from error
        self._listener.setblocking(False)  # noqa: FBT003 -- the socket's own method
        self._keep(asyncio.create_task(self._accept(self._listener)))
        address = f"{f'[{host}]' if ':' in host else host}:{self._listener.getsockname()[1]}"
        self._log.info("metrics.listening", address=address, tls=self._config.cert is not None)
        return address

    async def stop(self) -> None:
        """Close everything."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._listener is not None:
            self._listener.close()

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._places.acquire()
            try:
                connection, _ = await loop.sock_accept(listener)
            except OSError as error:  # no file descriptor is left, or the peer was too fast
                self._places.release()
                self._log.warning("metrics.not_accepted", error=error)
            else:
                self._keep(asyncio.create_task(self._serve(connection)))
            await asyncio.sleep(_INTERVAL)

    async def _serve(self, connection: socket.socket) -> None:
        """One connection, from its acceptance to its end, whatever the peer does."""
        transport: asyncio.Transport | None = None
        try:
            reader = asyncio.StreamReader(limit=_HEAD_MAX)
            protocol = asyncio.StreamReaderProtocol(reader)
            # Read anew each time, so that renewed files count at once.
            context = self._config.context()
            loop = asyncio.get_running_loop()
            transport, _ = await loop.connect_accepted_socket(
                lambda: protocol,
                connection,
                ssl=context,
                ssl_handshake_timeout=None if context is None else _PATIENCE,
            )
            async with asyncio.timeout(_PATIENCE):
                writer = asyncio.StreamWriter(transport, protocol, reader, loop)
                writer.write(await self._answer(await reader.readuntil(b"\r\n\r\n")))
                writer.close()
                await writer.wait_closed()
        except InvalidInput as error:
            self._log.error("metrics.not_served", text=error.message)
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # the peer's affair: no certificate, too slow, gone; half a request, one without an end
        finally:
            if transport is None:
                connection.close()
            else:
                transport.abort()
            self._places.release()

    async def _answer(self, head: bytes) -> bytes:
        """The response to a request's head."""
        method, _, rest = head.partition(b" ")
        target = rest.partition(b" ")[0].partition(b"?")[0]
        if method != b"GET":
            return _response("405 Method Not Allowed", b"GET only\n", "Allow: GET")
        if target != b"/metrics":
            return _response("404 Not Found", b"it is /metrics\n")
        try:
            page = await self._page()
        except Exception as error:  # noqa: BLE001 -- a gauge that cannot be read is a defect, and ends nothing else
            self._log.error("metrics.defect", error=error)
            return _response("500 Internal Server Error", b"the service's log says why\n")
        return _response("200 OK", page, f"Content-Type: {self._content_type}")


def _response(status: str, body: bytes, *headers: str) -> bytes:
    lines = (f"HTTP/1.1 {status}", *headers, f"Content-Length: {len(body)}", "Connection: close", "", "")
    return "\r\n".join(lines).encode("ascii") + body


def _is_loopback(host: str) -> bool:
    """Whether the address is one that no other machine can reach; a name may mean any."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _bad(message: str) -> InvalidInput:
    return InvalidInput(Reason.INVALID_CONFIGURATION, message)
