"""Containers of certificates: each known form is recognised, and everything else is refused with a reason."""

from __future__ import annotations

import base64
import hashlib
import io
import textwrap
import zipfile
from dataclasses import replace

import pytest

from common.sev.abi import Usage
from common.sev.certs.amd import AmdCertificate
from common.sev.certs.chain import MAX_CONTAINER_SIZE, PlatformChain, read_container
from common.sev.certs.roots import pinned_root_of, pinned_roots
from common.sev.certs.sev import SevCertificate
from common.sev.errors import ParseError
from tests.support.chains import SyntheticPlatform, fresh_ca, make_platform, shared_ca
from tests.support.vectors import rome_chain


@pytest.fixture(scope="module")
def platform() -> SyntheticPlatform:
    return make_platform()


def _zip(members: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()


def _members(platform: SyntheticPlatform) -> dict[str, bytes]:
    chain, ca = platform.chain, platform.ca
    certs: dict[str, SevCertificate | AmdCertificate] = {
        "pdh": chain.pdh,
        "pek": chain.pek,
        "oca": chain.oca,
        "cek": chain.cek,
        "ask": ca.ask,
        "ark": ca.ark,
    }
    return {f"{name}.cert": cert.raw for name, cert in certs.items()}


def test_a_real_rome_export_is_read() -> None:
    data = rome_chain()
    chain = read_container(data).platform()
    assert chain.to_bytes() == data
    assert chain == PlatformChain.parse(data)


def test_a_chains_digest_is_that_of_its_export_and_no_other_chains(platform: SyntheticPlatform) -> None:
    chain = platform.chain
    assert chain.digest == hashlib.sha256(chain.to_bytes()).digest()
    assert replace(chain, pdh=make_platform().chain.pdh).digest != chain.digest
    assert replace(chain).digest == chain.digest


def test_an_export_is_the_four_certificates(platform: SyntheticPlatform) -> None:
    data = platform.chain.to_bytes()
    assert len(data) == 8336
    container = read_container(data)
    assert container.platform() == platform.chain
    assert container.ca is None
    assert container.missing == ()


@pytest.mark.parametrize(("bits", "size"), [(2048, 10000), (4096, 11536)])
def test_a_full_export_holds_the_ca_too(bits: int, size: int) -> None:
    platform = make_platform(bits=bits)
    data = platform.chain.to_bytes() + platform.ca.to_bytes()
    assert len(data) == size
    container = read_container(data)
    assert container.platform() == platform.chain
    assert container.ca == platform.ca.chain


def test_the_kernels_chain_lacks_the_pdh(platform: SyntheticPlatform) -> None:
    container = read_container(platform.unsigned_chain.to_bytes()[2084:])
    assert container.missing == (Usage.PDH,)
    with pytest.raises(ParseError, match="the container holds no PDH"):
        container.platform()


@pytest.mark.parametrize("name", ["pdh", "pek", "oca", "cek"])
def test_a_single_certificate_says_what_is_missing(platform: SyntheticPlatform, name: str) -> None:
    container = read_container(getattr(platform.chain, name).raw)
    assert getattr(container, name) == getattr(platform.chain, name)
    assert [usage.name.lower() for usage in container.missing] == [
        other for other in ("pdh", "pek", "oca", "cek") if other != name
    ]
    with pytest.raises(ParseError, match="holds no"):
        container.platform()


@pytest.mark.parametrize("bits", [2048, 4096])
def test_amds_certificates_are_read_alone_and_as_a_pair(bits: int) -> None:
    ca = shared_ca(bits)
    assert read_container(ca.to_bytes()).ca == ca.chain
    assert read_container(ca.ask.raw).ask == ca.ask
    assert read_container(ca.ark.raw).ark == ca.ark
    assert read_container(ca.ark.raw).ca is None


def test_the_short_naples_ark_is_read_where_it_stands() -> None:
    naples = pinned_roots()[0]
    assert read_container(naples.ark.body).ark == naples.ark
    pair = read_container(naples.ask.raw + naples.ark.body).ca
    assert pair
    assert pinned_root_of(pair) is naples
    full = read_container(make_platform().chain.to_bytes() + naples.ask.raw + naples.ark.body)
    assert full.ca == pair


@pytest.mark.parametrize("width", [None, 64, 76])
@pytest.mark.parametrize("part", [slice(0, 2084), slice(2084, None), slice(None)])
def test_base64_of_any_container_is_read(platform: SyntheticPlatform, part: slice, width: int | None) -> None:
    data = platform.chain.to_bytes()[part]
    text = base64.b64encode(data).decode()
    wrapped = "\r\n".join(textwrap.wrap(text, width)) + "\n" if width else text
    assert read_container(wrapped.encode()) == read_container(data)


def test_a_zip_of_sev_tool_is_read(platform: SyntheticPlatform) -> None:
    chain_file = platform.chain.pek.raw + platform.chain.oca.raw + platform.chain.cek.raw
    texts = {"pdh_readable.txt": b"version: 1", "cert_chain.cert": chain_file}
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        data = _zip(_members(platform) | texts, compression)
        container = read_container(data)
        assert container.platform() == platform.chain
        assert container.ca == platform.ca.chain
        assert read_container(base64.b64encode(data)) == container


def test_a_zip_may_hold_its_certificates_in_a_folder_and_in_any_order(platform: SyntheticPlatform) -> None:
    members = {f"certs/{name.upper()}": data for name, data in reversed(_members(platform).items())}
    assert read_container(_zip(members)).platform() == platform.chain


def test_a_zip_with_two_different_certificates_of_a_kind_is_refused(platform: SyntheticPlatform) -> None:
    other = make_platform()
    with pytest.raises(ParseError, match="two different certificates of kind PDH"):
        read_container(_zip({"a.cert": platform.chain.pdh.raw, "b.cert": other.chain.pdh.raw}))


def test_a_zip_without_certificates_is_refused() -> None:
    with pytest.raises(ParseError, match="holds no certificates"):
        read_container(_zip({"readme.txt": b"nothing here"}))


def test_a_zip_that_unpacks_to_much_is_refused() -> None:
    with pytest.raises(ParseError, match="more than 11536 bytes"):
        read_container(_zip({"pdh.cert": bytes(50_000_000)}))


def test_a_zip_with_many_members_is_refused() -> None:
    with pytest.raises(ParseError, match="65 members"):
        read_container(_zip({f"{number}.txt": b"" for number in range(65)}))


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_packed_in_an_unusual_way_is_refused(platform: SyntheticPlatform, compression: int) -> None:
    with pytest.raises(ParseError, match="packed in an unusual way"):
        read_container(_zip(_members(platform), compression))


def test_a_zip_within_a_zip_is_not_opened(platform: SyntheticPlatform) -> None:
    with pytest.raises(ParseError, match="no container of certificates"):
        read_container(_zip({"inner.cert": _zip(_members(platform))}))


def test_a_damaged_zip_is_refused(platform: SyntheticPlatform) -> None:
    data = _zip(_members(platform))
    for at in range(0, len(data), 7):
        damaged = data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]
        try:
            read_container(damaged)
        except ParseError:
            continue
    for cut in range(4, len(data), 97):
        with pytest.raises(ParseError):
            read_container(data[:cut])


@pytest.mark.parametrize(
    "order", [("pek", "pdh", "oca", "cek"), ("pek", "oca", "cek", "pdh"), ("pdh", "pek", "cek", "oca"), ("pdh",) * 4]
)
def test_certificates_out_of_order_are_refused_by_name(platform: SyntheticPlatform, order: tuple[str, ...]) -> None:
    data = b"".join(getattr(platform.chain, name).raw for name in order)
    found = ", ".join(order).upper()
    with pytest.raises(ParseError, match=f"the certificates are {found}, and should be PDH, PEK, OCA, CEK"):
        read_container(data)
    with pytest.raises(ParseError, match=f"PDH, PEK, OCA, CEK, not {found}"):
        PlatformChain.parse(data)


def test_a_ca_in_the_wrong_order_is_refused(platform: SyntheticPlatform) -> None:
    ca = platform.ca
    with pytest.raises(ParseError, match="not an ASK followed by an ARK"):
        read_container(platform.chain.to_bytes() + ca.ark.raw + ca.ask.raw)


@pytest.mark.parametrize("size", [0, 1, 3, 575, 2083, 2085, 4168, 6251, 8335, 8337, 9999, 11535, 11537])
def test_other_sizes_are_refused(size: int) -> None:
    with pytest.raises(ParseError):
        read_container((b"\x01\0\0\0" * size)[:size])


def test_too_much_is_refused_before_it_is_read() -> None:
    with pytest.raises(ParseError, match=f"at most {MAX_CONTAINER_SIZE} bytes"):
        read_container(bytes(MAX_CONTAINER_SIZE + 1))


@pytest.mark.parametrize("text", [b"not base64!", b"AAAA", b"=", "¿".encode(), b"QQ==QQ=="])
def test_text_that_is_no_certificate_is_refused(text: bytes) -> None:
    with pytest.raises(ParseError, match="no container of certificates"):
        read_container(text)


def test_another_certificate_takes_the_place_of_one_of_its_kind(platform: SyntheticPlatform) -> None:
    other = make_platform().chain.oca
    container = read_container(platform.chain.to_bytes()).having(other)
    assert container.platform() == replace(platform.chain, oca=other)
    assert container.having(fresh_ca().ask).ask is not None
