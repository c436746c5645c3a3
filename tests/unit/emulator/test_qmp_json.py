"""QMP's JSON from a client that means harm: deep, long and endless values cost what they cost to read, and no more."""

from __future__ import annotations

import json
import random
import time
import tracemalloc
from collections.abc import Iterable

import pytest

from emulator import qmp_json
from emulator.qmp_json import JsonStream, Stray, Value, dump

MIB = 1 << 20


def read(pieces: Iterable[bytes]) -> list[Value | Stray]:
    stream = JsonStream()
    return [found for piece in pieces for found in stream.feed(piece)]


def test_an_id_nested_as_deep_as_is_allowed_is_written_back() -> None:
    deepest = qmp_json.MAX_NESTING - 1
    text = b'{"id": ' + b"[" * deepest + b"]" * deepest + b"}"
    (found,) = read([text])
    assert isinstance(found, Value)
    assert dump(found.value) == text + b"\r\n"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b"[18446744073709551615]", 18446744073709551615),
        (b"[-9223372036854775808]", -9223372036854775808),
        (b"[18446744073709551616]", 18446744073709551616.0),
        (b"[-9223372036854775809]", -9223372036854775809.0),
        (b"[" + b"1" + b"0" * 5000 + b"]", float("inf")),
    ],
)
def test_integers_beyond_64_bits_are_floating_point_as_in_qemu(text: bytes, value: float) -> None:
    (found,) = read([text])
    assert found == Value([value])
    assert isinstance(found.value, list)
    assert type(found.value[0]) is type(value)


@pytest.mark.parametrize("piece", [b"x" * 65536, b"\\n" * 32768, b"'\\\"" * 20000, b"\\u00e9" * 10000])
def test_a_long_string_is_looked_at_once(piece: bytes) -> None:
    # Scanning what came before again for each piece took a minute for these 8 MiB, and half a gigabyte.
    count = 8 * MIB // len(piece)
    pieces = [b'{"a": "', *[piece] * count]
    stream = JsonStream()
    tracemalloc.start()
    began = time.process_time()
    assert not [found for part in pieces for found in stream.feed(part)]
    took, (_, peak) = time.process_time() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert took < 5
    assert peak < 32 * MIB
    (found,) = stream.feed(b'"}')
    assert found == Value({"a": json.loads(b'"' + piece.replace(b"\\'", b"'") + b'"') * count})


@pytest.mark.parametrize("start", [b"", b"[", b"1.", b"1e"])
def test_a_long_number_or_keyword_is_looked_at_once(start: bytes) -> None:
    piece = b"a" * 65536 if start == b"[" else b"1" * 65536
    began = time.process_time()
    assert read([start, *[piece] * 128]) == []
    assert time.process_time() - began < 5


@pytest.mark.parametrize("piece", [b"x" * 500, b"1" * 500, b"a" * 500])
def test_a_token_that_does_not_end_is_dropped_at_the_limit(monkeypatch: pytest.MonkeyPatch, piece: bytes) -> None:
    monkeypatch.setattr(qmp_json, "MAX_TOKENS_SIZE", 1000)
    stream = JsonStream()
    start = b'"' if piece[:1] == b"x" else b""
    found = [item for part in (start, piece, piece, piece) for item in stream.feed(part)]
    assert found == [Stray("JSON token size limit exceeded")]


def test_bytes_mean_the_same_one_by_one_and_all_at_once() -> None:
    dice = random.Random(7)  # noqa: S311 -- a repeatable choice of inputs
    words = [b'"', b"'", b"\\", b"{", b"}", b"[", b"]", b":", b",", b"0", b"12", b"-", b".5", b"e", b"true", b"nul"]
    words += [b" ", b"\n", b"\t", b"\xff", b"\0", b"\\u00e9", b"\\\xfe", b"a" * 40, b"9" * 40, b"A"]
    for _ in range(4000):
        data = b"".join(dice.choices(words, k=dice.randrange(1, 14))) + b"\xff\n"
        assert read([data]) == read(data[at : at + 1] for at in range(len(data))), data
