"""How a secret may show in a log line, a message or a file: raw, in hex, in base64, forwards and backwards."""

from __future__ import annotations

import base64
from collections.abc import Iterator


def spellings(secret: bytes) -> Iterator[bytes]:
    """Every spelling; in base64 also as it looks in the middle of something longer."""
    for value in (secret, secret[::-1]):
        yield value
        yield value.hex().encode()
        yield value.hex().upper().encode()
        for shift in range(3):
            text = base64.b64encode(bytes(shift) + value)[4 if shift else 0 : -4]
            yield text
            yield text.replace(b"+", b"-").replace(b"/", b"_")


def shown_in(secret: bytes, *places: str | bytes) -> list[bytes]:
    """The spellings of a secret that stand in any of the places."""
    shown = [place.encode() if isinstance(place, str) else place for place in places]
    return [spelling for spelling in spellings(secret) if any(spelling in place for place in shown)]
