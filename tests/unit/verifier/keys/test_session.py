"""Fresh sessions: nothing in one of them ever comes again."""

from __future__ import annotations

from common.sev.abi import PolicyBit
from common.sev.policy import GuestPolicy
from tests.support.chains import make_platform
from verifier.keys.session import fresh_session


def test_every_key_nonce_and_iv_is_new_with_each_session() -> None:
    pdh = make_platform().chain.pdh
    policy = GuestPolicy.build(PolicyBit.NODBG | PolicyBit.ES)
    made = [fresh_session(pdh, policy) for _ in range(50)]
    seen = [
        value
        for session, keys in made
        for value in (session.godh.body, session.blob[:16], session.blob[48:64], keys.tek, keys.tik)
    ]
    assert len(set(seen)) == len(seen)


def test_a_session_keeps_no_private_key() -> None:
    session, keys = fresh_session(make_platform().chain.pdh, GuestPolicy.build(PolicyBit.ES))
    assert not any("key" in name for name in vars(session))
    assert "redacted" in repr(keys)
