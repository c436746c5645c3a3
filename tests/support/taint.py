"""Requests with one field changed: every field that a request's descriptor has, changed in every way that matters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

from google.protobuf.message import Message

SEED = 20260301
FLIPS = 24


@dataclass(frozen=True, kw_only=True)
class Case:
    """One request with one field changed."""

    path: str
    how: str
    request: Any


def paths(message: Message, prefix: str = "") -> Iterator[str]:
    """Every leaf field of a request, also those that are not set."""
    for field in message.DESCRIPTOR.fields:
        name = prefix + field.name
        if field.message_type is not None and not field.is_repeated:
            yield from paths(getattr(message, field.name), name + ".")
        else:
            yield name


def changes(value: Any, other: Any, random: Random) -> Iterator[tuple[str, Any]]:
    """Other values for a field."""
    if isinstance(value, bool):
        yield "not", not value
    elif isinstance(value, bytes):
        for _ in range(FLIPS if value else 0):
            bit = random.randrange(len(value) * 8)
            flipped = bytearray(value)
            flipped[bit // 8] ^= 1 << bit % 8
            yield f"bit {bit}", bytes(flipped)
        yield from (
            ("empty", b""),
            ("cut", value[:-1]),
            ("longer", value + b"\0"),
            ("doubled", value * 2),
            ("zeros", bytes(len(value))),
            ("ones", b"\xff" * len(value)),
            ("random", random.randbytes(len(value) or 64)),
        )
    elif isinstance(value, str):
        yield from (
            ("empty", ""),
            ("cut", value[:-1]),
            ("longer", value + "0"),
            ("upper", value.upper() + " "),
            ("braces", "{" + value + "}"),
            ("path", "../" + value),
            ("nul", value + "\0"),
            ("long", "a" * 4096),
            ("unicode", "\N{GREEK SMALL LETTER ALPHA}" * 3),
        )
    elif isinstance(value, int):
        yield from (
            (str(number), number)
            for number in (0, 1, value + 1, abs(value - 1), value ^ 0x80, 255, 256, 256 + value, 2**31 - 1)
        )
    else:  # a list of text
        yield from (("none", []), ("twice", [*value, *value]), ("garbage", ["}{"]), ("many", ["x"] * 1000))
    if other is not None:
        yield "another's", other


def cases(request: Any, others: dict[str, Any]) -> Iterator[Case]:
    """The request with each field changed in each way."""
    random = Random(SEED)  # noqa: S311 -- a test's choice of bits
    for path in list(paths(type(request)())):
        *parents, name = path.split(".")
        holder = request
        for parent in parents:
            holder = getattr(holder, parent)
        value = getattr(holder, name)
        for how, new in changes(value, others.get(path), random):
            copy = type(request)()
            copy.CopyFrom(request)
            target = copy
            for parent in parents:
                target = getattr(target, parent)
            if isinstance(new, list):
                getattr(target, name)[:] = new
            else:
                setattr(target, name, new)
            if copy != request:
                yield Case(path=path, how=how, request=copy)
        copy = type(request)()
        copy.CopyFrom(request)
        target = copy
        for parent in parents:
            target = getattr(target, parent)
        target.ClearField(name)
        if copy != request:
            yield Case(path=path, how="absent", request=copy)
