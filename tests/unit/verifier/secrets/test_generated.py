"""Secrets that are made for one launch: new each time, of the form and size that was asked for, found again."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from uuid import UUID

import pytest

from common.errors import Reason, Unavailable
from common.sev.secret import SecretEntry
from verifier.documents.sources import FileSource, GeneratedSource
from verifier.documents.workload import ATTESTED_GUID, SecretSpec
from verifier.secrets.generated import ALPHABET, GeneratedSecrets
from verifier.secrets.release import generated_secrets, read_generated

BYTES, PASSPHRASE = UUID(int=1), UUID(int=2)


def specs() -> list[SecretSpec]:
    return [
        SecretSpec(guid=UUID(int=9), source=FileSource(path="unread")),
        SecretSpec(guid=BYTES, source=GeneratedSource(size=7)),
        SecretSpec(guid=PASSPHRASE, source=GeneratedSource(form="passphrase", size=300), trailing_nul=True),
    ]


async def kept() -> tuple[bytes, dict[UUID, bytes]]:
    """What is kept of a launch, and what its guest was given without a NUL."""
    made = {s.guid: await GeneratedSecrets().read(s.source) for s in specs() if isinstance(s.source, GeneratedSource)}
    entries = [spec.entry(made.get(spec.guid, b"of a file")) for spec in specs()]
    assert entries[2].data.endswith(b"\0")
    blob = generated_secrets(specs(), entries)
    assert blob is not None
    return blob, made


@pytest.mark.parametrize("form", ["bytes", "passphrase"])
async def test_a_generated_secret_is_new_with_each_call_and_of_its_size(form: str) -> None:
    source = GeneratedSource(form=form, size=20)
    made = {await GeneratedSecrets().read(source) for _ in range(50)}
    assert len(made) == 50
    assert {len(secret) for secret in made} == {20}
    assert await GeneratedSecrets().size(source) == 20


async def test_a_passphrase_can_be_typed_and_every_letter_is_as_likely() -> None:
    everything = bytes(range(256))
    passphrase = await GeneratedSecrets(lambda _: everything).read(GeneratedSource(form="passphrase", size=256))
    assert set(passphrase) == set(ALPHABET)
    assert {passphrase.count(letter) for letter in ALPHABET} == {8}
    assert len(base64.b32decode(ALPHABET.upper())) == 20  # base32's own alphabet, each letter once
    assert len(set(ALPHABET)) == 32


async def test_bytes_are_the_random_source_s_own() -> None:
    def random(size: int) -> bytes:
        return hashlib.shake_128(b"seed").digest(size)

    assert await GeneratedSecrets(random).read(GeneratedSource(size=40)) == random(40)


async def test_what_was_made_is_found_again_and_nothing_else_is_kept() -> None:
    blob, made = await kept()
    assert {entry.guid: entry.data for entry in read_generated(blob)} == made
    assert b"of a file" not in blob
    assert generated_secrets(specs()[:1], [specs()[0].entry(b"of a file")]) is None


async def test_what_was_kept_in_part_or_in_another_form_is_no_secret() -> None:
    blob, _ = await kept()

    def spoilt() -> Iterator[bytes]:
        yield from (blob[:length] for length in (0, 1, 20, 27, 29, len(blob) - 1))
        yield blob + b"\0"
        yield b"\2" + blob[1:]
        yield ATTESTED_GUID.bytes + bytes(31)

    for wrong in spoilt():
        with pytest.raises(Unavailable) as caught:
            read_generated(wrong)
        assert caught.value.reason is Reason.STORE_UNAVAILABLE


def test_what_the_first_version_kept_is_read_too() -> None:
    secret = bytes(range(32))
    assert read_generated(ATTESTED_GUID.bytes + secret) == (SecretEntry(guid=ATTESTED_GUID, data=secret),)
