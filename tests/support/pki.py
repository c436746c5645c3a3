"""Certificates for tests: the good ones of both sites, made by the project's own code, and their evil twins.

`Pki(folder)` costs a few milliseconds for each certificate, all keys are P-256 or P-384. A twin differs from a good
certificate in exactly the one thing that its name says.
"""

from __future__ import annotations

import ipaddress
from base64 import encodebytes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.rpc.identity import DATACENTER, SERVERS, Role
from common.rpc.tls import ClientTls, ServerTls
from orchestrator.certificates import certificate_pem, key_pem, read_authority
from orchestrator.cli.pki import init, issue

DATACENTER_DOMAIN = "datacenter.example"
OWNER_DOMAIN = "owner.example"


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A certificate's file and its key's."""

    cert: Path
    key: Path

    def copy_to(self, folder: Path) -> Pair:
        """The same in files of a test's own, which it may renew."""
        own = Pair(cert=folder / "own.pem", key=folder / "own.key")
        renew(own.cert, self.cert.read_bytes())
        renew(own.key, self.key.read_bytes())
        return own


def renew(path: Path, content: bytes) -> None:
    """Put a file, for its owner's eyes alone, in the place of what may be there, as a renewal does."""
    fresh = path.with_name("fresh")
    fresh.touch(mode=0o600)
    fresh.write_bytes(content)
    fresh.replace(path)


@dataclass(frozen=True, kw_only=True)
class _Authority:
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


class Pki:
    """Two sites in a folder, and whatever is issued by them or forged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        init(folder, datacenter_domain=DATACENTER_DOMAIN, owner_domain=OWNER_DOMAIN)
        self.datacenter_ca = folder / "datacenter-ca.pem"
        self.owner_ca = folder / "owner-ca.pem"
        self._count = 0

    def issue(self, role: Role, name: str = "test", *, dns: Sequence[str] = (), ip: Sequence[str] = ()) -> Pair:
        """A good certificate; asked again for the same role and name, the same files."""
        cert, key = self.folder / f"{role}-{name}.pem", self.folder / f"{role}-{name}.key"
        if not cert.exists():
            issue(self.folder, role, name, dns=dns, ip=ip)
        return Pair(cert=cert, key=key)

    def server_tls(self, role: Role, name: str = "test", **changes: Any) -> ServerTls:
        """The settings of an agent's listener, or of the verifier's for orchestrators."""
        pair = self.issue(role, name)
        settings: dict[str, Any] = {
            "cert": pair.cert,
            "key": pair.key,
            "client_ca": self.datacenter_ca,
            "trust_domain": DATACENTER_DOMAIN,
            "role": role,
        }
        return ServerTls(**settings | changes)

    def admin_tls(self, name: str = "test", **changes: Any) -> ServerTls:
        """The settings of the verifier's listener for owners."""
        settings: dict[str, Any] = {
            "client_ca": self.owner_ca,
            "trust_domain": OWNER_DOMAIN,
            "callers": frozenset({Role.OWNER}),
            "strangers_ca": self.datacenter_ca,
        }
        return self.server_tls(Role.VERIFIER, name, **settings | changes)

    def client_tls(self, role: Role, name: str = "test", *, server: Role) -> ClientTls:
        """The settings of a client of `role` that calls a server of the role `server`."""
        pair = self.issue(role, name)
        return ClientTls(cert=pair.cert, key=pair.key, server_ca=self.ca_of(server))

    def ca_of(self, role: Role) -> Path:
        """The file of the CA that issues this role."""
        return self.datacenter_ca if role in DATACENTER else self.owner_ca

    def forge(
        self,
        role: Role,
        *,
        name: str = "eve",
        domain: str | None = None,
        uris: Sequence[str] | None = None,
        usages: Sequence[x509.ObjectIdentifier] | None = None,
        authority: _Authority | None = None,
        ca: bool = False,
        starts: timedelta = timedelta(hours=-1),
        ends: timedelta = timedelta(hours=1),
        names: Sequence[x509.GeneralName] | None = None,
        common_name: str | None = None,
    ) -> Pair:
        """A certificate with any content; what is not given is as in a good one of the role."""
        signer = authority or self.authority("datacenter" if role in DATACENTER else "owner")
        own = DATACENTER_DOMAIN if role in DATACENTER else OWNER_DOMAIN
        key = ec.generate_private_key(ec.SECP256R1())
        usage = ExtendedKeyUsageOID.SERVER_AUTH if role in SERVERS else ExtendedKeyUsageOID.CLIENT_AUTH
        called: list[x509.GeneralName] = []
        if role in SERVERS:
            called = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        identities = [f"spiffe://{domain or own}/{role}/{name}"] if uris is None else uris
        alternatives = [*map(x509.UniformResourceIdentifier, identities), *(called if names is None else names)]
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(_subject(common_name or f"{role} {name}"))
            .issuer_name(signer.certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + starts)
            .not_valid_after(now + ends)
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        )
        if alternatives:
            builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        wanted = [usage] if usages is None else list(usages)
        if wanted:
            builder = builder.add_extension(x509.ExtendedKeyUsage(wanted), critical=False)
        return self._write(builder.sign(signer.key, hashes.SHA256()), key)

    def authority(self, site: str) -> _Authority:
        """A site's CA with its key."""
        read = read_authority(
            certificate_pem=(self.folder / f"{site}-ca.pem").read_bytes(),
            key_pem=(self.folder / f"{site}-ca.key").read_bytes(),
        )
        return _Authority(certificate=read.certificate, key=read.key)

    def stranger(self, *, common_name: str = "stranger CA") -> _Authority:
        """A CA of nobody here, without name constraints."""
        key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.now(UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(_subject(common_name))
            .issuer_name(_subject(common_name))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(key, hashes.SHA256())
        )
        return _Authority(certificate=certificate, key=key)

    def write_authority(self, authority: _Authority) -> Path:
        """The authority's certificate in a file."""
        return self._write(authority.certificate, authority.key).cert

    def _write(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> Pair:
        self._count += 1
        folder = self.folder / "forged"
        folder.mkdir(exist_ok=True)
        pair = Pair(cert=folder / f"{self._count}.pem", key=folder / f"{self._count}.key")
        pair.cert.write_bytes(certificate_pem(certificate))
        pair.key.touch(mode=0o600)
        pair.key.write_bytes(key_pem(key))
        return pair


def hostile_pem(what: str) -> bytes:
    """A certificate that parsers trip over: an unknown `version`, or an `extension` that comes twice."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    names = [x509.UniformResourceIdentifier(_uri(Role.AGENT, "test"))]
    der = (
        x509.CertificateBuilder()
        .subject_name(_subject("hostile"))
        .issuer_name(_subject("hostile"))
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.IssuerAlternativeName(names), critical=False)
        .sign(key, hashes.SHA256())
        .public_bytes(Encoding.DER)
    )
    # [0] { INTEGER 2 }, which is version 3; the object identifiers of the two alternative names.
    version, subject, issuer = b"\xa0\x03\x02\x01\x02", b"\x06\x03\x55\x1d\x11", b"\x06\x03\x55\x1d\x12"
    changed = {
        "version": der.replace(version, version[:-1] + b"\x07", 1),
        "extension": der.replace(issuer, subject),
    }[what]
    return b"-----BEGIN CERTIFICATE-----\n" + encodebytes(changed) + b"-----END CERTIFICATE-----\n"


def _subject(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


# Each makes a client certificate that the right CA signed and that must be refused all the same.
EVIL_CLIENTS: Mapping[str, Callable[[Pki, Role], Pair]] = {
    "no alternative name": lambda pki, role: pki.forge(role, uris=(), common_name=f"{role} test"),
    "two URIs": lambda pki, role: pki.forge(role, uris=[_uri(role, "test"), _uri(role, "other")]),
    "CA:true": lambda pki, role: pki.forge(role, ca=True),
    "no extended key usage": lambda pki, role: pki.forge(role, usages=()),
    "for client and server": lambda pki, role: pki.forge(
        role, usages=(ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH)
    ),
    "unknown role": lambda pki, role: pki.forge(role, uris=[_uri("root", "test", like=role)]),
    "role in capitals": lambda pki, role: pki.forge(role, uris=[_uri(role.upper(), "test", like=role)]),
    "a path of three parts": lambda pki, role: pki.forge(role, uris=[_uri(role, "test/more")]),
    "no name": lambda pki, role: pki.forge(role, uris=[_uri(role, "")]),
    "another scheme": lambda pki, role: pki.forge(role, uris=[_uri(role, "test").replace("spiffe", "https")]),
}


def _uri(role: str, name: str, *, like: Role | None = None) -> str:
    site = like or Role(role)
    return f"spiffe://{DATACENTER_DOMAIN if site in DATACENTER else OWNER_DOMAIN}/{role}/{name}"


def raw_channel(target: str, server_ca: Path, pair: Pair | None) -> grpc.aio.Channel:
    """A channel as somebody else's program would open it: no check of its own, with or without a certificate."""
    credentials = grpc.ssl_channel_credentials(
        server_ca.read_bytes(),
        None if pair is None else pair.key.read_bytes(),
        None if pair is None else pair.cert.read_bytes(),
    )
    return grpc.aio.secure_channel(target, credentials, options=[("grpc.enable_http_proxy", 0)])
