"""Checkpoints: a log that was cut off, written anew or forked contradicts what was signed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from common.audit.chain import GENESIS, Head, Link, record_hash
from common.audit.checkpoint import checkpoint_claims, read_checkpoint, verify_checkpoints, verify_log
from common.audit.jws import CHECKPOINT_TYPE, RECEIPT_TYPE, read_key_set
from common.errors import InvalidInput, Reason, Refused
from tests.unit.common.audit.test_chain import TIME, chain, fields
from verifier.keys.signer import Signer

SIGNER = Signer(ec.derive_private_key(7, ec.SECP256R1()))
KEYS = read_key_set(json.dumps(SIGNER.jwks()).encode())
LOG = chain(10)


def head(number: int, links: Sequence[Link] = LOG) -> Head:
    return Head(number=number, hash=links[number - 1].hash)


def token(at: Head, seconds: int = 0, *, typ: str = CHECKPOINT_TYPE, signer: Signer = SIGNER, **changes: Any) -> str:
    claims = checkpoint_claims(at, time=TIME + timedelta(seconds=seconds), issuer="owner") | changes
    return signer.sign(claims, typ=typ)


def rewritten(changed: int) -> list[Link]:
    """The log as somebody writes it anew who has the database and changes one record: all hashes fit."""
    links, previous = list(LOG[: changed - 1]), LOG[changed - 2].hash
    for number in range(changed, len(LOG) + 1):
        members = fields(number, event="launch.expired") if number == changed else fields(number)
        previous = record_hash(previous, number, members)
        links.append(Link(number=number, hash=previous, fields=members))
    return links


def test_a_checkpoint_says_where_the_log_stood() -> None:
    signed = read_checkpoint(token(head(4)), KEYS)
    assert (signed.head, signed.iat, signed.iss) == (head(4), int(TIME.timestamp()), "owner")


def test_a_log_that_is_what_was_signed_verifies() -> None:
    signed = verify_checkpoints([token(head(7), 5), token(head(4)), token(head(10), 9)], KEYS)
    assert [each.head.number for each in signed] == [4, 7, 10]
    assert verify_log(LOG, signed) == head(10)
    assert verify_log(LOG, []) == head(10)
    assert verify_log([], []) == GENESIS
    assert verify_log(LOG[5:], signed, start=head(5)) == head(10)


def test_what_came_after_the_newest_checkpoint_is_chained_but_not_signed_yet() -> None:
    signed = verify_checkpoints([token(head(4))], KEYS)
    assert verify_log(rewritten(8), signed).number == 10


@pytest.mark.parametrize("length", [0, 3, 6])
def test_a_log_that_was_cut_off_is_found(length: int) -> None:
    signed = verify_checkpoints([token(head(4)), token(head(7))], KEYS)
    with pytest.raises(Refused, match=f"record {length + 1} is missing: the log was signed up to record 7") as caught:
        verify_log(LOG[:length], signed)
    assert caught.value.fields["number"] == str(length + 1)


@pytest.mark.parametrize("changed", [2, 4, 7])
def test_a_log_that_was_written_anew_is_found(changed: int) -> None:
    signed = verify_checkpoints([token(head(7))], KEYS)
    with pytest.raises(Refused, match="record 7 is not the one that was signed") as caught:
        verify_log(rewritten(changed), signed)
    assert caught.value.reason is Reason.BAD_SIGNATURE


def test_a_trusted_start_is_compared_too() -> None:
    signed = verify_checkpoints([token(head(4))], KEYS)
    with pytest.raises(Refused, match="record 4 is not the one that was signed"):
        verify_log(rewritten(2)[4:], signed, start=head(4, rewritten(2)))


def test_a_fork_is_found_without_the_log() -> None:
    with pytest.raises(Refused, match="record 7 was signed with two different hashes"):
        verify_checkpoints([token(head(7)), token(head(7, rewritten(3)))], KEYS)
    assert len(verify_checkpoints([token(head(7)), token(head(7), 1)], KEYS)) == 1


def test_a_log_that_was_set_back_and_went_on_is_found_by_its_times() -> None:
    with pytest.raises(Refused, match="record 7 was signed before record 4"):
        verify_checkpoints([token(head(4), 601), token(head(7), 0)], KEYS)


def test_replicas_whose_clocks_differ_by_minutes_are_no_fork() -> None:
    assert len(verify_checkpoints([token(head(4), 600), token(head(7), 0)], KEYS)) == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"number": 0},
        {"number": -1},
        {"number": "4"},
        {"number": True},
        {"number": None},
        {"number": 1 << 64},
        {"hash": "00"},
        {"hash": "0x" + "0" * 62},
        {"hash": "0" * 63 + " "},
        {"hash": "A" * 64},
        {"hash": 7},
        {"iat": "now"},
        {"iat": -1},
        {"iat": None},
        {"iss": None},
    ],
)
def test_a_token_with_other_claims_is_no_checkpoint(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match="not those of a checkpoint"):
        read_checkpoint(token(head(4), **changes), KEYS)


def test_a_receipt_is_no_checkpoint_and_nobody_else_signs_one() -> None:
    with pytest.raises(Refused, match="not of the kind"):
        verify_checkpoints([token(head(4), typ=RECEIPT_TYPE)], KEYS)
    with pytest.raises(Refused, match="not in the key set"):
        verify_checkpoints([token(head(4), signer=Signer(ec.derive_private_key(8, ec.SECP256R1())))], KEYS)
