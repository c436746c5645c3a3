"""Invariants of the pure SEV code. Of every parser: it returns or raises ParseError, on any bytes, and nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.sev.abi import PolicyBit
from common.sev.digest.compute import LaunchShape, hash_chunks, measure_firmware
from common.sev.digest.cpus import parse_cpu
from common.sev.digest.kernel_hashes import KernelHashes
from common.sev.digest.ovmf import Footer, parse_footer
from common.sev.digest.vmsa import Flavour
from common.sev.errors import ParseError
from common.sev.measurement import FirmwareVersion, MeasurementBlob, match, measure
from common.sev.policy import GuestPolicy
from common.sev.report import AttestationReport
from common.sev.secret import SecretEntry, build_table, parse_table, seal_packet
from common.sev.session import LaunchKeys
from tests.support.firmware import with_footer

_settings = settings(max_examples=300, deadline=None, database=None)

_TABLE_GUID = UUID("1e74f542-71dd-4d66-963e-ef4287ff173b").bytes_le
_FOOTER_GUID = UUID("96b582de-1fb2-45f7-baea-a366c55a082d").bytes_le
_ENTRY_GUIDS = [
    UUID(guid).bytes_le
    for guid in (
        "00f771de-1a7e-4fcb-890e-68c77e2fb44e",
        "4c2eb361-7d9b-4cc3-8081-127c90d3d294",
        "7255371f-3a3b-4b04-927b-1da6efa8d454",
    )
]

_u16 = st.integers(0, 0xFFFF).map(lambda value: value.to_bytes(2, "little"))
_u32 = st.integers(0, 0xFFFFFFFF).map(lambda value: value.to_bytes(4, "little"))
_small_u32 = st.integers(0, 60).map(lambda value: value.to_bytes(4, "little"))
_small_u16 = st.integers(0, 60).map(lambda value: value.to_bytes(2, "little"))

# Bytes that look like a table until they do not.
_tables = st.builds(
    lambda length, entries, rest: _TABLE_GUID + length + b"".join(entries) + rest,
    _small_u32 | _u32,
    st.lists(
        st.builds(
            lambda guid, size, data: guid + size + data,
            st.binary(min_size=16, max_size=16),
            _small_u32 | _u32,
            st.binary(max_size=30),
        ),
        max_size=4,
    ),
    st.binary(max_size=40),
)
_footers = st.builds(
    lambda entries, length, reset: b"".join(entries) + length + _FOOTER_GUID + reset,
    st.lists(
        st.builds(
            lambda data, size, guid: data + size + guid,
            st.binary(max_size=20),
            _small_u16 | _u16,
            st.sampled_from(_ENTRY_GUIDS),
        ),
        max_size=4,
    ),
    _small_u16 | _u16,
    st.binary(min_size=32, max_size=32),
)
_reports = st.builds(
    lambda head, policy, tail: head + policy + bytes.fromhex("0210000002000000") + tail,
    st.binary(min_size=48, max_size=48),
    _u32,
    st.binary(min_size=148, max_size=148),
)


@pytest.mark.parametrize(
    "parse",
    [MeasurementBlob.parse, AttestationReport.parse, parse_table, parse_footer, lambda data: measure_firmware([data])],
    ids=["measurement blob", "attestation report", "secret table", "footer", "firmware"],
)
@_settings
@given(data=st.binary(max_size=300) | _tables | _footers | _reports)
def test_a_parser_of_bytes_returns_or_raises_parse_error(parse: Callable[[bytes], object], data: bytes) -> None:
    with suppress(ParseError):
        parse(data)


@pytest.mark.parametrize("parse", [FirmwareVersion.parse, parse_cpu], ids=["version", "CPU type"])
@_settings
@given(text=st.text(max_size=30) | st.from_regex(r"[0-9]{1,4}[-.][0-9]{1,4}[-.][0-9]{1,4}\n?", fullmatch=True))
def test_a_parser_of_text_returns_or_raises_parse_error(parse: Callable[[str], object], text: str) -> None:
    with suppress(ParseError):
        parse(text)


@_settings
@given(value=st.integers(-1, 1 << 33) | st.integers(0, 0x3F) | st.sampled_from([0x3701000F, 0xFFFF003F]))
def test_a_policy_is_kept_exactly_or_refused(value: int) -> None:
    try:
        policy = GuestPolicy.parse(value)
    except ParseError:
        assert not 0 <= value < 1 << 32 or value & 0xFFC0
        return
    assert int.from_bytes(policy.to_bytes(), "little") == value
    assert GuestPolicy.build(policy.bits, policy.minimum_api) == policy
    assert policy.requires_es == bool(value & PolicyBit.ES)
    assert f"0x{value:08x}" in str(policy)


_entries = st.lists(
    st.builds(
        lambda guid, data: SecretEntry(guid=guid, data=data),
        st.uuids().filter(lambda guid: guid.int != 0),
        st.binary(max_size=80),
    ),
    min_size=1,
    max_size=64,
    unique_by=lambda entry: entry.guid,
).map(tuple)


@_settings
@given(entries=_entries, more=st.binary(max_size=50))
def test_a_table_is_read_back_as_it_was_built_whatever_follows(entries: tuple[SecretEntry, ...], more: bytes) -> None:
    table = build_table(entries)
    assert len(table) % 16 == 0
    assert parse_table(table) == entries
    # With the padding counted in, as other programs write the length.
    padded = table[:16] + len(table).to_bytes(4, "little") + table[20:]
    assert parse_table(padded) == entries
    assert parse_table(table + more) == entries


@_settings
@given(entries=_entries, iv=st.binary(min_size=16, max_size=16), measurement=st.binary(min_size=32, max_size=32))
def test_a_packet_opens_to_its_table_and_holds_nothing_of_it(
    entries: tuple[SecretEntry, ...], iv: bytes, measurement: bytes
) -> None:
    keys = LaunchKeys(tek=b"\x01" * 16, tik=b"\x02" * 16)
    table = build_table(entries)

    def sealed(data: bytes) -> bytes:
        return seal_packet(keys=keys, table=data, measurement=measurement, iv=iv, area_size=0x4000).payload

    payload = sealed(table)
    assert len(payload) == len(table)
    assert table[:16] not in payload
    assert sealed(payload) == table


@_settings
@given(
    address=st.integers(0, 0xFFFFFFFF),
    secret=st.tuples(st.integers(0, 0xFFFFFFFF), st.integers(0, 0xFFFFFFFF)),
    code=st.binary(max_size=500),
    cut=st.integers(1, 100),
)
def test_a_footer_is_read_the_same_from_any_chunks(
    address: int, secret: tuple[int, int], code: bytes, cut: int
) -> None:
    data = b"".join(number.to_bytes(4, "little") for number in secret)
    entries = [
        address.to_bytes(4, "little") + (22).to_bytes(2, "little") + _ENTRY_GUIDS[0],
        data + (26).to_bytes(2, "little") + _ENTRY_GUIDS[1],
    ]
    image = with_footer(code, entries)
    firmware = measure_firmware(image[at : at + cut] for at in range(0, len(image), cut))
    footer: Footer = firmware.footer
    assert footer == parse_footer(image)
    assert footer.reset_address == (address or None)
    area = None if footer.secret_area is None else (footer.secret_area.base, footer.secret_area.size)
    assert area == (secret if all(secret) else None)
    assert firmware.sha256 == hashlib.sha256(image).digest()


@_settings
@given(
    vcpus=st.integers(1, 64),
    flavour=st.sampled_from(Flavour),
    cmdline=st.none() | st.binary(max_size=50),
    tik=st.binary(min_size=16, max_size=16).filter(any),
    position=st.integers(0, 3),
)
def test_only_the_measured_shape_matches(
    vcpus: int, flavour: Flavour, cmdline: bytes | None, tik: bytes, position: int
) -> None:
    image = with_footer(
        b"code",
        [
            bytes.fromhex("04b08000") + (22).to_bytes(2, "little") + _ENTRY_GUIDS[0],
            bytes.fromhex("000c810000040000") + (26).to_bytes(2, "little") + _ENTRY_GUIDS[2],
        ],
    )
    shape = LaunchShape(
        firmware=measure_firmware([image]),
        hashes=KernelHashes.of(hash_chunks([b"kernel"]), None, cmdline),
        vcpus=vcpus,
        cpu=parse_cpu("EPYC-Milan"),
        flavour=flavour,
    )
    version, policy, nonce = FirmwareVersion(1, 55, 24), GuestPolicy.parse(0xF), bytes(16)
    made = measure(tik=tik, firmware=version, policy=policy, digest=shape.digest(), nonce=nonce)
    blob = MeasurementBlob(measurement=made, nonce=nonce)
    others = [hashlib.sha256(bytes([number])).digest() for number in range(3)]
    digests = [*others[:position], shape.digest(), *others[position:]]
    assert match(tik=tik, blob=blob, firmware=version, policy=policy, digests=digests) == position
    assert match(tik=tik, blob=blob, firmware=version, policy=policy, digests=others) is None
