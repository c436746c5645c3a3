"""No byte of a real platform's chain is free: change any one, and the platform is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from common.errors import Refused
from common.sev.abi import SEV_CERT_SIZE
from common.sev.certs.chain import PlatformChain
from common.sev.certs.roots import Root, pinned_roots
from common.sev.certs.sev import SevCertificate, Signer, verify_signature
from common.sev.certs.verify import verify_platform
from common.sev.errors import BadSignature, ParseError
from tests.support.vectors import rome_chain

NAMES = ("pdh", "pek", "oca", "cek")
# Lowest bit, highest bit, all bits; the last depends on the position, so that over the file every value occurs.
MASKS = (0x01, 0x80, 0xFF)


def _rome() -> Root:
    return next(root for root in pinned_roots() if root.generation == "rome")


def _changed(cert: SevCertificate, at: int, mask: int) -> SevCertificate:
    return SevCertificate.parse(cert.raw[:at] + bytes([cert.raw[at] ^ mask]) + cert.raw[at + 1 :])


def _signatures_hold(chain: PlatformChain, name: str) -> bool:
    """Whether every signature that this one certificate should carry is good; the others are left alone."""
    signers: dict[str, list[Signer]] = {
        "pdh": [chain.pek],
        "pek": [chain.oca, chain.cek],
        "oca": [chain.oca],
        "cek": [_rome().ask],
    }
    try:
        for signer in signers[name]:
            verify_signature(getattr(chain, name), signer)
    except BadSignature:
        return False
    return True


@pytest.mark.parametrize("name", NAMES)
def test_no_byte_of_a_real_chain_can_change(name: str) -> None:
    chain = PlatformChain.parse(rome_chain())
    assert _signatures_hold(chain, name)
    cert: SevCertificate = getattr(chain, name)
    accepted = []
    for at in range(SEV_CERT_SIZE):
        for mask in {*MASKS, (at % 255) + 1}:
            try:
                changed = _changed(cert, at, mask)
            except ParseError:
                continue
            try:
                forged = replace(chain, **{name: changed})
            except ParseError:
                continue
            if _signatures_hold(forged, name):
                accepted.append((at, mask))
    assert accepted == []


@pytest.mark.parametrize("name", NAMES)
def test_the_whole_verification_says_the_same_for_every_byte_that_still_parses(name: str) -> None:
    chain = PlatformChain.parse(rome_chain())
    cert: SevCertificate = getattr(chain, name)
    verify_platform(chain, [_rome()])
    refused = 0
    for at in range(SEV_CERT_SIZE):
        try:
            forged = replace(chain, **{name: _changed(cert, at, 0x10)})
        except ParseError:
            continue
        with pytest.raises(Refused):
            verify_platform(forged, [_rome()])
        refused += 1
    assert refused > 90, "the 96 bytes of a signature still parse, at least"
