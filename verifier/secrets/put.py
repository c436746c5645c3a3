"""What the owner puts into the store as a secret: judged, and sealed to the name and version that it gets."""

from __future__ import annotations

import re
from collections.abc import Callable

from common.errors import InvalidInput, Reason
from common.sev.abi import PACKET_MAX_SIZE
from verifier.keys.base import SealingKey, secret_place

SECRET_MAX = PACKET_MAX_SIZE  # bytes: no packet could hold more
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")  # as documents are named


def require_secret_name(name: str) -> None:
    """Refuse what is no name of a secret.

    Raises:
        InvalidInput: INVALID_ARGUMENT.
    """
    if not _NAME.fullmatch(name):
        raise _invalid("name", "must be 1 to 128 of A-Z a-z 0-9 . _ -, and start with none of . and -")


def secret_to_put(name: str, value: bytes, sealing: SealingKey) -> Callable[[int], bytes]:
    """What `Store.put_secret` wants: the sealed blob of `value` for the version that it gets.

    The blob is made within the store's transaction; there the function raises what `SealingKey.seal` raises.

    Raises:
        InvalidInput: INVALID_ARGUMENT; the name is none, or the value is empty or larger than `SECRET_MAX`. No message
            holds any of the value.
    """
    require_secret_name(name)
    if not value:
        raise _invalid("value", "is empty")
    if len(value) > SECRET_MAX:
        raise _invalid("value", f"has {len(value)} bytes, a guest can be given {SECRET_MAX}")

    def seal(version: int) -> bytes:
        return sealing.seal(value, secret_place(name, version))

    return seal


def _invalid(field: str, what: str) -> InvalidInput:
    return InvalidInput(Reason.INVALID_ARGUMENT, f"{field}: {what}", field=field)
