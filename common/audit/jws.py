"""Signed tokens: compact JWS (RFC 7515) with ES256 and nothing else, and the key sets that they are verified with.

The verifier's tokens are JWTs: a JSON object signed with ECDSA on P-256 and SHA-256, as r ‖ s of 32 bytes each
(RFC 7518 section 3.4). `kid` is the key's thumbprint (RFC 7638), so a key set cannot give one key another's name.
Everything that a token could choose otherwise is refused: other algorithms, `crit`, `b64`, base64url that is not
canonical, members that stand twice.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from common.errors import InvalidInput, Reason, Refused

ALGORITHM = "ES256"
# The kinds of token that the verifier signs: none passes for another.
RECEIPT_TYPE = "sevattest-receipt+jwt"
CHECKPOINT_TYPE = "sevattest-checkpoint+jwt"
COORDINATE_SIZE = 32  # bytes of r, s, x and y on P-256
HEADER_MAX = 1024  # bytes of a header; ours have about 120
TOKEN_MAX = 256 * 1024  # bytes of a token; a receipt with all the notes that a document may have stays far below
KEY_SET_MAX = 64 * 1024  # bytes of a key set; 250 keys
_HEADER_MEMBERS = frozenset({"alg", "kid", "typ"})

KeySet = Mapping[str, ec.EllipticCurvePublicKey]
"""Public keys by their thumbprints."""


@dataclass(frozen=True, kw_only=True)
class Jws:
    """A token whose signature holds.

    Attributes:
        kid: thumbprint of the key that signed it.
        typ: what kind of token it is.
        claims: what it says.
    """

    kid: str
    typ: str
    claims: dict[str, Any]


def base64url(data: bytes) -> str:
    """Base64url without padding (RFC 7515 section 2)."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def public_jwk(key: ec.EllipticCurvePublicKey) -> dict[str, str]:
    """The members of a P-256 key that its thumbprint covers, in the order that RFC 7638 wants."""
    numbers = key.public_numbers()
    return {
        "crv": "P-256",
        "kty": "EC",
        "x": base64url(numbers.x.to_bytes(COORDINATE_SIZE, "big")),
        "y": base64url(numbers.y.to_bytes(COORDINATE_SIZE, "big")),
    }


def thumbprint(key: ec.EllipticCurvePublicKey) -> str:
    """The key's name, RFC 7638: SHA-256 over its members, base64url, 43 characters."""
    members = json.dumps(public_jwk(key), separators=(",", ":"))
    return base64url(hashlib.sha256(members.encode("ascii")).digest())


def key_set(keys: Iterable[ec.EllipticCurvePublicKey]) -> dict[str, Any]:
    """A JWK set (RFC 7517) for people who verify our tokens."""
    return {"keys": [{**public_jwk(key), "kid": thumbprint(key), "use": "sig", "alg": ALGORITHM} for key in keys]}


def read_key_set(data: bytes) -> KeySet:
    """The P-256 keys of a JWK set; keys of other kinds are left out, as RFC 7517 section 5 wants.

    Raises:
        InvalidInput: it is no JWK set, a key is not on the curve, its `kid` is not its thumbprint, or there is no key
            that could be used (MALFORMED).
    """
    if len(data) > KEY_SET_MAX:
        raise _malformed("a key set", f"has more than {KEY_SET_MAX} bytes")
    members = _object(data, "a key set").get("keys")
    if not isinstance(members, list):
        raise _malformed("a key set", "has no list of keys")
    keys: dict[str, ec.EllipticCurvePublicKey] = {}
    for member in members:
        if not isinstance(member, dict):
            raise _malformed("a key set", "holds what is no key")
        if (member.get("kty"), member.get("crv")) != ("EC", "P-256"):
            continue
        key = _public_key(member)
        kid = thumbprint(key)
        if member.get("kid", kid) != kid:
            raise _malformed("a key set", "gives a key a kid that is not its thumbprint")
        keys[kid] = key
    if not keys:
        raise _malformed("a key set", "holds no key on P-256")
    return keys


def verify_jws(token: str | bytes, keys: KeySet, *, typ: str) -> Jws:
    """Verify a token. Times and meanings in its claims are the caller's to judge.

    Args:
        token: in the compact form.
        keys: which keys may have signed it.
        typ: the kind of token that is expected, so that none passes for another.

    Raises:
        InvalidInput: it is no token in the form above (MALFORMED).
        Refused: another algorithm or kind, a key that is not in the set, or the signature does not hold
            (BAD_SIGNATURE).
    """
    header_text, payload_text, signature_text = _parts(token)
    header = _object(_decode(header_text, "its header"), "a token's header")
    if header.get("alg") != ALGORITHM:
        raise Refused(Reason.BAD_SIGNATURE, f"a token is not signed with {ALGORITHM}")
    if not header.keys() <= _HEADER_MEMBERS:
        raise Refused(Reason.BAD_SIGNATURE, "a token's header has members that this version does not know")
    if header.get("typ") != typ:
        raise Refused(Reason.BAD_SIGNATURE, f"a token is not of the kind {typ}")
    kid = header.get("kid")
    key = keys.get(kid) if isinstance(kid, str) else None
    if key is None or not isinstance(kid, str):
        raise Refused(Reason.BAD_SIGNATURE, "a token is signed with a key that is not in the key set")
    signature = _decode(signature_text, "its signature")
    if len(signature) != 2 * COORDINATE_SIZE:
        raise _malformed("a token", f"has a signature of {len(signature)} bytes, not {2 * COORDINATE_SIZE}")
    halves = (int.from_bytes(half, "big") for half in (signature[:COORDINATE_SIZE], signature[COORDINATE_SIZE:]))
    try:
        key.verify(encode_dss_signature(*halves), header_text + b"." + payload_text, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        raise Refused(Reason.BAD_SIGNATURE, "a token's signature does not hold") from None
    return Jws(kid=kid, typ=typ, claims=_object(_decode(payload_text, "its payload"), "a token's payload"))


def untrusted_claims(token: str | bytes) -> dict[str, Any]:
    """What a token says, with no look at its signature: for showing to people, never for a decision.

    Raises:
        InvalidInput: it is no token (MALFORMED).
    """
    _, payload_text, _ = _parts(token)
    return _object(_decode(payload_text, "its payload"), "a token's payload")


def _parts(token: str | bytes) -> tuple[bytes, bytes, bytes]:
    if len(token) > TOKEN_MAX:
        raise _malformed("a token", f"has more than {TOKEN_MAX} bytes")
    try:
        data = token.encode("ascii") if isinstance(token, str) else bytes(token)
    except UnicodeEncodeError:
        raise _malformed("a token", "is not ASCII") from None
    parts = data.split(b".")
    if len(parts) != 3:
        raise _malformed("a token", f"has {len(parts)} parts, not 3")
    if len(parts[0]) > HEADER_MAX:
        raise _malformed("a token", f"has a header of more than {HEADER_MAX} bytes")
    return parts[0], parts[1], parts[2]


def _decode(text: bytes, what: str) -> bytes:
    try:
        data = base64.b64decode(text + b"=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except binascii.Error:
        raise _malformed("a token", f"has {what} not in base64url") from None
    if base64url(data).encode("ascii") != text:  # another spelling of the same bytes would be another token
        raise _malformed("a token", f"has {what} not in canonical base64url")
    return data


def _object(data: bytes, what: str) -> dict[str, Any]:
    try:
        value = json.loads(data.decode(), object_pairs_hook=_once, parse_float=_no_number, parse_constant=_no_number)
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair would break whoever prints it
    except (ValueError, RecursionError):
        raise _malformed(what, "is not JSON in the form that this version knows") from None
    if not isinstance(value, dict):
        raise _malformed(what, "is not a JSON object")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a member stands twice")
    return members


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text[:20]} is no whole number")


def _public_key(member: dict[str, Any]) -> ec.EllipticCurvePublicKey:
    try:
        return ec.EllipticCurvePublicNumbers(
            x=_coordinate(member, "x"), y=_coordinate(member, "y"), curve=ec.SECP256R1()
        ).public_key()
    except ValueError:
        raise _malformed("a key set", "holds a key that is not on P-256") from None


def _coordinate(member: dict[str, Any], name: str) -> int:
    text = member.get(name)
    if not isinstance(text, str) or not text.isascii():
        raise _malformed("a key set", f"holds a key without {name}")
    data = _decode(text.encode("ascii"), f"a key's {name}")
    if len(data) != COORDINATE_SIZE:
        raise _malformed("a key set", f"holds a key whose {name} has {len(data)} bytes, not {COORDINATE_SIZE}")
    return int.from_bytes(data, "big")


def _malformed(what: str, why: str) -> InvalidInput:
    return InvalidInput(Reason.MALFORMED, f"{what} {why}")
