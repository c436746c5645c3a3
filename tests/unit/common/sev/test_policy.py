"""The guest policy word."""

from __future__ import annotations

import pytest

from common.sev.abi import PolicyBit
from common.sev.errors import ParseError
from common.sev.policy import GuestPolicy


def test_the_word_is_kept_as_it_came() -> None:
    policy = GuestPolicy.parse(0x16000005)
    assert policy.value == 0x16000005
    assert policy.to_bytes() == bytes.fromhex("05000016")


def test_bits_and_minimum_api_are_read_from_their_places() -> None:
    policy = GuestPolicy.parse(0x37010000 | 0b010101)
    assert policy.bits == PolicyBit.NODBG | PolicyBit.ES | PolicyBit.DOMAIN
    assert policy.minimum_api == (1, 55)


def test_a_built_policy_is_the_parsed_one() -> None:
    built = GuestPolicy.build(PolicyBit.NODBG | PolicyBit.NOKS | PolicyBit.ES | PolicyBit.NOSEND, (1, 55))
    assert built == GuestPolicy.parse(0x3701000F)


@pytest.mark.parametrize(("value", "es"), [(0x4, True), (0x3F, True), (0x3B, False), (0x37010000, False)])
def test_registers_are_measured_only_where_the_policy_asks_for_es(value: int, *, es: bool) -> None:
    assert GuestPolicy.parse(value).requires_es is es


@pytest.mark.parametrize("bit", range(6, 16))
def test_a_reserved_bit_is_refused(bit: int) -> None:
    with pytest.raises(ParseError, match="reserved"):
        GuestPolicy.parse(0x5 | 1 << bit)


@pytest.mark.parametrize("value", [-1, 1 << 32, 1 << 64])
def test_what_is_no_32_bit_word_is_refused(value: int) -> None:
    with pytest.raises(ParseError, match="32 bits"):
        GuestPolicy.parse(value)


@pytest.mark.parametrize("api", [(256, 0), (0, 256), (-1, 0), (0, -1)])
def test_an_api_number_beyond_a_byte_is_refused(api: tuple[int, int]) -> None:
    with pytest.raises(ParseError, match="two bytes"):
        GuestPolicy.build(PolicyBit.ES, api)


@pytest.mark.parametrize("bits", [1 << 6, 1 << 16, -1])
def test_a_bit_beyond_the_six_is_refused(bits: int) -> None:
    with pytest.raises(ParseError):
        GuestPolicy.build(bits)  # type: ignore[arg-type]  # what an untyped caller might pass


def test_a_policy_names_its_bits_to_people() -> None:
    assert str(GuestPolicy.parse(0x3701000F)) == "0x3701000f (NODBG NOKS ES NOSEND API>=1.55)"
    assert str(GuestPolicy.parse(0)) == "0x00000000 (nothing is forbidden)"
