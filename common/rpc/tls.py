"""The two ends' TLS settings, and a server's certificate that follows its files.

Every listener asks for a client certificate, always. gRPC asks for the server's credentials in a C thread at each
handshake, one handshake at a time, so that answer comes from memory; `CertificateWatch.poll` re-reads the files. A
rotation that goes wrong (half copied, wrong key, expired) keeps the last good certificate and says so in the log.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path

import grpc

from common.clock import Clock, SystemClock
from common.errors import InvalidInput, Reason
from common.rpc.identity import DATACENTER, OWNER_SITE, SERVERS, Role, check_trust_domain
from common.rpc.pem import (
    CLIENT_USAGE,
    SERVER_USAGE,
    TlsMaterial,
    issued_by_any,
    let_in_by_any,
    read_certificates,
    read_material,
)
from common.telemetry.log import Log

# A certificate so near its end makes the server not ready: whoever renews it is late.
EXPIRY_ALARM = timedelta(hours=1)


@dataclass(frozen=True, kw_only=True)
class ServerTls:
    """How a listener proves itself and whom it lets in.

    Attributes:
        cert: PEM file, the server's certificate (for a server only), intermediates after it.
        key: PEM file, its key, mode 0600.
        client_ca: PEM file, the CA (or CAs, during a change) that callers' certificates must come from.
        trust_domain: the callers' trust domain.
        role: what this server is, `Role.AGENT` or `Role.VERIFIER`; its own certificate must say so too.
        callers: the roles that may call this listener.
        strangers_ca: PEM file, the CA (or CAs) of the other site, where that one calls a listener of its own: nobody
            whom they vouch for may be let in here. None where this is the only listener.
        allow_single_ca: accept one CA for both sites (decisions.md 1); every banner shows it.
    """

    cert: Path
    key: Path
    client_ca: Path
    trust_domain: str
    role: Role
    callers: frozenset[Role] = frozenset({Role.ORCHESTRATOR})
    strangers_ca: Path | None = None
    allow_single_ca: bool = False

    @property
    def callers_are_neighbours(self) -> bool:
        """Whether server and callers are of one site, where one CA for both is as it should be."""
        return any({self.role} | self.callers <= site for site in (DATACENTER, OWNER_SITE))


@dataclass(frozen=True, kw_only=True)
class ClientTls:
    """How a client proves itself and whom it believes.

    Attributes:
        cert: PEM file, the client's certificate (for a client only), intermediates after it.
        key: PEM file, its key, mode 0600.
        server_ca: PEM file, the CA that the service's certificate must come from.
    """

    cert: Path
    key: Path
    server_ca: Path


def load_server(tls: ServerTls, now: datetime) -> TlsMaterial:
    """Read a listener's files and check them against its settings.

    Raises:
        InvalidInput: `INVALID_CONFIGURATION`, naming the file and what is wrong.
    """
    _check_settings(tls)
    material = read_material(cert=tls.cert, key=tls.key, authorities=tls.client_ca, usage=SERVER_USAGE, now=now)
    own = material.identity
    if own.role is not tls.role:
        raise _bad(tls.cert, f"the certificate is for the role {own.role}, not {tls.role}")
    if tls.callers_are_neighbours:
        if own.trust_domain != tls.trust_domain:
            raise _bad(
                tls.cert, f"the certificate's trust domain is {own.trust_domain}, the callers' is {tls.trust_domain}"
            )
    elif not tls.allow_single_ca:
        if own.trust_domain == tls.trust_domain:
            raise _bad(tls.cert, f"the server is in its callers' own trust domain, {own.trust_domain}", single=True)
        if issued_by_any(material.chain, material.authorities):
            raise _bad(tls.cert, f"was issued by a CA in {tls.client_ca}, which issues its callers too", single=True)
    if tls.strangers_ca is None:
        return material
    material = replace(material, strangers=read_certificates(tls.strangers_ca))
    if not tls.allow_single_ca and let_in_by_any(material.strangers, material.authorities):
        raise _bad(tls.client_ca, f"lets in whoever has a certificate from a CA in {tls.strangers_ca}", single=True)
    return material


def single_ca(tls: ServerTls, material: TlsMaterial) -> bool:
    """Whether one CA stands for both sites here, which banners and receipts must say."""
    if let_in_by_any(material.strangers, material.authorities):
        return True
    return not tls.callers_are_neighbours and (
        material.identity.trust_domain == tls.trust_domain or issued_by_any(material.chain, material.authorities)
    )


def load_client(tls: ClientTls, now: datetime) -> TlsMaterial:
    """Read a client's files.

    Raises:
        InvalidInput: `INVALID_CONFIGURATION`, naming the file and what is wrong.
    """
    return read_material(cert=tls.cert, key=tls.key, authorities=tls.server_ca, usage=CLIENT_USAGE, now=now)


_Stamp = tuple[tuple[int, int, int] | None, ...]


class CertificateWatch:
    """A listener's certificate, key and client CA, read again when one of the files changes.

    Attributes:
        material: what new connections are served with; the last that was good.
        healthy: False after a change of the files that could not be used, until the next that can.
    """

    def __init__(self, tls: ServerTls, *, log: Log, clock: Clock | None = None) -> None:
        """Read the files once; raises `InvalidInput` as `load_server` does."""
        self._tls = tls
        self._log = log
        self._clock = clock or SystemClock()
        self._stamp = self._look()
        self.material = load_server(tls, self._clock.now())
        self.healthy = True
        self._configuration = _configuration(self.material)

    def credentials(self) -> grpc.ServerCredentials:
        """Credentials that follow this watch; a client certificate is always required."""
        given = self._configuration

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            """What gRPC asks at each new connection: other files than before, or None for the same."""
            # Never the same ones again: gRPC would build its handshakers' factory anew and free the old one, which
            # another thread may be using for another connection at that moment (seen with 1.85.1: SIGSEGV).
            nonlocal given
            now = self._configuration
            if now is given:
                return None
            given = now
            return now

        return grpc.dynamic_ssl_server_credentials(
            given,
            fetch,  # type: ignore[arg-type]  # the stub knows no None, which gRPC documents
            require_client_authentication=True,
        )

    def expires_soon(self) -> bool:
        """Whether the certificate in use ends within `EXPIRY_ALARM`."""
        return self.material.leaf.not_valid_after_utc - self._clock.now() < EXPIRY_ALARM

    def poll(self) -> bool:
        """Read the files again if one has changed since the last look; True if new ones are in use now.

        Files that could not be used are read at every look: a certificate may have become valid meanwhile.
        """
        stamp = self._look()
        changed = stamp != self._stamp
        if self.healthy and not changed:
            return False
        self._stamp = stamp
        try:
            material = load_server(self._tls, self._clock.now())
            configuration = _configuration(material)
        except InvalidInput as error:
            self.healthy = False
            if changed:
                ends = self.material.leaf.not_valid_after_utc
                self._log.error("tls.reload_failed", text=error.message, kept_until=ends)
            return False
        self.material, self._configuration, self.healthy = material, configuration, True
        self._log.info(
            "tls.reloaded",
            identity=str(material.identity),
            serial=f"{material.leaf.serial_number:x}",
            not_after=material.leaf.not_valid_after_utc,
        )
        return True

    async def run(self, interval: float, after: Callable[[], None] | None = None) -> None:
        """Poll until cancelled.

        Args:
            interval: seconds between two looks.
            after: called after each look.
        """
        while True:
            await asyncio.sleep(interval)
            self.poll()
            if after is not None:
                after()

    def _look(self) -> _Stamp:
        tls = self._tls
        return tuple(_stamp(path) for path in (tls.cert, tls.key, tls.client_ca, tls.strangers_ca))


def _stamp(path: Path | None) -> tuple[int, int, int] | None:
    if path is None:
        return None
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def _configuration(material: TlsMaterial) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(material.key_pem, material.chain_pem)], material.ca_pem)


def _check_settings(tls: ServerTls) -> None:
    try:
        check_trust_domain(tls.trust_domain)
    except InvalidInput as error:
        raise InvalidInput(Reason.INVALID_CONFIGURATION, f"tls.trust_domain: {error.message}") from error
    if tls.role not in SERVERS or not tls.callers or tls.callers & SERVERS:
        raise ValueError("a listener is an agent's or a verifier's, and its callers are orchestrators or owners")


def _bad(path: Path, what: str, *, single: bool = False) -> InvalidInput:
    hint = {"hint": "two CAs keep the sites apart (sevattest pki init); allow_single_ca = true gives that up"}
    return InvalidInput(Reason.INVALID_CONFIGURATION, f"{path}: {what}", **(hint if single else {}))
