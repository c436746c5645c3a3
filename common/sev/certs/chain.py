"""Which certificates belong together, and the containers that tools and platforms carry them in.

    2084          one SEV certificate
    6252          PEK‖OCA‖CEK: the second part of the kernel's PDH_CERT_EXPORT, QEMU's `cert-chain`
    8336          PDH‖PEK‖OCA‖CEK: `sevctl export`
    10000, 11536  the same ‖ASK‖ARK: `sevctl export --full` (Naples, all later ones)
    832, 1600     one ASK or ARK; 1664, 3200: ASK‖ARK as AMD publishes them
    zip           sev-tool's `certs_export.zip`, or any zip of `*.cert` files of the above
    base64        of any of these, with or without line breaks

A container is recognised by its length and by the usage codes inside. Reading one verifies nothing.
"""

from __future__ import annotations

import binascii
import io
import struct
import zipfile
import zlib
from base64 import b64decode
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from typing import Any, Self

from common.sev.abi import (
    AMD_CERT_SIZE_2048,
    AMD_CERT_SIZE_4096,
    CHAIN_SIZE,
    PEK_OCA_CEK_SIZE,
    SEV_CERT_SIZE,
    Usage,
)
from common.sev.certs.amd import AmdCertificate, CaChain
from common.sev.certs.roots import SHORT_ARK_SIZE, complete_ark, read_ca
from common.sev.certs.sev import SevCertificate
from common.sev.errors import ParseError

__all__ = ["CaChain", "Container", "PlatformChain", "read_container"]

# Base64 of a full export has 15.4 KB; a zip beside it carries sev-tool's readable text files, some kilobytes each.
MAX_CONTAINER_SIZE = 256 * 1024
# sev-tool writes at most 6 certificates, as many texts and the chain file.
_MAX_ZIP_MEMBERS = 64

# What zipfile lets out on a damaged archive.
_DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    OSError,
    ValueError,
    RuntimeError,
    LookupError,
    OverflowError,
)

_PLATFORM = (Usage.PDH, Usage.PEK, Usage.OCA, Usage.CEK)
_PLATFORM_SIZES = {SEV_CERT_SIZE: 1, PEK_OCA_CEK_SIZE: 3, CHAIN_SIZE: 4}
_CA_SIZES = frozenset({2 * AMD_CERT_SIZE_2048, 2 * AMD_CERT_SIZE_4096, AMD_CERT_SIZE_2048 + SHORT_ARK_SIZE})
_AMD_SIZES = frozenset({AMD_CERT_SIZE_2048, AMD_CERT_SIZE_4096})

Certificate = SevCertificate | AmdCertificate


@dataclass(frozen=True, kw_only=True)
class PlatformChain:
    """What a platform exports about itself: kinds are right, nothing is verified."""

    pdh: SevCertificate
    pek: SevCertificate
    oca: SevCertificate
    cek: SevCertificate

    def __post_init__(self) -> None:
        found = tuple(cert.usage for cert in (self.pdh, self.pek, self.oca, self.cek))
        if found != _PLATFORM:
            raise ParseError(f"a platform's chain is PDH, PEK, OCA, CEK, not {_names(found)}")

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Decode PDH‖PEK‖OCA‖CEK, 8336 bytes.

        Raises:
            ParseError: these are not these four certificates in this order.
        """
        if len(data) != CHAIN_SIZE:
            raise ParseError(f"a platform's chain has {CHAIN_SIZE} bytes, not {len(data)}")
        pdh, pek, oca, cek = (SevCertificate.parse(part) for part in _split(data))
        return cls(pdh=pdh, pek=pek, oca=oca, cek=cek)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Deviations that were tolerated in any of the certificates."""
        certs = (self.pdh, self.pek, self.oca, self.cek)
        return tuple(warning for cert in certs for warning in cert.warnings)

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of all four, 32 bytes."""
        return sha256(self.to_bytes()).digest()

    def to_bytes(self) -> bytes:
        """PDH‖PEK‖OCA‖CEK, 8336 bytes."""
        return self.pdh.raw + self.pek.raw + self.oca.raw + self.cek.raw


@dataclass(frozen=True, kw_only=True)
class Container:
    """The certificates that some container held, each kind at most once; absent ones are None."""

    pdh: SevCertificate | None = None
    pek: SevCertificate | None = None
    oca: SevCertificate | None = None
    cek: SevCertificate | None = None
    ask: AmdCertificate | None = None
    ark: AmdCertificate | None = None

    @property
    def missing(self) -> tuple[Usage, ...]:
        """Which of PDH, PEK, OCA and CEK are not here."""
        return tuple(usage for usage in _PLATFORM if getattr(self, usage.name.lower()) is None)

    @property
    def ca(self) -> CaChain | None:
        """ASK and ARK, where both are here."""
        return CaChain(ask=self.ask, ark=self.ark) if self.ask and self.ark else None

    def platform(self) -> PlatformChain:
        """The platform's own four certificates.

        Raises:
            ParseError: some are missing; the message names them.
        """
        if self.pdh is None or self.pek is None or self.oca is None or self.cek is None:
            raise ParseError(f"the container holds no {_names(self.missing)}")
        return PlatformChain(pdh=self.pdh, pek=self.pek, oca=self.oca, cek=self.cek)

    def having(self, cert: Certificate) -> Container:
        """The same container with one certificate put in, in place of one of its kind."""
        field: dict[str, Any] = {cert.usage.name.lower(): cert}
        return replace(self, **field)


def read_container(data: bytes) -> Container:
    """Recognise a container by its length and contents, and decode it.

    Raises:
        ParseError: it is none of the known containers, is out of order, or holds one kind of certificate twice.
    """
    if len(data) > MAX_CONTAINER_SIZE:
        raise ParseError(f"a container of certificates has at most {MAX_CONTAINER_SIZE} bytes, not {len(data)}")
    data = bytes(data)
    return _collect(_read_any(data if _is_binary(data) else _from_base64(data)))


def _is_binary(data: bytes) -> bool:
    # Every certificate starts with version 1 as a little-endian u32, every zip with PK: neither is base64 text.
    return data.startswith((b"\x01\0\0\0", b"PK\x03\x04"))


def _from_base64(data: bytes) -> bytes:
    try:
        return b64decode(b"".join(data.split()), validate=True)
    except binascii.Error:
        raise ParseError(f"{len(data)} bytes are no container of certificates that is known") from None


def _read_any(data: bytes) -> Iterator[Certificate]:
    return _read_zip(data) if data.startswith(b"PK\x03\x04") else _read_plain(data)


def _read_plain(data: bytes) -> Iterator[Certificate]:
    if len(data) in _PLATFORM_SIZES:
        yield from _read_sev(data)
    elif len(data) - CHAIN_SIZE in _CA_SIZES:
        yield from _read_sev(data[:CHAIN_SIZE])
        yield from _read_ca(data[CHAIN_SIZE:])
    elif len(data) in _CA_SIZES:
        yield from _read_ca(data)
    elif len(data) in _AMD_SIZES:
        yield AmdCertificate.parse(data)
    elif len(data) == SHORT_ARK_SIZE:
        yield complete_ark(data)
    else:
        raise ParseError(f"{len(data)} bytes are no container of certificates that is known")


def _read_sev(data: bytes) -> Iterator[SevCertificate]:
    certs = [SevCertificate.parse(part) for part in _split(data)]
    expected = _PLATFORM[-len(certs) :]
    found = tuple(cert.usage for cert in certs)
    if len(certs) > 1 and found != expected:
        raise ParseError(f"the certificates are {_names(found)}, and should be {_names(expected)} in this order")
    yield from certs


def _read_ca(data: bytes) -> Iterator[AmdCertificate]:
    ca = read_ca(data)
    yield from (ca.ask, ca.ark)


def _read_zip(data: bytes) -> Iterator[Certificate]:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = [_read_member(archive, member) for member in _certificate_members(archive)]
    except ParseError:
        raise
    except _DAMAGED as error:
        raise ParseError("the zip file is damaged") from error
    for member in members:
        yield from _read_plain(member)


def _certificate_members(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    members = archive.infolist()
    if len(members) > _MAX_ZIP_MEMBERS:
        raise ParseError(f"the zip file has {len(members)} members, more than {_MAX_ZIP_MEMBERS}")
    return [member for member in members if member.filename.lower().endswith(".cert")]


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    largest = CHAIN_SIZE + max(_CA_SIZES)
    if member.compress_type not in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED} or member.flag_bits & 1:
        raise ParseError("a member of the zip file is encrypted or packed in an unusual way")
    with archive.open(member) as stream:
        content = stream.read(largest + 1)
    if len(content) > largest:
        raise ParseError(f"a member of the zip file has more than {largest} bytes")
    return content


def _collect(certs: Iterable[Certificate]) -> Container:
    found: dict[Usage, Certificate] = {}
    container = Container()
    for cert in certs:
        if found.setdefault(cert.usage, cert) != cert:
            raise ParseError(f"the container holds two different certificates of kind {cert.usage.name}")
        container = container.having(cert)
    if not found:
        raise ParseError("the container holds no certificates")
    return container


def _split(data: bytes) -> Iterator[bytes]:
    return (data[at : at + SEV_CERT_SIZE] for at in range(0, len(data), SEV_CERT_SIZE))


def _names(usages: Iterable[Usage]) -> str:
    return ", ".join(usage.name for usage in usages)
