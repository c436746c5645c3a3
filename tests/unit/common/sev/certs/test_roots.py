"""Which roots are believed: AMD's, by whole body, and those that somebody names."""

from __future__ import annotations

import pytest

from common.sev.abi import Usage
from common.sev.certs import amd, pss
from common.sev.certs.amd import AmdCertificate, CaChain
from common.sev.certs.roots import Root, complete_ark, named_root, pinned_root_of, pinned_roots, read_ca
from common.sev.errors import BadSignature, ParseError, UntrustedRoot
from tests.support.chains import make_ca, shared_ca
from tests.support.vectors import vectors

# formats.md sections 2 and 3: generation -> bits, key ids (ARK, ASK), fingerprints (ARK, ASK). Seen by independent
# users on real machines too (virtee/sevctl issue 185).
KNOWN = {
    "naples": (
        2048,
        "1bb987c359494606b174945601c9ea5b",
        "e139970cfc464377ae61b289e2f9e96e",
        "8efddcaaf84990cf6354d93637be270220cf15797332b3d918c3b8cc77349f31",
        "5dff2a2a4dd59dc095d73a26af28be523192ade830bdd35bacdd81ee75584c45",
    ),
    "rome": (
        4096,
        "e6002122fb58419399d15fee7b131351",
        "c6cbcf145b3146f498e40ecb4ad4fded",
        "3d2c1157c29ef7bd4207fc0c8b08db080e579ceba267f8c93bec8dce73f5a5e2e60d959ac37ea82176c1a0c61ae203ed",
        "d8cd9d1798c311c96e009a91552f17b4ddc4886a064ec933697734965b9ab29db803c79604e2725658f0861bfaf09ad4",
    ),
    "milan": (
        4096,
        "94c38e4177d0479292a7ae671d083fb6",
        "73478c05cc174bfeb06e718fa75dc3c8",
        "569da618dfe64015c343db6d975e77b72fdeacd16edd02d9d09b889b8f0f1d91ffa5dfbd86f7ac574a1a7883b7a1e737",
        "95cba79ba3c77daea79f741bade8156a50b1c59f6d6fda104d16dd264729f5ee8989522f3711fc7c84719921ceb31bc0",
    ),
    "genoa": (
        4096,
        "9f9d4a8fe761456599f6946c4c010f3a",
        "acbb4ad21acc436fb3e932f812cd01b0",
        "b66e16ff0ebeed57f0c4dffa154872c4156f2e5b1c2f4e66e58fc37f1d2a60d31a342ecb6430a9b2510a970c75c37926",
        "9fa6db577758411b576cfcdc3c2f0851e60f0c69ffdcb6301ad2f7864f91e829f62925888464d9d285612eb03b3fc63d",
    ),
    "turin": (
        4096,
        "d05c3a8bde484904b49552422ceb3942",
        "15051693f7304d65a527b4a7f3f7cb77",
        "712a28007da1097e8c4fd3a2e8655012b27e04042323a0a30e111fc0cf698961040c6fc3ff2053abe70432cfef411a0e",
        "9ae10c44573f0c0dee8044a89ee1ba5acd8f3909651fd3c96bfec3d4419c1bd60d7d9a35d42509c3a71e307b0f60c1d1",
    ),
}


def _root(generation: str) -> Root:
    return next(root for root in pinned_roots() if root.generation == generation)


def test_five_generations_are_pinned_oldest_first() -> None:
    assert [root.generation for root in pinned_roots()] == list(KNOWN)
    assert not any(root.emulated for root in pinned_roots())


@pytest.mark.parametrize("generation", KNOWN)
def test_a_pinned_root_has_the_figures_that_everybody_knows(generation: str) -> None:
    bits, ark_id, ask_id, ark_fingerprint, ask_fingerprint = KNOWN[generation]
    root = _root(generation)
    assert (root.ark.usage, root.ask.usage) == (Usage.ARK, Usage.ASK)
    assert root.ark.public_key.key_size == root.ask.public_key.key_size == bits
    assert root.ark.key_id.hex() == root.ark.certifying_id.hex() == root.ask.certifying_id.hex() == ark_id
    assert root.ask.key_id.hex() == ask_id
    assert root.ark.fingerprint.hex() == ark_fingerprint
    assert root.ask.fingerprint.hex() == ask_fingerprint


@pytest.mark.parametrize("generation", KNOWN)
def test_a_pinned_root_is_amds_file_to_the_byte(generation: str) -> None:
    folder, root = vectors() / "amd-roots", _root(generation)
    assert root.ask.raw == (folder / f"{generation}-ask.cert").read_bytes()
    assert root.ark.raw == (folder / f"{generation}-ark.cert").read_bytes()


def test_the_naples_ark_as_first_published_is_completed() -> None:
    short = (vectors() / "amd-roots" / "naples-ark-as-published-576.cert").read_bytes()
    assert len(short) == 576
    assert complete_ark(short) == _root("naples").ark


@pytest.mark.parametrize("at", [0, 4, 20, 36, 64, 320, 575])
def test_an_unsigned_ark_is_refused_if_any_byte_differs_from_the_pin(at: int) -> None:
    body = bytearray(_root("naples").ark.body)
    body[at] ^= 1
    with pytest.raises(ParseError, match="only where it is AMD's for Naples"):
        complete_ark(bytes(body))


def test_an_unsigned_ark_of_somebody_else_is_refused() -> None:
    with pytest.raises(ParseError, match="only where it is AMD's for Naples"):
        complete_ark(shared_ca(2048).ark.body)
    with pytest.raises(ParseError, match="only where it is AMD's for Naples"):
        complete_ark(_root("rome").ark.body)


def test_an_ask_and_the_short_naples_ark_are_read_together() -> None:
    root = _root("naples")
    ca = read_ca(root.ask.raw + root.ark.body)
    assert pinned_root_of(ca) is root
    with pytest.raises(ParseError, match="only where it is AMD's for Naples"):
        read_ca(root.ask.raw + shared_ca(2048).ark.body)


# --- named roots -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2048, 4096])
def test_a_named_root_is_emulated_whatever_key_ids_it_carries(bits: int) -> None:
    ca = shared_ca(bits)
    assert ca.ark.key_id == _root("milan").ark.key_id
    root = named_root(ca.to_bytes())
    assert (root.generation, root.emulated) == ("emulated", True)
    assert (root.ask, root.ark) == (ca.ask, ca.ark)
    assert pinned_root_of(ca.chain) is None


@pytest.mark.parametrize("generation", KNOWN)
def test_naming_amds_own_root_gives_the_pinned_one(generation: str) -> None:
    root = _root(generation)
    assert named_root(root.ask.raw + root.ark.raw) is root


def test_a_body_is_what_is_pinned_and_not_the_signature() -> None:
    # AMD could publish the same ASK with a new random salt; the signature shown here is nobody's, and is not used.
    root = _root("rome")
    other = AmdCertificate.parse(root.ask.body + bytes(512))
    assert pinned_root_of(CaChain(ask=other, ark=root.ark)) is root


@pytest.mark.parametrize("broken", ["ask", "ark"])
def test_a_named_root_must_hold_together(broken: str) -> None:
    ca = shared_ca()
    certs = {"ask": bytearray(ca.ask.raw), "ark": bytearray(ca.ark.raw)}
    certs[broken][-1] ^= 1
    with pytest.raises(BadSignature, match=f"ARK did not sign this {broken.upper()}"):
        named_root(bytes(certs["ask"] + certs["ark"]))


def test_a_named_root_may_not_hold_one_of_amds_keys() -> None:
    # AMD's ASK under an ARK of one's own: every genuine Naples chip would print as emulated.
    naples, ours = _root("naples"), make_ca(ark_key_id=_root("naples").ark.key_id)
    body = amd.encode_body(
        usage=Usage.ASK,
        key_id=naples.ask.key_id,
        certifying_id=ours.ark.key_id,
        public_key=naples.ask.public_key,
    )
    stolen = body + pss.sign(ours.ark_key, body)
    with pytest.raises(UntrustedRoot, match="one of AMD's keys"):
        named_root(stolen + ours.ark.raw)


def test_a_named_root_that_is_no_pair_is_refused() -> None:
    ca = shared_ca()
    for data in (b"", ca.ask.raw, ca.ark.raw + ca.ask.raw, b"-----BEGIN CERTIFICATE-----"):
        with pytest.raises(ParseError):
            named_root(data)
