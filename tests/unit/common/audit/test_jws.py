"""Signed tokens: PyJWT and openssl read ours, we read PyJWT's; every other form, kind, key or byte is refused."""

from __future__ import annotations

import base64
import json
import subprocess
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from common.audit.jws import (
    HEADER_MAX,
    KEY_SET_MAX,
    TOKEN_MAX,
    KeySet,
    base64url,
    key_set,
    read_key_set,
    thumbprint,
    untrusted_claims,
    verify_jws,
)
from common.errors import InvalidInput, Reason, Refused, SevattestError
from verifier.keys.signer import Signer

KIND = "sevattest-receipt+jwt"
KEY = ec.derive_private_key(7, ec.SECP256R1())
SIGNER = Signer(KEY)
KEYS = read_key_set(json.dumps(SIGNER.jwks()).encode())
CLAIMS = {"iss": "owner", "iat": 1772366400, "text": "größer ‖ gleich", "list": [1, None, True, {"a": "b"}]}
TOKEN = SIGNER.sign(CLAIMS, typ=KIND)
# RFC 7515 appendix A.3: a key, a payload and a signature of somebody else's. `kid` and `typ` are missing there.
RFC_KEY = {
    "kty": "EC",
    "crv": "P-256",
    "x": "f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU",
    "y": "x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0",
}


def signed(header: dict[str, Any] | bytes, payload: bytes = b"{}", key: ec.EllipticCurvePrivateKey = KEY) -> str:
    """A token with a good signature over whatever is asked for; PyJWT signs, which takes any header and payload."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    signing = f"{base64url(text)}.{base64url(payload)}"
    ecdsa = jwt.algorithms.ECAlgorithm(jwt.algorithms.ECAlgorithm.SHA256)
    return f"{signing}.{base64url(ecdsa.sign(signing.encode(), key))}"


def header(**changes: Any) -> dict[str, Any]:
    members = {"alg": "ES256", "kid": SIGNER.kid, "typ": KIND} | changes
    return {name: value for name, value in members.items() if value is not None}


def test_what_the_verifier_signs_is_what_it_says() -> None:
    jws = verify_jws(TOKEN, KEYS, typ=KIND)
    assert (jws.kid, jws.typ, jws.claims) == (SIGNER.kid, KIND, CLAIMS)
    assert verify_jws(TOKEN.encode(), KEYS, typ=KIND) == jws
    assert untrusted_claims(TOKEN) == CLAIMS


def test_pyjwt_verifies_our_tokens_with_our_key_set() -> None:
    key = jwt.PyJWKSet.from_dict(SIGNER.jwks())[SIGNER.kid]
    assert jwt.decode(TOKEN, key, algorithms=["ES256"]) == CLAIMS
    assert jwt.get_unverified_header(TOKEN) == header()
    with pytest.raises(jwt.InvalidSignatureError):
        jwt.decode(Signer(ec.derive_private_key(8, ec.SECP256R1())).sign(CLAIMS, typ=KIND), key, algorithms=["ES256"])


def test_we_verify_pyjwts_tokens() -> None:
    token = jwt.encode(CLAIMS, KEY, algorithm="ES256", headers={"kid": SIGNER.kid, "typ": KIND})
    assert verify_jws(token, KEYS, typ=KIND).claims == CLAIMS
    other = jwt.encode(CLAIMS, ec.derive_private_key(8, ec.SECP256R1()), "ES256", {"kid": SIGNER.kid, "typ": KIND})
    with pytest.raises(Refused, match="does not hold"):
        verify_jws(other, KEYS, typ=KIND)


def test_openssl_verifies_the_signature_over_the_very_bytes(tmp_path: Path) -> None:
    text, _, signature = TOKEN.rpartition(".")
    raw = base64.urlsafe_b64decode(signature + "==")
    halves = (int.from_bytes(raw[:32], "big"), int.from_bytes(raw[32:], "big"))
    (tmp_path / "signature").write_bytes(encode_dss_signature(*halves))
    public = KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "key.pem").write_bytes(public)

    def verdict(data: str) -> int:
        (tmp_path / "text").write_text(data)
        command = ["openssl", "dgst", "-sha256", "-verify", "key.pem", "-signature", "signature", "text"]
        return subprocess.run(command, cwd=tmp_path, check=False, capture_output=True).returncode

    assert verdict(text) == 0
    assert verdict(text + "x") == 1


def test_a_key_is_named_by_its_thumbprint() -> None:
    public = jwt.PyJWK(RFC_KEY).key
    # RFC 7638 with openssl's tools, by hand: members sorted, SHA-256, base64url.
    assert thumbprint(public) == "oKIywvGUpTVTyxMQ3bwIIeQUudfr_CkLMjCE19ECD-U"
    assert read_key_set(json.dumps({"keys": [RFC_KEY]}).encode()).keys() == {thumbprint(public)}


@pytest.mark.parametrize(
    ("token", "says"),
    [
        (signed(header(alg="none")), "not signed with ES256"),
        (signed(header(alg="none")).rpartition(".")[0] + ".", "not signed with ES256"),
        (signed(header(alg="HS256")), "not signed with ES256"),
        (signed(header(alg=["ES256"])), "not signed with ES256"),
        (signed(header(crit=["exp"])), "members that this version does not know"),
        (signed(header(b64=False)), "members that this version does not know"),
        (signed(header(jwk=RFC_KEY)), "members that this version does not know"),
        (signed(header(typ="JWT")), "not of the kind"),
        (signed(header(typ="sevattest-checkpoint+jwt")), "not of the kind"),
        (signed(header(typ=None)), "not of the kind"),
        (signed(header(kid="strange")), "not in the key set"),
        (signed(header(kid=None)), "not in the key set"),
        (signed(header(kid=[1])), "not in the key set"),
        (signed(header(), key=ec.derive_private_key(8, ec.SECP256R1())), "does not hold"),
        (TOKEN.replace(".", ". ", 1), "does not hold"),
    ],
    ids=range(15),
)
def test_a_token_that_is_not_as_agreed_is_refused(token: str, says: str) -> None:
    with pytest.raises((Refused, InvalidInput), match=says):
        verify_jws(token, KEYS, typ=KIND)
    assert verify_jws(signed(header()), KEYS, typ=KIND).claims == {}


@pytest.mark.parametrize(
    "token",
    [
        "",
        "a.b",
        TOKEN + ".",
        TOKEN + "=",
        TOKEN + "\n",
        " " + TOKEN,
        "ü" + TOKEN,
        "A" * (TOKEN_MAX + 1),
        base64url(b"{" + b" " * HEADER_MAX + b"}") + ".e30.e30",
        signed(b"[]"),
        signed(b"\xff"),
        signed(b'{"alg":"ES256","alg":"ES256"}'),
        signed(header(), b"[]"),
        signed(header(), b'{"a":1,"a":2}'),
        signed(header(), b'{"a":1.5}'),
        signed(header(), b'{"a":NaN}'),
        signed(header(), b'{"a":"\\ud800"}'),
        signed(header(), b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        signed(header(), b'{"a":' + b"1" * 10_000 + b"}"),
        signed(header(), b""),
        signed(header())[:-4],
    ],
    ids=range(21),
)
def test_what_is_no_token_is_malformed(token: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        verify_jws(token, KEYS, typ=KIND)
    assert caught.value.reason is Reason.MALFORMED


def test_the_same_bytes_have_no_second_spelling() -> None:
    """The last character of a 64-byte signature has four bits to spare."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    taken = [last for last in alphabet if _verifies(TOKEN[:-1] + last)]
    assert taken == [TOKEN[-1]]


def _verifies(token: str) -> bool:
    try:
        verify_jws(token, KEYS, typ=KIND)
    except SevattestError:
        return False
    return True


@given(st.data())
def test_any_changed_byte_is_found(data: st.DataObject) -> None:
    token = bytearray(TOKEN.encode())
    token[data.draw(st.integers(0, len(token) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(SevattestError):
        verify_jws(bytes(token), KEYS, typ=KIND)


@given(st.binary(max_size=200) | st.text(max_size=200))
def test_any_bytes_are_refused_and_nothing_else_is_raised(token: bytes | str) -> None:
    with pytest.raises(SevattestError):
        verify_jws(token, KEYS, typ=KIND)


@given(st.binary(max_size=300))
def test_any_signed_payload_is_an_object_or_malformed(payload: bytes) -> None:
    try:
        claims = verify_jws(signed(header(), payload), KEYS, typ=KIND).claims
    except InvalidInput:
        return
    assert claims == json.loads(payload)


def _keys(**changes: Any) -> bytes:
    return json.dumps({"keys": [RFC_KEY | changes]}).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"{}",
        b'{"keys":{}}',
        b'{"keys":[]}',
        b'{"keys":[1]}',
        b" " * (KEY_SET_MAX + 1),
        _keys(kty="RSA"),
        _keys(x=RFC_KEY["y"]),
        _keys(x=None),
        _keys(x="ü"),
        _keys(x="AAAA"),
        _keys(y=RFC_KEY["y"] + "="),
        _keys(kid="another"),
    ],
    ids=range(14),
)
def test_what_is_no_key_set_is_malformed(data: bytes) -> None:
    with pytest.raises(InvalidInput) as caught:
        read_key_set(data)
    assert caught.value.reason is Reason.MALFORMED
    assert read_key_set(_keys(kid="oKIywvGUpTVTyxMQ3bwIIeQUudfr_CkLMjCE19ECD-U", use="sig", other=1))


def test_keys_of_other_kinds_are_left_out() -> None:
    others = [
        {"kty": "RSA", "n": "AQ", "e": "AQAB"},
        {"kty": "OKP", "crv": "Ed25519", "x": "AA"},
        *SIGNER.jwks()["keys"],
    ]
    assert read_key_set(json.dumps({"keys": others}).encode()).keys() == {SIGNER.kid}


def test_several_keys_verify_what_each_of_them_signed() -> None:
    other = Signer(ec.derive_private_key(8, ec.SECP256R1()))
    both: KeySet = read_key_set(
        json.dumps(key_set([KEY.public_key(), jwt.PyJWK(other.jwks()["keys"][0]).key])).encode()
    )
    for signer in (SIGNER, other):
        assert verify_jws(signer.sign(CLAIMS, typ=KIND), both, typ=KIND).kid == signer.kid
    with pytest.raises(Refused, match="not in the key set"):
        verify_jws(other.sign(CLAIMS, typ=KIND), KEYS, typ=KIND)
