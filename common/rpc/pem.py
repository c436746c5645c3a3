"""Certificates and keys from files: read, parsed and judged when a process starts, so that a wrong file is named then.

gRPC itself takes any bytes and fails later, at somebody else's first call, without saying which file was wrong.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID

from common.errors import InvalidInput, Reason, Unauthenticated
from common.rpc.identity import Identity, parse_spiffe_id

# A bundle of a few hundred CAs; a certificate file is some 2 KiB.
_MAX_FILE = 1 << 20

SERVER_USAGE = ExtendedKeyUsageOID.SERVER_AUTH
CLIENT_USAGE = ExtendedKeyUsageOID.CLIENT_AUTH
_USAGE_NAMES = {SERVER_USAGE: "a server", CLIENT_USAGE: "a client"}


@dataclass(frozen=True, kw_only=True)
class TlsMaterial:
    """One side's certificate, key and the CAs that it trusts, all of them checked.

    Attributes:
        chain_pem: the certificate and what stands above it in its file.
        key_pem: its private key, PKCS#8.
        ca_pem: the CAs that the other side's certificate must come from.
        chain: `chain_pem`, parsed; the certificate itself first.
        authorities: `ca_pem`, parsed, those that are in date.
        identity: who the certificate is for.
        strangers: the CAs of the other site, where this listener was told of them.
    """

    chain_pem: bytes
    key_pem: bytes = field(repr=False)
    ca_pem: bytes
    chain: tuple[x509.Certificate, ...]
    authorities: tuple[x509.Certificate, ...]
    identity: Identity
    strangers: tuple[x509.Certificate, ...] = ()

    @property
    def leaf(self) -> x509.Certificate:
        """The certificate itself."""
        return self.chain[0]


def read_material(
    *, cert: Path, key: Path, authorities: Path, usage: x509.ObjectIdentifier, now: datetime
) -> TlsMaterial:
    """Read and judge one side's three files.

    Args:
        cert: PEM, the certificate first, intermediates after it.
        key: PEM, not encrypted, readable by its owner only.
        authorities: PEM, one CA or more.
        usage: `SERVER_USAGE` or `CLIENT_USAGE`, which must be the certificate's only extended key usage.
        now: the time that validity is judged by.

    Raises:
        InvalidInput: `INVALID_CONFIGURATION`; the message names the file and what is wrong with it.
    """
    chain = read_certificates(cert)
    private = _read_key(key)
    if private.public_der != _public_der(chain[0]):
        raise _bad(key, f"the key does not match the certificate in {cert}")
    try:
        identity = check_leaf(chain[0], usage=usage, now=now)
    except Unauthenticated as error:
        raise _bad(cert, error.message) from error
    trusted = read_certificates(authorities)
    for authority in trusted:
        if not _authority(authorities, authority):
            raise _bad(authorities, "holds a certificate that is not of a certificate authority")
    in_date = tuple(c for c in trusted if c.not_valid_before_utc <= now <= c.not_valid_after_utc)
    if not in_date:
        raise _bad(authorities, "every certificate authority in it has expired or is not valid yet")
    return TlsMaterial(
        chain_pem=_pem(chain),
        key_pem=private.pem,
        ca_pem=_pem(in_date),
        chain=chain,
        authorities=in_date,
        identity=identity,
    )


def read_certificates(path: Path) -> tuple[x509.Certificate, ...]:
    """The certificates of a PEM file, at least one.

    Raises:
        InvalidInput: `INVALID_CONFIGURATION`; the file is missing, too large or holds no certificate.
    """
    data = _read(path, private=False)
    try:
        return parse_certificates(data)
    except ValueError as error:
        raise _bad(path, "is not a certificate in PEM form") from error


def parse_certificates(data: bytes) -> tuple[x509.Certificate, ...]:
    """The certificates in PEM text, at least one; their extensions are not looked at yet.

    Raises:
        ValueError: there is none, or one cannot be read.
    """
    try:
        return tuple(x509.load_pem_x509_certificates(data))
    except x509.InvalidVersion as error:
        raise ValueError("a certificate of an unknown version") from error


def check_leaf(certificate: x509.Certificate, *, usage: x509.ObjectIdentifier, now: datetime) -> Identity:
    """Judge a process's certificate, ours or a peer's, whose signatures TLS has checked or will check.

    1. It is in date.
    2. It is not a CA's.
    3. Its extended key usage is `usage` and nothing else: a client's certificate cannot stand up a server.
    4. It has exactly one URI, which is a SPIFFE id. The common name counts for nothing, and two URIs are none: there
       must be nothing to choose from.

    The caller MUST still check the trust domain and the role.

    Returns:
        Who the certificate is for.

    Raises:
        Unauthenticated: one of the four does not hold.
    """
    check_dates(certificate, now)
    return leaf_identity(certificate, usage)


def check_dates(certificate: x509.Certificate, now: datetime) -> None:
    """Step 1 of `check_leaf`.

    Raises:
        Unauthenticated: the certificate is not in date.
    """
    if now > certificate.not_valid_after_utc:
        raise _useless(f"the certificate expired at {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC")
    if now < certificate.not_valid_before_utc:
        raise _useless(f"the certificate is not valid before {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC")


def leaf_identity(certificate: x509.Certificate, usage: x509.ObjectIdentifier) -> Identity:
    """Steps 2 to 4 of `check_leaf`: what no time changes.

    Raises:
        Unauthenticated: one of the three does not hold.
    """
    # 2
    if is_authority(certificate):
        raise _useless("the certificate is of a certificate authority, not of a process")
    # 3
    usages = _extension(certificate, x509.ExtendedKeyUsage)
    if usages is None or list(usages) != [usage]:
        raise _useless(f"the certificate is not for {_USAGE_NAMES[usage]} and nothing else (extended key usage)")
    # 4
    names = _extension(certificate, x509.SubjectAlternativeName)
    uris = [] if names is None else names.get_values_for_type(x509.UniformResourceIdentifier)
    if len(uris) != 1:
        raise _useless("the certificate must carry exactly one URI, its SPIFFE id")
    return parse_spiffe_id(uris[0])


def is_authority(certificate: x509.Certificate) -> bool:
    """Whether the certificate is of a certificate authority; `Unauthenticated` where its extensions cannot be read."""
    constraints = _extension(certificate, x509.BasicConstraints)
    return constraints is not None and constraints.ca


_Extension = TypeVar("_Extension", bound=x509.ExtensionType)


def _extension(certificate: x509.Certificate, kind: type[_Extension]) -> _Extension | None:
    """The extension's value, None where there is none; `Unauthenticated` where the extensions cannot be read."""
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None
    except (ValueError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as error:
        raise _useless("the certificate's extensions cannot be read") from error


def _useless(what: str) -> Unauthenticated:
    return Unauthenticated(Reason.UNAUTHENTICATED, what)


def issued_by_any(chain: Sequence[x509.Certificate], authorities: Sequence[x509.Certificate]) -> bool:
    """Whether one of `authorities` signed the certificate or one above it in its file."""
    return any(_issued(certificate, authority) for certificate in chain for authority in authorities)


def let_in_by_any(strangers: Sequence[x509.Certificate], authorities: Sequence[x509.Certificate]) -> bool:
    """Whether who trusts `authorities` trusts one of the CAs `strangers`, too: it is one of them, or below one."""
    trusted = {_public_der(authority) for authority in authorities}
    return any(_public_der(each) in trusted for each in strangers) or issued_by_any(strangers, authorities)


def _public_der(certificate: x509.Certificate) -> bytes:
    return certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _issued(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


@dataclass(frozen=True, kw_only=True)
class _PrivateKey:
    pem: bytes = field(repr=False)
    public_der: bytes


def _read_key(path: Path) -> _PrivateKey:
    data = _read(path, private=True)
    try:
        key = load_pem_private_key(data, password=None)
    except TypeError as error:
        raise _bad(path, "the key is encrypted; give it without a passphrase, in a file of mode 0600") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        # The cause may quote the file: it is kept for a debugger, and log lines never print a foreign text.
        raise _bad(path, "is not a private key in PEM form") from error
    return _PrivateKey(
        pem=key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        public_der=key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
    )


def _read(path: Path, *, private: bool) -> bytes:
    try:
        # Non-blocking: a FIFO in the file's place must not hang the start.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise _bad(path, (error.strerror or "cannot be opened").lower()) from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise _bad(path, "is not a file")
    with os.fdopen(descriptor, "rb") as file:
        if private and status.st_mode & 0o077:
            raise _bad(path, "the key can be read by others than its owner", hint=f"chmod 600 {path}")
        try:
            data = file.read(_MAX_FILE + 1)
        except OSError as error:
            raise _bad(path, (error.strerror or "cannot be read").lower()) from error
    if len(data) > _MAX_FILE:
        raise _bad(path, "is too large for a PEM file")
    return data


def _authority(path: Path, certificate: x509.Certificate) -> bool:
    try:
        return is_authority(certificate)
    except Unauthenticated as error:
        raise _bad(path, error.message) from error


def _pem(certificates: Sequence[x509.Certificate]) -> bytes:
    return b"".join(certificate.public_bytes(Encoding.PEM) for certificate in certificates)


def _bad(path: Path, what: str, **fields: str) -> InvalidInput:
    return InvalidInput(Reason.INVALID_CONFIGURATION, f"{path}: {what}", **fields)
