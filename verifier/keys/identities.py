"""The verifier's own keys: made at the first start, kept sealed in the store, the same for all replicas.

They are no secrets of the guests': losing them costs the proof of later receipts and a look at the applied documents,
not a guest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_der_private_key,
)

from common.errors import Reason, Unavailable
from common.telemetry.log import Log
from verifier.keys.base import SealingKey, identity_place
from verifier.keys.signer import DOCUMENT_KEY_SIZE, PSEUDONYM_KEY_SIZE, DocumentKey, Pseudonyms, Signer

SIGNING = "signing"
PSEUDONYM = "pseudonym"
DOCUMENTS = "documents"


class IdentityStore(Protocol):
    """What the identities ask of a store (`verifier.store.base.Store` has it)."""

    async def identity(self, name: str) -> bytes | None:
        """A sealed key of the verifier's own."""
        ...

    async def head(self) -> tuple[int, bytes, datetime | None]:
        """Number and hash of the last audit record, 0 in a new store; and the latest time of all."""
        ...

    async def keep_identity(self, name: str, sealed: bytes) -> bytes:
        """Keep a sealed key, unless there is one; the one that is kept."""
        ...


@dataclass(frozen=True, kw_only=True)
class Identities:
    """What the verifier signs with, hides chips behind, and seals the applied documents with."""

    signer: Signer
    pseudonyms: Pseudonyms
    documents: DocumentKey


async def load_identities(
    store: IdentityStore, sealing: SealingKey, random: Callable[[int], bytes], log: Log
) -> Identities:
    """The verifier's keys out of the store; made where there are none. Whoever comes first of several wins.

    Keys that are missing beside an audit log that is not empty were removed: they are made again, and the log says so.
    A store that is new is named, too: an empty folder in place of the right one must not go unnoticed.
    Of the documents' key the documents say it: they are not as they were sealed then. A store of a version that had no
    such key lacks it, too.

    Raises:
        Unavailable: the store has no answer, the sealing key is out of reach, or what is kept does not open.
    """
    # Before the keys are looked for: another replica that is starting too records nothing before it has them.
    records, _, _ = await store.head()
    signing, new_signing = await _kept(store, sealing, SIGNING, _new_signing_key)
    pseudonym, new_pseudonym = await _kept(store, sealing, PSEUDONYM, lambda: random(PSEUDONYM_KEY_SIZE))
    documents, _ = await _kept(store, sealing, DOCUMENTS, lambda: random(DOCUMENT_KEY_SIZE))
    signer = _signer(signing)
    made = [name for name, new in ((SIGNING, new_signing), (PSEUDONYM, new_pseudonym)) if new]
    if made and records > 0:
        log.error("keys.identities_made_again", made=made, kid=signer.kid, records=records)
    elif made:
        # Right at the first start ever. Else the database is not the one that was meant.
        log.warning(
            "store.new", text="the store was empty: nothing was applied or released here before", kid=signer.kid
        )
    return Identities(signer=signer, pseudonyms=Pseudonyms(pseudonym), documents=DocumentKey(documents))


def _signer(signing: bytes) -> Signer:
    try:
        key = load_der_private_key(signing, password=None)
    except (TypeError, ValueError):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name != ec.SECP256R1.name:
        raise Unavailable(Reason.STORE_UNAVAILABLE, "the verifier's signing key in the store is not usable")
    return Signer(key)


async def _kept(store: IdentityStore, sealing: SealingKey, name: str, make: Callable[[], bytes]) -> tuple[bytes, bool]:
    """One of the keys, and whether the store had none."""
    place = identity_place(name)
    sealed = await store.identity(name)
    missing = sealed is None
    if sealed is None:
        sealed = await store.keep_identity(name, sealing.seal(make(), place))
    return sealing.unseal(sealed, place), missing


def _new_signing_key() -> bytes:
    key = ec.generate_private_key(ec.SECP256R1())
    return key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
