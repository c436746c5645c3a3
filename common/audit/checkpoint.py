"""Checkpoints: the verifier's signed word about how far its log went, which nobody who only has the database can give.

A checkpoint is a token of the kind `sevattest-checkpoint+jwt` with the claims `number` and `hash` (64 hex digits) of
the record that was the last one, `iat` (the log's time then, seconds since 1970) and `iss`. A log that was cut off,
written anew or forked contradicts one of them; what came after the newest checkpoint is not covered yet. Whoever keeps
a checkpoint elsewhere also finds a log that lost its newest checkpoints together with its end.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any

import msgspec

from common.audit.chain import GENESIS, HASH_SIZE, Head, Link, broken, walk_chain
from common.audit.jws import CHECKPOINT_TYPE, KeySet, verify_jws
from common.errors import InvalidInput, Reason

# The time of a log never goes back, whoever signs; older verifiers signed by their clocks, which may be this far apart.
SKEW_S = 600


class _Claims(msgspec.Struct, frozen=True, kw_only=True):
    number: Annotated[int, msgspec.Meta(ge=1)]
    hash: str
    iat: Annotated[int, msgspec.Meta(ge=0)]
    iss: str


@dataclass(frozen=True, kw_only=True)
class SignedHead:
    """A checkpoint whose signature holds.

    Attributes:
        head: where the log stood.
        iat: the log's time then, seconds since 1970.
        iss: who signed it.
        token: the checkpoint itself.
    """

    head: Head
    iat: int
    iss: str
    token: str


def checkpoint_claims(head: Head, *, time: datetime, issuer: str) -> dict[str, Any]:
    """What to sign, as a token of the kind `CHECKPOINT_TYPE`."""
    return {"number": head.number, "hash": head.hash.hex(), "iat": int(time.timestamp()), "iss": issuer}


def read_checkpoint(token: str | bytes, keys: KeySet) -> SignedHead:
    """Verify one checkpoint.

    Raises:
        InvalidInput: it is no token, or its claims are not a checkpoint's (MALFORMED).
        Refused: its signature does not hold, or it is a token of another kind (BAD_SIGNATURE).
    """
    claims = verify_jws(token, keys, typ=CHECKPOINT_TYPE).claims
    text = token if isinstance(token, str) else token.decode()
    try:
        known = msgspec.convert(claims, _Claims)
        digest = bytes.fromhex(known.hash)
    except ValueError:  # msgspec's own is one
        raise _no_checkpoint() from None
    if len(digest) != HASH_SIZE or digest.hex() != known.hash or known.number >> 64:
        raise _no_checkpoint()
    return SignedHead(head=Head(number=known.number, hash=digest), iat=known.iat, iss=known.iss, token=text)


def verify_checkpoints(tokens: Iterable[str | bytes], keys: KeySet) -> Sequence[SignedHead]:
    """Verify checkpoints against each other; they come back sorted by their numbers, each number once.

    Args:
        tokens: in any order; what the verifier shows and what was kept elsewhere.
        keys: which keys may have signed them.

    Raises:
        InvalidInput: one is no checkpoint (MALFORMED).
        Refused: one is not signed, two say different things of one record, or one that says more is older
            by more than ten minutes: the log was set back in between (BAD_SIGNATURE, field `number`).
    """
    heads = sorted((read_checkpoint(token, keys) for token in tokens), key=lambda each: (each.head.number, each.iat))
    kept: list[SignedHead] = []
    for signed in heads:
        before = kept[-1] if kept else None
        if before is not None and before.head.number == signed.head.number:
            if before.head.hash != signed.head.hash:
                raise broken(signed.head.number, "was signed with two different hashes: the log was forked")
            continue
        if before is not None and signed.iat < before.iat - SKEW_S:
            raise broken(
                signed.head.number,
                f"was signed before record {before.head.number}, which is older: the log was set back",
            )
        kept.append(signed)
    return kept


def verify_log(links: Iterable[Link], checkpoints: Iterable[SignedHead], start: Head = GENESIS) -> Head:
    """Verify a log from `start` on, against itself and against what was signed; the head that it leads to.

    Args:
        links: from the one after `start`, in the order of their numbers; read as they are asked for.
        checkpoints: as `verify_checkpoints` gave them. Those before `start` are not looked at.
        start: a head that is trusted already.

    Raises:
        Refused: a record is missing, changed or not in its place, the log is not the one that was signed, or it ends
            before the newest checkpoint (BAD_SIGNATURE, field `number`).
    """
    signed = {each.head.number: each.head.hash for each in checkpoints}
    _compare(start, signed)
    head = start
    for head in walk_chain(links, start):
        _compare(head, signed)
    newest = max(signed, default=0)
    if newest > head.number:
        raise broken(head.number + 1, f"is missing: the log was signed up to record {newest}")
    return head


def _compare(head: Head, signed: dict[int, bytes]) -> None:
    if signed.get(head.number, head.hash) != head.hash:
        raise broken(head.number, "is not the one that was signed: the log was written anew up to there")


def _no_checkpoint() -> InvalidInput:
    return InvalidInput(Reason.MALFORMED, "a token's claims are not those of a checkpoint")
