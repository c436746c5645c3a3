"""The verifier's own keys: made once, whoever comes first, kept sealed, never shown."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import os
import re
from datetime import datetime

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from common.audit.jws import read_key_set, verify_jws
from common.errors import Reason, Unavailable
from tests.support.recording_log import RecordingLog
from verifier.keys.base import identity_place
from verifier.keys.file import FileKey
from verifier.keys.identities import load_identities
from verifier.keys.signer import DocumentKey, Pseudonyms, Signer

KEY = FileKey(b"k" * 32)


class Kept:
    """A store's identities, in memory; the first wins."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.records = 0

    async def head(self) -> tuple[int, bytes, datetime | None]:
        await asyncio.sleep(0)
        return self.records, bytes(32), None

    async def identity(self, name: str) -> bytes | None:
        await asyncio.sleep(0)
        return self.blobs.get(name)

    async def keep_identity(self, name: str, sealed: bytes) -> bytes:
        await asyncio.sleep(0)
        return self.blobs.setdefault(name, sealed)


async def test_the_keys_are_made_once_and_kept_sealed() -> None:
    store = Kept()
    first = await load_identities(store, KEY, os.urandom, RecordingLog())
    blobs = dict(store.blobs)
    again = await load_identities(store, KEY, os.urandom, RecordingLog())
    assert again.signer.kid == first.signer.kid
    assert again.pseudonyms.of("chip") == first.pseudonyms.of("chip")
    assert store.blobs == blobs
    assert set(blobs) == {"signing", "pseudonym", "documents"}
    assert KEY.unseal(blobs["pseudonym"], identity_place("pseudonym")) not in blobs["pseudonym"]


async def test_replicas_that_start_together_share_the_keys() -> None:
    store = Kept()
    all_of_them = await asyncio.gather(*(load_identities(store, KEY, os.urandom, RecordingLog()) for _ in range(5)))
    assert len({each.signer.kid for each in all_of_them}) == 1
    assert len({each.pseudonyms.of("chip") for each in all_of_them}) == 1


@pytest.mark.parametrize("gone", [["signing", "pseudonym"], ["signing"], ["pseudonym"]])
async def test_keys_that_are_gone_beside_a_log_with_records_are_made_again_loudly(gone: list[str]) -> None:
    store, log = Kept(), RecordingLog()
    first = await load_identities(store, KEY, os.urandom, log)
    store.records = 7
    for name in gone:
        del store.blobs[name]
    again = await load_identities(store, KEY, os.urandom, log)
    assert (again.signer.kid != first.signer.kid) == ("signing" in gone)
    (line,) = log.named("keys.identities_made_again")
    assert (line.level, line.name) == ("error", "keys.identities_made_again")
    assert line.fields == {"made": gone, "kid": again.signer.kid, "records": 7}
    await load_identities(store, KEY, os.urandom, log)
    assert len(log.named("keys.identities_made_again")) == 1


async def test_a_new_store_is_named_and_keys_that_are_there_are_nothing_to_speak_of() -> None:
    store, log = Kept(), RecordingLog()
    kids = {
        each.signer.kid
        for each in await asyncio.gather(*(load_identities(store, KEY, os.urandom, log) for _ in range(5)))
    }
    assert {(each.level, each.name) for each in log.events} == {("warning", "store.new")}
    assert {each.fields["kid"] for each in log.events} == kids
    log.events.clear()
    store.records = 7
    await load_identities(store, KEY, os.urandom, log)
    assert log.events == []


async def test_other_stores_have_other_keys() -> None:
    one, other = (
        await load_identities(Kept(), KEY, os.urandom, RecordingLog()),
        await load_identities(Kept(), KEY, os.urandom, RecordingLog()),
    )
    assert one.signer.kid != other.signer.kid
    assert one.pseudonyms.of("chip") != other.pseudonyms.of("chip")


async def test_keys_under_another_key_file_or_in_each_others_place_stay_closed() -> None:
    store = Kept()
    await load_identities(store, KEY, os.urandom, RecordingLog())
    with pytest.raises(Unavailable, match="another key file"):
        await load_identities(store, FileKey(b"o" * 32), os.urandom, RecordingLog())
    store.blobs["signing"], store.blobs["pseudonym"] = store.blobs["pseudonym"], store.blobs["signing"]
    with pytest.raises(Unavailable, match="does not open"):
        await load_identities(store, KEY, os.urandom, RecordingLog())


@pytest.mark.parametrize(
    "content",
    [
        b"no key",
        ec.generate_private_key(ec.SECP384R1()).private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption()),
        ed25519.Ed25519PrivateKey.generate().private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption()),
    ],
    ids=["nothing", "P-384", "Ed25519"],
)
async def test_a_signing_key_of_another_kind_is_not_used(content: bytes) -> None:
    store = Kept()
    await store.keep_identity("signing", KEY.seal(content, identity_place("signing")))
    with pytest.raises(Unavailable, match="not usable") as caught:
        await load_identities(store, KEY, os.urandom, RecordingLog())
    assert caught.value.reason is Reason.STORE_UNAVAILABLE


def test_a_pseudonym_is_the_hmac_of_what_it_hides() -> None:
    pseudonyms = Pseudonyms(b"p" * 32)
    expected = hmac.new(b"p" * 32, b"a chip's id", hashlib.sha256).hexdigest()[:32]
    assert pseudonyms.of("a chip's id") == f"chip:{expected}"
    assert pseudonyms.of("another") != pseudonyms.of("a chip's id")
    assert Pseudonyms(b"q" * 32).of("a chip's id") != pseudonyms.of("a chip's id")
    assert re.fullmatch(r"chip:[0-9a-f]{32}", pseudonyms.of(""))


def test_a_signer_never_shows_its_key_and_takes_no_other_curve() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    signer = Signer(key)
    private = key.private_numbers().private_value
    for shown in (repr(signer), json.dumps(signer.jwks()), signer.sign({"a": 1}, typ="t")):
        assert str(private) not in shown
        assert f"{private:x}" not in shown
    assert "ppp" not in repr(Pseudonyms(b"p" * 32))
    assert "ddd" not in repr(DocumentKey(b"d" * 32))
    with pytest.raises(ValueError, match="32 bytes"):
        DocumentKey(b"d" * 33)
    assert verify_jws(
        signer.sign({"a": 1}, typ="t"), read_key_set(json.dumps(signer.jwks()).encode()), typ="t"
    ).claims == {"a": 1}
    with pytest.raises(ValueError, match="P-256"):
        Signer(ec.generate_private_key(ec.SECP384R1()))
    with pytest.raises(ValueError, match="32 bytes"):
        Pseudonyms(b"p" * 31)
