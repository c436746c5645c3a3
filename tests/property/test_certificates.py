"""Parsers of certificates return or raise ParseError, on any bytes; what they accept is what they write."""

from __future__ import annotations

import base64
import contextlib
import io
import struct
import zipfile
from collections.abc import Callable

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import Refused
from common.sev.abi import Usage
from common.sev.certs.amd import AmdCertificate, CaChain
from common.sev.certs.chain import Container, PlatformChain, read_container
from common.sev.certs.roots import complete_ark, named_root, pinned_roots, read_ca
from common.sev.certs.sev import KEY_ALGO, P384_ORDER, SevCertificate, encode
from common.sev.certs.verify import verify_platform
from common.sev.errors import ParseError
from tests.support.chains import make_platform, shared_ca

PLATFORM = make_platform()
FULL = PLATFORM.chain.to_bytes() + PLATFORM.ca.to_bytes()
NAPLES = pinned_roots()[0]


def _zip() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("pdh.cert", PLATFORM.chain.pdh.raw)
        archive.writestr("cert_chain.cert", PLATFORM.chain.to_bytes()[2084:])
    return file.getvalue()


ZIP = _zip()
SEEDS = [
    PLATFORM.chain.pdh.raw,
    PLATFORM.chain.to_bytes()[2084:],
    PLATFORM.chain.to_bytes(),
    FULL,
    PLATFORM.ca.ask.raw,
    shared_ca(2048).to_bytes(),
    NAPLES.ask.raw + NAPLES.ark.body,
    NAPLES.ark.body,
    ZIP,
    base64.b64encode(FULL),
    base64.b64encode(ZIP),
]
PARSERS: list[Callable[[bytes], object]] = [
    SevCertificate.parse,
    AmdCertificate.parse,
    CaChain.parse,
    PlatformChain.parse,
    read_container,
    read_ca,
    complete_ark,
]
SIZES = [576, 832, 1408, 1600, 1664, 2084, 3200, 6252, 8336, 9744, 10000, 11536]


def _sized(size: int) -> st.SearchStrategy[bytes]:
    """Bytes of a known length that begin as a certificate does, so that more than the length is looked at."""
    return st.binary(max_size=64).map(lambda data: (b"\x01\0\0\0" + data).ljust(size, b"\0")[:size])


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A good container with some bytes changed, cut out or put in."""
    data = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        match draw(st.sampled_from(["change", "cut", "insert", "end"])):
            case "change":
                data[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
            case "cut":
                del data[at : at + draw(st.sampled_from([1, 2, 520, 2084]))]
            case "insert":
                data[at:at] = draw(st.binary(max_size=8))
            case _:
                del data[at:]
    return bytes(data)


anything = st.one_of(st.binary(max_size=4096), st.sampled_from(SIZES).flatmap(_sized), damaged())


@pytest.mark.parametrize("parse", PARSERS, ids=lambda parse: parse.__qualname__)
@settings(max_examples=300, deadline=None)
@given(data=anything)
def test_a_parser_returns_or_raises_parse_error(parse: Callable[[bytes], object], data: bytes) -> None:
    with contextlib.suppress(ParseError):
        parse(data)


@settings(max_examples=300, deadline=None)
@given(data=anything)
def test_a_root_is_named_or_refused(data: bytes) -> None:
    try:
        root = named_root(data)
    except (ParseError, Refused):
        return
    assert root.emulated or root in pinned_roots()


@settings(max_examples=500, deadline=None)
@given(data=damaged())
def test_a_damaged_platform_is_refused_unless_it_is_the_same_one(data: bytes) -> None:
    try:
        container: Container = read_container(data)
        chain = container.platform()
        verify_platform(chain, [PLATFORM.root])
    except (ParseError, Refused):
        return
    assert chain == PLATFORM.chain


@settings(deadline=None)
@given(
    usage=st.sampled_from(sorted(KEY_ALGO)),
    scalar=st.integers(1, P384_ORDER - 1),
    api=st.tuples(st.integers(0, 255), st.integers(0, 255)),
)
def test_every_key_has_one_certificate_body(usage: Usage, scalar: int, api: tuple[int, int]) -> None:
    key = ec.derive_private_key(scalar, ec.SECP384R1()).public_key()
    cert = encode(usage=usage, algo=KEY_ALGO[usage], public_key=key, api_major=api[0], api_minor=api[1])
    again = SevCertificate.parse(cert.raw)
    assert again == cert
    assert again.public_key == key
    assert struct.unpack_from("<IBB", cert.raw) == (1, *api)


@settings(max_examples=200, deadline=None)
@given(at=st.integers(0, len(FULL) - 1), mask=st.integers(1, 255))
def test_what_a_parser_accepts_is_what_it_writes(at: int, mask: int) -> None:
    data = FULL[:at] + bytes([FULL[at] ^ mask]) + FULL[at + 1 :]
    try:
        container = read_container(data)
    except ParseError:
        return
    assert container.ca
    assert container.platform().to_bytes() + container.ca.to_bytes() == data
