"""Complete platforms made in the process: a root of their own, every certificate, and all the private keys.

RSA keys take long to make, so each size is made once a process and shared; pass `ca=fresh_ca()` for another one.
2048-bit roots (Naples' form) are the default because they are fast; the 4096-bit form differs in hash and sizes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

from cryptography.hazmat.primitives.asymmetric import ec, rsa

from common.sev.abi import Algo, Usage
from common.sev.certs import amd, sev
from common.sev.certs.amd import AmdCertificate, CaChain
from common.sev.certs.chain import PlatformChain
from common.sev.certs.roots import EMULATED, Root, pinned_roots
from common.sev.certs.sev import KEY_ALGO, SevCertificate, add_ecdsa_signature, add_rsa_signature


@dataclass(frozen=True, kw_only=True)
class SyntheticCa:
    """An ARK and ASK with their private keys."""

    ask: AmdCertificate
    ark: AmdCertificate
    ask_key: rsa.RSAPrivateKey
    ark_key: rsa.RSAPrivateKey

    @property
    def root(self) -> Root:
        """Ours as a root that a configuration would name."""
        return Root(generation=EMULATED, emulated=True, ask=self.ask, ark=self.ark)

    @property
    def chain(self) -> CaChain:
        return CaChain(ask=self.ask, ark=self.ark)

    def to_bytes(self) -> bytes:
        """ASK‖ARK, as AMD publishes its own."""
        return self.chain.to_bytes()


@dataclass(frozen=True, kw_only=True)
class PlatformKeys:
    """The private keys of a platform; only the owner's real firmware would have them."""

    pdh: ec.EllipticCurvePrivateKey
    pek: ec.EllipticCurvePrivateKey
    oca: ec.EllipticCurvePrivateKey
    cek: ec.EllipticCurvePrivateKey

    def of(self, usage: Usage) -> ec.EllipticCurvePrivateKey:
        """The key of one kind."""
        key: ec.EllipticCurvePrivateKey = getattr(self, usage.name.lower())
        return key


@dataclass(frozen=True, kw_only=True)
class SyntheticPlatform:
    """A platform whose chain verifies under `root`.

    Attributes:
        chain: PDH, PEK, OCA and the CEK with its ASK signature.
        unsigned_chain: the same with the CEK as a platform itself exports it.
        root: the root that a verifier must name.
        ca: the root with its keys.
        keys: the platform's private keys.
        chip_id: 64 bytes, as GET_ID2 gives them.
    """

    chain: PlatformChain
    root: Root
    ca: SyntheticCa
    keys: PlatformKeys
    chip_id: bytes

    @property
    def unsigned_chain(self) -> PlatformChain:
        return replace(self.chain, cek=unsigned(self.chain.cek))


def make_platform(
    *, ca: SyntheticCa | None = None, bits: int = 2048, keys: PlatformKeys | None = None, api: tuple[int, int] = (1, 55)
) -> SyntheticPlatform:
    """A platform with keys of its own under `ca` (the process's shared one of that size if absent)."""
    ca = ca or shared_ca(bits)
    keys = keys or make_keys()
    oca = sign(bare(Usage.OCA, keys.oca, api), Usage.OCA, keys.oca)
    cek = add_rsa_signature(bare(Usage.CEK, keys.cek, api), key=ca.ask_key)
    # In the order that firmware uses, which is not the one in AMD's text.
    pek = sign(sign(bare(Usage.PEK, keys.pek, api), Usage.OCA, keys.oca), Usage.CEK, keys.cek)
    pdh = sign(bare(Usage.PDH, keys.pdh, api), Usage.PEK, keys.pek)
    point = keys.cek.public_key().public_numbers()
    return SyntheticPlatform(
        chain=PlatformChain(pdh=pdh, pek=pek, oca=oca, cek=cek),
        root=ca.root,
        ca=ca,
        keys=keys,
        # Any 64 bytes that differ from chip to chip will do.
        chip_id=(point.x.to_bytes(48, "big") + point.y.to_bytes(48, "big"))[:64],
    )


def make_keys() -> PlatformKeys:
    """Four new P-384 keys."""
    return PlatformKeys(pdh=p384(), pek=p384(), oca=p384(), cek=p384())


def p384() -> ec.EllipticCurvePrivateKey:
    """A new P-384 key."""
    return ec.generate_private_key(ec.SECP384R1())


@cache
def shared_ca(bits: int = 2048) -> SyntheticCa:
    """The process's root of this size; carries Milan's key ids, as a software platform's does."""
    return make_ca(bits=bits)


def fresh_ca(*, bits: int = 2048) -> SyntheticCa:
    """Somebody else's root: new keys."""
    return make_ca(bits=bits)


def make_ca(*, bits: int = 2048, ask_key_id: bytes | None = None, ark_key_id: bytes | None = None) -> SyntheticCa:
    """A root with new keys, carrying Milan's key ids unless others are given: they prove nothing."""
    milan = next(root for root in pinned_roots() if root.generation == "milan")
    return _issue(_rsa(bits), _rsa(bits), ark_key_id or milan.ark.key_id, ask_key_id or milan.ask.key_id)


def with_key_ids(ca: SyntheticCa, *, ark_key_id: bytes, ask_key_id: bytes) -> SyntheticCa:
    """The keys of `ca` in certificates with other key ids."""
    return _issue(ca.ark_key, ca.ask_key, ark_key_id, ask_key_id)


def _issue(ark_key: rsa.RSAPrivateKey, ask_key: rsa.RSAPrivateKey, ark_id: bytes, ask_id: bytes) -> SyntheticCa:
    ark = amd.encode(
        usage=Usage.ARK, key_id=ark_id, certifying_id=ark_id, public_key=ark_key.public_key(), signer=ark_key
    )
    ask = amd.encode(
        usage=Usage.ASK, key_id=ask_id, certifying_id=ark_id, public_key=ask_key.public_key(), signer=ark_key
    )
    return SyntheticCa(ask=ask, ark=ark, ask_key=ask_key, ark_key=ark_key)


def bare(usage: Usage, key: ec.EllipticCurvePrivateKey, api: tuple[int, int] = (1, 55)) -> SevCertificate:
    """A certificate without signatures."""
    algo: Algo = KEY_ALGO[usage]
    return sev.encode(usage=usage, algo=algo, public_key=key.public_key(), api_major=api[0], api_minor=api[1])


def sign(cert: SevCertificate, usage: Usage, key: ec.EllipticCurvePrivateKey) -> SevCertificate:
    """Sign as a key of `usage`, into the next free slot."""
    return add_ecdsa_signature(cert, usage=usage, key=key)


def unsigned(cert: SevCertificate) -> SevCertificate:
    """The same certificate with both slots empty."""
    return sev.encode(
        usage=cert.usage,
        algo=cert.algo,
        public_key=cert.public_key,
        api_major=cert.api_major,
        api_minor=cert.api_minor,
    )


def with_bytes(cert: SevCertificate | AmdCertificate, at: int, new: bytes) -> bytes:
    """The certificate's bytes with some of them replaced: usually no certificate any more."""
    return cert.raw[:at] + new + cert.raw[at + len(new) :]


def _rsa(bits: int) -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=bits)
