"""Which ARK and ASK to believe: AMD's, pinned per generation as data, and roots that configuration names.

A self-signed ARK proves nothing, and a key id is only text: anybody can make an ARK that carries AMD's. So a
generation is decided by the whole signed bodies of ASK and ARK, rebuilt from the figures in the modules beside this
one (one a generation, with provenance). A named root, such as a software platform's own, never passes for AMD's.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric import rsa

from common.sev.abi import AMD_CERT_SIZE_2048, Usage
from common.sev.certs import pss
from common.sev.certs.amd import AmdCertificate, CaChain, encode_body, verify_amd_signature
from common.sev.certs.roots import genoa, milan, naples, rome, turin
from common.sev.errors import ParseError, UntrustedRoot

EMULATED = "emulated"
# An unsigned Naples ARK: what its signature would cover.
SHORT_ARK_SIZE = 576


class _Figures(Protocol):
    """What each data module holds: hex text; moduli big-endian, signatures as in the file."""

    GENERATION: str
    ARK_KEY_ID: str
    ASK_KEY_ID: str
    ARK_MODULUS: str
    ARK_SIGNATURE: str
    ASK_MODULUS: str
    ASK_SIGNATURE: str


# sevctl tries its built-in certificates in this order too.
_GENERATIONS: tuple[_Figures, ...] = (naples, rome, milan, genoa, turin)


@dataclass(frozen=True, kw_only=True)
class Root:
    """A root that may be believed.

    Attributes:
        generation: `naples`, `rome`, `milan`, `genoa`, `turin`, or `emulated`.
        emulated: not AMD's: somebody named it in a configuration or on a command line.
        ask: signs CEKs.
        ark: signs the ASK and itself.
    """

    generation: str
    emulated: bool
    ask: AmdCertificate
    ark: AmdCertificate

    def is_root_of(self, ca: CaChain) -> bool:
        """Whether the signed bodies of both certificates are this root's. Signatures may differ, PSS is randomised."""
        return (ca.ask.body, ca.ark.body) == (self.ask.body, self.ark.body)


@cache
def pinned_roots() -> tuple[Root, ...]:
    """AMD's roots, oldest generation first."""
    return tuple(_pinned(figures) for figures in _GENERATIONS)


def pinned_root_of(ca: CaChain) -> Root | None:
    """AMD's root whose bodies these are; None for everybody else's."""
    return next((root for root in pinned_roots() if root.is_root_of(ca)), None)


def read_ca(data: bytes) -> CaChain:
    """Decode ASK‖ARK: 1664 or 3200 bytes, or 1408 where it ends in the Naples ARK as AMD first published it.

    Nothing is verified, save that an ARK without a signature must be the pinned Naples ARK to the byte; its signature
    is then added.

    Raises:
        ParseError: these are not an ASK and an ARK, in this order.
    """
    if len(data) != AMD_CERT_SIZE_2048 + SHORT_ARK_SIZE:
        return CaChain.parse(data)
    ask = AmdCertificate.parse(data[:AMD_CERT_SIZE_2048])
    return CaChain(ask=ask, ark=complete_ark(data[AMD_CERT_SIZE_2048:]))


def complete_ark(data: bytes) -> AmdCertificate:
    """The pinned Naples ARK for the 576 bytes of it that AMD first published, without a signature.

    Raises:
        ParseError: any other bytes.
    """
    ark = pinned_roots()[0].ark
    if bytes(data) != ark.body:
        raise ParseError("an ARK without a signature is accepted only where it is AMD's for Naples")
    return ark


def named_root(ask_ark: bytes) -> Root:
    """The root that a person or a configuration names by its ASK‖ARK.

    AMD's own certificates give AMD's pinned root. Everything else is `emulated`, whatever key ids it carries.

    Raises:
        ParseError: these are not an ASK and an ARK.
        BadSignature: the ARK did not sign itself and the ASK.
        UntrustedRoot: one of the keys is AMD's and the rest is not.
    """
    ca = read_ca(ask_ark)
    if pinned := pinned_root_of(ca):
        return pinned
    verify_amd_signature(ca.ark, ca.ark)
    verify_amd_signature(ca.ask, ca.ark)
    # Trusting such a mixture would make every genuine chip of that generation print as `emulated`.
    ours = {key.public_numbers() for root in pinned_roots() for key in (root.ask.public_key, root.ark.public_key)}
    if ours & {ca.ask.public_key.public_numbers(), ca.ark.public_key.public_numbers()}:
        raise UntrustedRoot("the named root holds one of AMD's keys beside a certificate that is not AMD's")
    return Root(generation=EMULATED, emulated=True, ask=ca.ask, ark=ca.ark)


def _pinned(figures: _Figures) -> Root:
    ark_id, ask_id = bytes.fromhex(figures.ARK_KEY_ID), bytes.fromhex(figures.ASK_KEY_ID)
    return Root(
        generation=figures.GENERATION,
        emulated=False,
        ask=_rebuild(Usage.ASK, ask_id, ark_id, figures.ASK_MODULUS, figures.ASK_SIGNATURE),
        ark=_rebuild(Usage.ARK, ark_id, ark_id, figures.ARK_MODULUS, figures.ARK_SIGNATURE),
    )


def _rebuild(usage: Usage, key_id: bytes, certifying_id: bytes, modulus: str, signature: str) -> AmdCertificate:
    numbers = rsa.RSAPublicNumbers(pss.PUBLIC_EXPONENT, int("".join(modulus.split()), 16))
    body = encode_body(usage=usage, key_id=key_id, certifying_id=certifying_id, public_key=numbers.public_key())
    return AmdCertificate.parse(body + bytes.fromhex(signature))
