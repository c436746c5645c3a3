"""The footer table of firmware images: real ones, and everything that can be wrong with one."""

from __future__ import annotations

from uuid import UUID

import pytest

from common.sev.digest.ovmf import Area, Footer, parse_footer
from tests.support.firmware import (
    AMDSEV_ENTRIES,
    amdsev_image,
    entry,
    hashes_entry,
    reset_entry,
    secret_entry,
    with_footer,
)
from tests.support.vectors import vectors

_OTHER = "e47a6535-984a-4798-865e-4685a7bf8ec2"
_AMDSEV = Footer(
    reset_address=0x80B004,
    secret_area=Area(base=0x810000, size=0xC00),
    hashes_area=Area(base=0x810C00, size=0x400),
)


@pytest.mark.parametrize(
    ("name", "footer"),
    [
        ("ovmf_AmdSev_suffix.bin", _AMDSEV),
        ("ovmf_OvmfX64_suffix.bin", Footer(reset_address=0x80B004)),
        (
            "amdsev-20220126-last-4096.bin",
            Footer(
                reset_address=0x80B004,
                secret_area=Area(base=0x80C000, size=0xC00),
                hashes_area=Area(base=0x80CC00, size=0x400),
            ),
        ),
    ],
)
def test_footers_of_real_builds_are_read(name: str, footer: Footer) -> None:
    assert parse_footer((vectors() / "ovmf" / name).read_bytes()) == footer


def test_an_amdsev_footer_is_read_in_any_order_and_among_others() -> None:
    assert parse_footer(amdsev_image()) == _AMDSEV
    mixed = (entry(_OTHER, b"tdx!"), *reversed(AMDSEV_ENTRIES), entry(str(UUID(int=7)), b""))
    assert parse_footer(with_footer(b"", mixed)) == _AMDSEV


def test_areas_of_zero_are_no_areas() -> None:
    entries = (reset_entry(0), secret_entry(0, 0), hashes_entry(0, 0))
    assert parse_footer(with_footer(b"", entries)) == Footer()


def test_a_base_of_zero_or_a_size_of_zero_is_no_area() -> None:
    assert parse_footer(with_footer(b"", [secret_entry(0, 0xC00), hashes_entry(0x810C00, 0)])) == Footer()


def test_without_a_table_the_footer_is_empty() -> None:
    assert parse_footer(bytes(4096)) == Footer()


@pytest.mark.parametrize("size", [0, 1, 31, 32, 49, 50])
def test_an_image_too_small_for_a_table_has_none(size: int) -> None:
    assert parse_footer(bytes(size)) == Footer()


def test_the_oldest_form_has_the_reset_block_alone_at_the_tables_place() -> None:
    image = bytes(100) + reset_entry(0x80B004) + b"\x90" * 32
    assert parse_footer(image) == Footer(reset_address=0x80B004)


def test_of_two_entries_the_one_nearer_to_the_end_counts_as_in_qemu() -> None:
    assert parse_footer(with_footer(b"", [reset_entry(1), reset_entry(2)])) == Footer(reset_address=2)


def test_what_stands_before_an_impossible_entry_is_not_read() -> None:
    for length in (0, 17, 1000):
        broken = length.to_bytes(2, "little") + UUID(_OTHER).bytes_le
        image = with_footer(b"", [secret_entry(0x810000, 0xC00), broken, reset_entry(5)])
        assert parse_footer(image) == Footer(reset_address=5)


@pytest.mark.parametrize("length", [0, 17, 5000])
def test_a_table_of_impossible_length_is_none(length: int) -> None:
    image = bytearray(with_footer(b"", AMDSEV_ENTRIES))
    image[-50:-48] = length.to_bytes(2, "little")
    assert parse_footer(bytes(image)) == Footer()


def test_an_entry_too_short_for_its_content_says_nothing() -> None:
    entries = (
        entry("00f771de-1a7e-4fcb-890e-68c77e2fb44e", b"\x04\xb0\x80"),
        entry("4c2eb361-7d9b-4cc3-8081-127c90d3d294", b"\x00\x00\x81\x00"),
    )
    assert parse_footer(with_footer(b"", entries)) == Footer()


def test_entries_of_bytes_before_the_table_do_not_count() -> None:
    image = with_footer(reset_entry(0x1234), [secret_entry(0x810000, 0xC00)])
    assert parse_footer(image) == Footer(secret_area=Area(base=0x810000, size=0xC00))
