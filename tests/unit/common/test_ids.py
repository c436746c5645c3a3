"""Identifiers that the verifier makes."""

from __future__ import annotations

from uuid import RFC_4122, UUID

from hypothesis import given
from hypothesis import strategies as st

from common.ids import canonical_uuid, ordered_uuid

# RFC 9562 appendix A.6: a UUID of version 7 made at 2022-02-22 19:22:22 UTC.
_RFC_TIME_MS = 0x017F22E279B0
_RFC_UUID = UUID("017f22e2-79b0-7cc3-98c4-dc0c0c07398f")


def test_the_rfcs_own_example_is_made_of_its_parts() -> None:
    # Its 12 bits after the version are random; here they are the part of a millisecond that gives the same bits.
    fraction = -(-0xCC3 * 1_000_000 // 4096)
    random = (_RFC_UUID.int & ((1 << 64) - 1)).to_bytes(8, "big")
    assert ordered_uuid(_RFC_TIME_MS * 1_000_000 + fraction, random) == _RFC_UUID


_times = st.integers(0, (1 << 48) * 1_000_000 - 1)


@given(_times, st.binary(min_size=8, max_size=8))
def test_it_is_a_canonical_uuid_of_version_7_whatever_the_time(time_ns: int, random: bytes) -> None:
    made = ordered_uuid(time_ns, random)
    assert (made.version, made.variant) == (7, RFC_4122)
    assert canonical_uuid(str(made)) == made


@given(_times, _times, st.binary(min_size=8, max_size=8), st.binary(min_size=8, max_size=8))
def test_later_ones_stand_behind_earlier_ones(one: int, other: int, first: bytes, second: bytes) -> None:
    earlier, later = sorted((one, other))
    if later - earlier >= 245:  # nanoseconds: the smallest step that 12 bits of a millisecond can show
        assert str(ordered_uuid(earlier, first)) < str(ordered_uuid(later, second))


def test_all_62_bits_of_the_noise_are_kept() -> None:
    assert len({ordered_uuid(0, (1 << bit).to_bytes(8, "big")) for bit in range(62)}) == 62
