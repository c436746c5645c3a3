"""A platform's certificates as the tree that `sevctl verify` prints, to the letter.

Each line is `KIND ALGORITHM FINGERPRINT`; the fingerprint covers the signed body only. A child signs the line at whose
level it hangs, which is not always the line above: both OCA and CEK sign the PEK.
"""

from __future__ import annotations

from common.sev.abi import Algo
from common.sev.certs.amd import AmdCertificate
from common.sev.certs.sev import SevCertificate
from common.sev.certs.verify import (
    ARK_ARK,
    ARK_ASK,
    ASK_CEK,
    CEK_PEK,
    OCA_OCA,
    OCA_PEK,
    PEK_PDH,
    Link,
    Links,
)

_GREEN, _RED, _PLAIN = "\x1b[32m", "\x1b[31m", "\x1b[0m"
_SELF, _SELF_BAD = "\N{BULLET}", "\N{BULLET}\N{COMBINING SHORT SOLIDUS OVERLAY}"
_LINK = "\N{LEFTWARDS ARROW WITH TIP UPWARDS}"
_LINK_BAD = "\N{LEFTWARDS ARROW WITH TIP UPWARDS}\N{COMBINING LONG SOLIDUS OVERLAY}"


def render_tree(links: Links, *, colour: bool = False) -> str:
    """The tree, an empty line and the legend; no newline at the end.

    ASK and ARK are left out where no trusted root signed the CEK: there is nothing to show that is known.
    """
    paint = _Paint(links, colour=colour)
    chain, root = links.chain, links.root
    lines = [
        describe(chain.pdh),
        f" {paint.link(PEK_PDH)} {describe(chain.pek)}",
        f"   {paint.itself(OCA_OCA)}{paint.link(OCA_PEK)} {describe(chain.oca)}",
        f"    {paint.link(CEK_PEK)} {describe(chain.cek)}",
    ]
    if root:
        lines += [
            f"       {paint.link(ASK_CEK)} {describe(root.ask)}",
            f"         {paint.itself(ARK_ARK)}{paint.link(ARK_ASK)} {describe(root.ark)}",
        ]
    return "\n".join([*lines, "", _legend(colour=colour)])


def describe(cert: SevCertificate | AmdCertificate) -> str:
    """One line: kind, algorithm and fingerprint, as `PEK EP384 E256 a37b51…`."""
    return f"{cert.usage.name} {algorithm(cert)} {cert.fingerprint.hex()}"


def algorithm(cert: SevCertificate | AmdCertificate) -> str:
    """The key's algorithm in sevctl's words: `EP384 E256`, `EP384 D256`, `R2048 R256` or `R4096 R384`."""
    if isinstance(cert, SevCertificate):
        return "EP384 D256" if cert.algo is Algo.ECDH_SHA256 else "EP384 E256"
    return "R2048 R256" if cert.algo is Algo.RSA_SHA256 else "R4096 R384"


class _Paint:
    """The symbol of each link, by how it turned out."""

    def __init__(self, links: Links, *, colour: bool) -> None:
        self._links = links
        self._colour = colour

    def link(self, link: Link) -> str:
        return _symbol(_LINK, _LINK_BAD, good=self._links.good(link), colour=self._colour)

    def itself(self, link: Link) -> str:
        return _symbol(_SELF, _SELF_BAD, good=self._links.good(link), colour=self._colour)


def _symbol(good_form: str, bad_form: str, *, good: bool, colour: bool) -> str:
    symbol = good_form if good else bad_form
    return f"{_GREEN if good else _RED}{symbol}{_PLAIN}" if colour else symbol


def _legend(*, colour: bool) -> str:
    meanings = [
        (_symbol(_SELF, _SELF_BAD, good=True, colour=colour), "self signed"),
        (_symbol(_LINK, _LINK_BAD, good=True, colour=colour), "signs"),
        (_symbol(_SELF, _SELF_BAD, good=False, colour=colour), "invalid self sign"),
        (_symbol(_LINK, _LINK_BAD, good=False, colour=colour), "invalid signs"),
    ]
    return " " + ", ".join(f"{symbol} = {meaning}" for symbol, meaning in meanings)
