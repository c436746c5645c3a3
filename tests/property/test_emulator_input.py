"""Invariants tested: what strangers send to the emulator never raises, and JSON is read as JSON is."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emulator import guest, protocol
from emulator.driver import Driver
from emulator.footer import Footer
from emulator.kernel_hashes import _read
from emulator.qemu_words import decode_base64
from emulator.qmp_json import JsonStream, Stray, Value, dump
from tests.support.software_psp import make_psp

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def _without_nul(value: object) -> bool:
    return "\\u0000" not in json.dumps(value)


@given(values=st.lists(json_values.filter(_without_nul), max_size=4), cuts=st.lists(st.integers(1, 40), min_size=1))
def test_values_are_read_whatever_pieces_they_come_in(values: list[object], cuts: list[int]) -> None:
    stream, found = JsonStream(), []
    data = b"\n".join(json.dumps(value).encode() for value in values) + b"\n"
    at = turn = 0
    while at < len(data):
        size = cuts[turn % len(cuts)]
        found += list(stream.feed(data[at : at + size]))
        at, turn = at + size, turn + 1
    assert [item.value for item in found if isinstance(item, Value)] == values
    assert not [item for item in found if isinstance(item, Stray)]


@given(value=json_values)
def test_what_is_written_is_ascii_and_reads_back(value: object) -> None:
    line = dump({"return": value})
    assert line.endswith(b"\r\n")
    assert line.isascii()
    assert json.loads(line) == {"return": value}


@given(pieces=st.lists(st.binary(max_size=40), max_size=8))
def test_no_bytes_break_the_stream(pieces: list[bytes]) -> None:
    stream = JsonStream()
    for piece in pieces:
        for item in stream.feed(piece):
            assert isinstance(item, (Value, Stray))
    # Resynchronisation, as QEMU documents it: a byte that cannot be, and a newline.
    list(stream.feed(b"\xff\n"))
    assert list(stream.feed(b'{"a": 1}\n')) == [Value({"a": 1})]


@given(text=st.text(alphabet='{}[]:,"\\ntruefalse0123456789.eE+- ', max_size=60))
def test_text_that_python_calls_json_is_json_here_too(text: str) -> None:
    try:
        expected = json.loads(text, parse_int=lambda digits: int(digits) if len(digits) < 19 else float(digits))
    except ValueError:
        return
    found = [item for item in JsonStream().feed(text.encode() + b"\n") if isinstance(item, Value)]
    if isinstance(expected, float) and math.isinf(expected):
        return
    duplicates = '"' in text and "{" in text  # QEMU refuses what Python lets win
    assert found == [Value(expected)] or duplicates


@given(image=st.binary(max_size=256))
def test_no_image_breaks_the_footers_reader(image: bytes) -> None:
    Footer.read(image)


@given(noise=st.binary(max_size=64), lengths=st.lists(st.integers(0, 0xFFFF), max_size=4))
def test_no_footer_breaks_the_footers_reader(noise: bytes, lengths: list[int]) -> None:
    guid = bytes.fromhex("de82b596b21ff745baeaa366c55a082d")
    table = noise + b"".join(struct.pack("<H", length) + guid for length in lengths)
    Footer.read(table + struct.pack("<H", len(table) + 18) + guid + bytes(32))


@given(area=st.binary(max_size=300))
def test_no_memory_breaks_the_guest(area: bytes) -> None:
    table = bytes.fromhex("42f5741edd71664d963eef4287ff173b")
    for content in (area, table + area):
        assert list(guest.read_secrets(content)) is not None
        _read(content)


@given(text=st.text(max_size=60))
def test_no_text_breaks_the_base64_reader(text: str) -> None:
    assert len(decode_base64(text)) <= len(text)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Driver:
    made = Driver(make_psp(tmp_path_factory.mktemp("platform"), "naples"))
    made.init()
    return made


commands = st.sampled_from([*range(14), *range(0xFE, 0x10C), 0x1F0, protocol.OPEN, 0xFFFFFFFF])


@settings(max_examples=300, deadline=None)
@given(requests=st.lists(st.tuples(commands, st.binary(max_size=80)), max_size=12), writable=st.integers(0, 1))
def test_no_request_breaks_the_driver(driver: Driver, requests: list[tuple[int, bytes]], writable: int) -> None:
    descriptor = driver.open(writable)
    for command, payload in requests:
        reply = descriptor.issue(command, payload)
        assert 0 <= reply.errno < 1000
        assert len(reply.payload) <= protocol.MAX_PAYLOAD
        assert reply.errno == 0 or len(reply.payload) in {0, 4, 8}
    descriptor.close()
    assert driver.psp.guests == ()


def test_the_platform_still_answers_after_all_that(driver: Driver, tmp_path: Path) -> None:
    assert not list(tmp_path.iterdir())
    assert driver.open(protocol.READ_ONLY).issue(1, b"").errno == 0
