"""Is it genuine: the chain from root to PDH, with a refusing twin for every link and every confusion."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace
from itertools import permutations

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from common.errors import Reason, Refused
from common.sev.abi import Usage
from common.sev.certs.chain import PlatformChain
from common.sev.certs.roots import named_root, pinned_roots
from common.sev.certs.sev import SevCertificate, add_rsa_signature
from common.sev.certs.verify import (
    ARK_ARK,
    ARK_ASK,
    ASK_CEK,
    CEK_PEK,
    LINKS,
    OCA_OCA,
    OCA_PEK,
    PEK_PDH,
    Link,
    attach_cek,
    check_links,
    verify_platform,
)
from common.sev.errors import BadSignature, ParseError, UnsignedCek, UntrustedRoot
from tests.support.chains import (
    SyntheticPlatform,
    bare,
    fresh_ca,
    make_ca,
    make_keys,
    make_platform,
    p384,
    shared_ca,
    sign,
    unsigned,
    with_bytes,
    with_key_ids,
)
from tests.support.vectors import rome_chain

BODY = 1044


@pytest.fixture(scope="module")
def platform() -> SyntheticPlatform:
    return make_platform()


# --- genuine -----------------------------------------------------------------------------------------------------


def test_a_real_rome_leads_to_amds_rome_root() -> None:
    chain = PlatformChain.parse(rome_chain())
    verified = verify_platform(chain, pinned_roots())
    assert (verified.generation, verified.emulated) == ("rome", False)
    assert verified.root is pinned_roots()[1]
    assert verified.chain is chain
    assert verified.chip_fingerprint.hex() == "ce2cba2df8808d188f445192418e008ecf9bd1464db35ea64afa3b3b6966396c"
    assert verified.pdh_fingerprint.hex() == "a19ef679477f2256d802ce9054ee6d1145dbeed52998c66ea97499a01d977c54"


@pytest.mark.parametrize("generation", ["naples", "milan", "genoa", "turin"])
def test_a_real_rome_leads_to_no_other_generation(generation: str) -> None:
    chain = PlatformChain.parse(rome_chain())
    others = [root for root in pinned_roots() if root.generation == generation]
    with pytest.raises(UntrustedRoot):
        verify_platform(chain, others)


@pytest.mark.parametrize("bits", [2048, 4096])
def test_a_platform_with_a_named_root_is_genuine_and_emulated(bits: int) -> None:
    platform = make_platform(bits=bits)
    verified = verify_platform(platform.chain, [*pinned_roots(), named_root(platform.ca.to_bytes())])
    assert (verified.generation, verified.emulated) == ("emulated", True)


def test_a_platform_whose_root_nobody_named_is_refused(platform: SyntheticPlatform) -> None:
    with pytest.raises(UntrustedRoot, match="none of the trusted roots"):
        verify_platform(platform.chain, pinned_roots())
    with pytest.raises(UntrustedRoot):
        verify_platform(platform.chain, [])


def test_both_orders_of_the_pek_signatures_are_genuine(platform: SyntheticPlatform) -> None:
    keys = platform.keys
    pek = sign(sign(bare(Usage.PEK, keys.pek), Usage.CEK, keys.cek), Usage.OCA, keys.oca)
    assert [slot.usage for slot in pek.slots] != [slot.usage for slot in platform.chain.pek.slots]
    verify_platform(replace(platform.chain, pek=pek), [platform.root])


# --- roots -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2048, 4096])
@pytest.mark.parametrize("generation", ["naples", "rome", "milan", "genoa", "turin"])
def test_a_forged_root_with_amds_real_key_ids_is_untrusted(generation: str, bits: int) -> None:
    # security.md A1: everything is signed and consistent, and the ids are AMD's; only the keys are not.
    real = next(root for root in pinned_roots() if root.generation == generation)
    ca = with_key_ids(shared_ca(bits), ark_key_id=real.ark.key_id, ask_key_id=real.ask.key_id)
    platform = make_platform(ca=ca)
    assert (ca.ark.key_id, ca.ask.key_id) == (real.ark.key_id, real.ask.key_id)
    verify_platform(platform.chain, [ca.root])
    with pytest.raises(UntrustedRoot):
        verify_platform(platform.chain, pinned_roots())


def test_a_root_that_does_not_hold_together_is_refused(platform: SyntheticPlatform) -> None:
    other = fresh_ca()
    broken = replace(platform.root, ark=other.ark)
    with pytest.raises(BadSignature, match="ARK did not sign this ASK"):
        verify_platform(platform.chain, [broken])


def test_a_named_root_does_not_stand_in_front_of_amds(platform: SyntheticPlatform) -> None:
    real = replace(platform.root, emulated=False, generation="rome")
    for roots in ([platform.root, real], [real, platform.root]):
        assert verify_platform(platform.chain, roots).generation == "rome"


# --- the CEK -----------------------------------------------------------------------------------------------------


def test_an_unsigned_cek_is_reported_as_such_and_never_accepted(platform: SyntheticPlatform) -> None:
    for roots in ([platform.root], [*pinned_roots(), platform.root], []):
        with pytest.raises(UnsignedCek) as refused:
            verify_platform(platform.unsigned_chain, roots)
        assert refused.value.reason is Reason.CEK_UNSIGNED


def test_the_key_services_copy_completes_an_unsigned_chain(platform: SyntheticPlatform) -> None:
    completed = attach_cek(platform.unsigned_chain, platform.chain.cek)
    assert completed == platform.chain
    verify_platform(completed, [platform.root])


def test_two_downloads_of_a_cek_differ_and_mean_the_same(platform: SyntheticPlatform) -> None:
    again = add_rsa_signature(unsigned(platform.chain.cek), key=platform.ca.ask_key)
    assert again.raw != platform.chain.cek.raw
    assert again.fingerprint == platform.chain.cek.fingerprint
    verified = verify_platform(attach_cek(platform.chain, again), [platform.root])
    assert verified.chip_fingerprint == platform.chain.cek.fingerprint


def test_the_signed_cek_of_another_chip_is_not_attached(platform: SyntheticPlatform) -> None:
    other = make_platform()
    with pytest.raises(Refused) as refused:
        attach_cek(platform.unsigned_chain, other.chain.cek)
    assert refused.value.reason is Reason.CEK_MISMATCH


def test_a_certificate_that_is_no_cek_is_not_attached(platform: SyntheticPlatform) -> None:
    with pytest.raises(Refused) as refused:
        attach_cek(platform.unsigned_chain, platform.chain.oca)
    assert refused.value.reason is Reason.CEK_MISMATCH


def test_an_unsigned_copy_completes_nothing(platform: SyntheticPlatform) -> None:
    with pytest.raises(UnsignedCek):
        attach_cek(platform.unsigned_chain, platform.unsigned_chain.cek)


def test_a_cek_that_signs_itself_is_untrusted(platform: SyntheticPlatform) -> None:
    cek = sign(unsigned(platform.chain.cek), Usage.CEK, platform.keys.cek)
    with pytest.raises(UntrustedRoot):
        verify_platform(replace(platform.chain, cek=cek), [platform.root])


# --- evil twins of every link ------------------------------------------------------------------------------------


def _wrong_pdh(p: SyntheticPlatform) -> PlatformChain:
    return replace(p.chain, pdh=sign(bare(Usage.PDH, p.keys.pdh), Usage.PEK, p384()))


def _unsigned_pdh(p: SyntheticPlatform) -> PlatformChain:
    return replace(p.chain, pdh=bare(Usage.PDH, p.keys.pdh))


def _pdh_by_cek(p: SyntheticPlatform) -> PlatformChain:
    return replace(p.chain, pdh=sign(bare(Usage.PDH, p.keys.pdh), Usage.CEK, p.keys.cek))


def _pdh_with_second_signature(p: SyntheticPlatform) -> PlatformChain:
    return replace(p.chain, pdh=sign(p.chain.pdh, Usage.OCA, p.keys.oca))


def _pek_signed(p: SyntheticPlatform, *signatures: tuple[Usage, ec.EllipticCurvePrivateKey]) -> PlatformChain:
    pek = bare(Usage.PEK, p.keys.pek)
    for usage, key in signatures:
        pek = sign(pek, usage, key)
    return replace(p.chain, pek=pek)


def _pek_by_itself(p: SyntheticPlatform) -> PlatformChain:
    return _pek_signed(p, (Usage.PEK, p.keys.pek), (Usage.PEK, p.keys.pek))


def _pek_by_itself_in_others_names(p: SyntheticPlatform) -> PlatformChain:
    return _pek_signed(p, (Usage.OCA, p.keys.pek), (Usage.CEK, p.keys.pek))


def _pek_by_oca_only(p: SyntheticPlatform) -> PlatformChain:
    return _pek_signed(p, (Usage.OCA, p.keys.oca))


def _pek_by_cek_only(p: SyntheticPlatform) -> PlatformChain:
    return _pek_signed(p, (Usage.CEK, p.keys.cek))


def _pek_by_cek_twice(p: SyntheticPlatform) -> PlatformChain:
    return _pek_signed(p, (Usage.CEK, p.keys.cek), (Usage.CEK, p.keys.cek))


def _pek_by_oca_twice(p: SyntheticPlatform) -> PlatformChain:
    return _pek_signed(p, (Usage.OCA, p.keys.oca), (Usage.OCA, p.keys.oca))


def _pek_with_keys_exchanged(p: SyntheticPlatform) -> PlatformChain:
    return _pek_signed(p, (Usage.OCA, p.keys.cek), (Usage.CEK, p.keys.oca))


def _oca_by_somebody_else(p: SyntheticPlatform) -> PlatformChain:
    return replace(p.chain, oca=sign(bare(Usage.OCA, p.keys.oca), Usage.OCA, p384()))


def _oca_unsigned(p: SyntheticPlatform) -> PlatformChain:
    return replace(p.chain, oca=bare(Usage.OCA, p.keys.oca))


def _oca_of_another_platform(p: SyntheticPlatform) -> PlatformChain:
    return replace(p.chain, oca=make_platform().chain.oca)


def _oca_with_the_ceks_key(p: SyntheticPlatform) -> PlatformChain:
    keys = replace(p.keys, oca=p.keys.cek)
    return make_platform(keys=keys).chain


def _pek_with_the_ocas_key(p: SyntheticPlatform) -> PlatformChain:
    return make_platform(keys=replace(p.keys, pek=p.keys.oca)).chain


def _pek_with_the_ceks_key(p: SyntheticPlatform) -> PlatformChain:
    return make_platform(keys=replace(p.keys, pek=p.keys.cek)).chain


def _pdh_with_the_peks_key(p: SyntheticPlatform) -> PlatformChain:
    return make_platform(keys=replace(p.keys, pdh=p.keys.pek)).chain


def _cek_of_another_chip(p: SyntheticPlatform) -> PlatformChain:
    return replace(p.chain, cek=make_platform().chain.cek)


@pytest.mark.parametrize(
    ("twist", "broken"),
    [
        (_wrong_pdh, {PEK_PDH}),
        (_unsigned_pdh, {PEK_PDH}),
        (_pdh_by_cek, {PEK_PDH}),
        (_pdh_with_second_signature, {PEK_PDH}),
        (_pek_by_itself, {CEK_PEK, OCA_PEK}),
        (_pek_by_itself_in_others_names, {CEK_PEK, OCA_PEK}),
        (_pek_by_oca_only, {CEK_PEK}),
        (_pek_by_cek_only, {OCA_PEK}),
        (_pek_by_cek_twice, {CEK_PEK, OCA_PEK}),
        (_pek_by_oca_twice, {CEK_PEK, OCA_PEK}),
        (_pek_with_keys_exchanged, {CEK_PEK, OCA_PEK}),
        (_oca_by_somebody_else, {OCA_OCA}),
        (_oca_unsigned, {OCA_OCA}),
        (_oca_of_another_platform, {OCA_PEK}),
        (_oca_with_the_ceks_key, {OCA_PEK}),
        (_pek_with_the_ocas_key, {OCA_PEK}),
        (_pek_with_the_ceks_key, {CEK_PEK}),
        (_pdh_with_the_peks_key, {PEK_PDH}),
        (_cek_of_another_chip, {CEK_PEK}),
    ],
)
def test_a_twisted_platform_is_refused_at_the_right_link(
    platform: SyntheticPlatform, twist: Callable[[SyntheticPlatform], PlatformChain], broken: set[Link]
) -> None:
    chain = twist(platform)
    links = check_links(chain, [platform.root])
    assert {link for link in LINKS if not links.good(link)} == broken
    with pytest.raises(BadSignature):
        verify_platform(chain, [platform.root])


@pytest.mark.parametrize("name", ["pdh", "pek", "oca", "cek"])
def test_a_certificate_of_another_genuine_platform_is_refused(platform: SyntheticPlatform, name: str) -> None:
    other = make_platform()
    assert other.ca is platform.ca
    with pytest.raises(BadSignature):
        verify_platform(replace(platform.chain, **{name: getattr(other.chain, name)}), [platform.root])


# --- confusion of kinds (security.md A14) ------------------------------------------------------------------------

NAMES = ("pdh", "pek", "oca", "cek")


@pytest.mark.parametrize("order", [order for order in permutations(NAMES) if order != NAMES])
def test_certificates_in_others_places_are_refused(platform: SyntheticPlatform, order: tuple[str, ...]) -> None:
    swapped = {place: getattr(platform.chain, name) for place, name in zip(NAMES, order, strict=True)}
    with pytest.raises(ParseError, match="a platform's chain is PDH, PEK, OCA, CEK"):
        PlatformChain(**swapped)


USAGES = [Usage.ARK, Usage.ASK, Usage.NONE, Usage.OCA, Usage.PEK, Usage.PDH, Usage.CEK]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("usage", USAGES)
def test_a_certificate_under_another_usage_is_refused(platform: SyntheticPlatform, name: str, usage: Usage) -> None:
    cert = getattr(platform.chain, name)
    relabelled = with_bytes(cert, 8, struct.pack("<I", usage))
    if usage is cert.usage:
        assert SevCertificate.parse(relabelled) == cert
        return
    with pytest.raises((ParseError, BadSignature, UntrustedRoot)):
        verify_platform(
            replace(platform.chain, **{name: SevCertificate.parse(relabelled)}),
            [platform.root],
        )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("slot", [0, 1])
@pytest.mark.parametrize("usage", USAGES)
def test_a_signature_under_another_usage_is_refused(
    platform: SyntheticPlatform, name: str, slot: int, usage: Usage
) -> None:
    cert = getattr(platform.chain, name)
    relabelled = with_bytes(cert, BODY + slot * 520, struct.pack("<I", usage))
    if cert.slots[slot].usage == usage:
        assert SevCertificate.parse(relabelled) == cert
        return
    with pytest.raises((ParseError, BadSignature, UntrustedRoot)):
        verify_platform(
            replace(platform.chain, **{name: SevCertificate.parse(relabelled)}),
            [platform.root],
        )


def test_the_signatures_of_two_certificates_do_not_change_places(platform: SyntheticPlatform) -> None:
    chain = platform.chain
    pek = SevCertificate.parse(chain.pek.body + chain.oca.raw[BODY:])
    with pytest.raises(BadSignature):
        verify_platform(replace(chain, pek=pek), [platform.root])


@pytest.mark.slow
def test_a_thousand_roots_of_somebody_else_are_refused() -> None:
    # security.md A1 asks for many forged chains. The RSA keys are few (they are slow to make), the chains are all new.
    cas = [shared_ca(2048), make_ca()]
    for number in range(1000):
        ca = shared_ca(4096) if number % 10 == 0 else cas[number % 2]
        cek = add_rsa_signature(bare(Usage.CEK, _KEYS.cek, (1, number % 256)), key=ca.ask_key)
        chain = replace(_CHAIN, cek=cek)
        with pytest.raises(UntrustedRoot):
            verify_platform(chain, pinned_roots())


_KEYS = make_keys()
_CHAIN = PlatformChain(
    pdh=sign(bare(Usage.PDH, _KEYS.pdh), Usage.PEK, _KEYS.pek),
    pek=sign(sign(bare(Usage.PEK, _KEYS.pek), Usage.OCA, _KEYS.oca), Usage.CEK, _KEYS.cek),
    oca=sign(bare(Usage.OCA, _KEYS.oca), Usage.OCA, _KEYS.oca),
    cek=bare(Usage.CEK, _KEYS.cek),
)


# --- every link's outcome ----------------------------------------------------------------------------------------


def test_all_links_of_a_genuine_platform_are_good(platform: SyntheticPlatform) -> None:
    links = check_links(platform.chain, [platform.root])
    assert all(links.good(link) for link in LINKS)
    assert links.first_failure is None
    assert links.root == platform.root


def test_every_link_is_checked_after_a_failure_too() -> None:
    other = make_keys()
    chain = PlatformChain(
        pdh=bare(Usage.PDH, other.pdh),
        pek=bare(Usage.PEK, other.pek),
        oca=bare(Usage.OCA, other.oca),
        cek=bare(Usage.CEK, other.cek),
    )
    broken_root = replace(shared_ca().root, ark=fresh_ca().ask)
    links = check_links(chain, [broken_root])
    assert {link for link in LINKS if not links.good(link)} == set(LINKS)
    assert list(links.failures) == [ASK_CEK, ARK_ARK, ARK_ASK, CEK_PEK, OCA_OCA, OCA_PEK, PEK_PDH]
    assert isinstance(links.first_failure, UnsignedCek)


def test_a_root_that_alone_was_asked_for_is_shown_even_where_it_did_not_sign(platform: SyntheticPlatform) -> None:
    rome = pinned_roots()[1]
    links = check_links(platform.chain, [rome])
    assert links.root is rome
    assert [link for link in LINKS if not links.good(link)] == [ASK_CEK]
    assert check_links(platform.chain, pinned_roots()).root is None
