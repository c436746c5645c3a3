"""Is a platform genuine: signatures from a trusted root down to the PDH, and nothing else.

No policy is here: which generations, chips, owners and firmware are acceptable is judged elsewhere, and only over what
`verify_platform` returned. The steps, in the order in which a failure is reported:

1. The CEK carries a signature at all; a platform's own copy does not.
2. One of the trusted roots' ASKs signed the CEK. The root decides the generation; key ids and whatever CA certificates
   came along with the chain play no part.
3. That root's ARK signed itself and the ASK.
4. The CEK signed the PEK.
5. The OCA signed itself and the PEK: both owners of the platform speak, and with two keys.
6. The PEK signed the PDH.

In every certificate exactly the expected signatures are present, in any order, and no key signs another certificate
than its place in the chain demands.

The caller MUST fetch a missing CEK signature (`attach_cek`), MUST judge whether the platform is acceptable, and MUST
see that the PDH is still in use when the guest starts: certificates have no expiry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from common.errors import Reason, Refused
from common.sev.abi import Usage
from common.sev.certs.amd import AmdCertificate, verify_amd_signature
from common.sev.certs.chain import PlatformChain
from common.sev.certs.roots import Root
from common.sev.certs.sev import SevCertificate, verify_signature
from common.sev.errors import BadSignature, UnsignedCek, UntrustedRoot

# Which keys sign a certificate of each kind: these, all of these, and no others.
_SIGNERS: dict[Usage, frozenset[Usage]] = {
    Usage.PDH: frozenset({Usage.PEK}),
    Usage.PEK: frozenset({Usage.OCA, Usage.CEK}),
    Usage.OCA: frozenset({Usage.OCA}),
    Usage.CEK: frozenset({Usage.ASK}),
}


@dataclass(frozen=True, kw_only=True)
class Link:
    """One signature of the chain: who signs whom."""

    signer: Usage
    signed: Usage


PEK_PDH = Link(signer=Usage.PEK, signed=Usage.PDH)
OCA_OCA = Link(signer=Usage.OCA, signed=Usage.OCA)
OCA_PEK = Link(signer=Usage.OCA, signed=Usage.PEK)
CEK_PEK = Link(signer=Usage.CEK, signed=Usage.PEK)
ASK_CEK = Link(signer=Usage.ASK, signed=Usage.CEK)
ARK_ARK = Link(signer=Usage.ARK, signed=Usage.ARK)
ARK_ASK = Link(signer=Usage.ARK, signed=Usage.ASK)

# In the order in which failures are reported: nearest to the root first.
LINKS = (ASK_CEK, ARK_ARK, ARK_ASK, CEK_PEK, OCA_OCA, OCA_PEK, PEK_PDH)


@dataclass(frozen=True, kw_only=True)
class Links:
    """How every link of a chain turned out.

    Attributes:
        chain: what was checked.
        root: the root that it was checked against; None where no trusted root signed the CEK.
        failures: what is wrong, by link, nearest to the root first; empty for a genuine platform.
    """

    chain: PlatformChain
    root: Root | None
    failures: Mapping[Link, Refused] = field(compare=False)

    def good(self, link: Link) -> bool:
        """Whether this signature verified."""
        return link not in self.failures

    @property
    def first_failure(self) -> Refused | None:
        """The failure nearest to the root."""
        return next(iter(self.failures.values()), None)


@dataclass(frozen=True, kw_only=True)
class VerifiedPlatform:
    """A genuine platform; only `verify_platform` makes one.

    Attributes:
        chain: its certificates.
        root: the root that it leads to.
    """

    chain: PlatformChain
    root: Root

    @property
    def generation(self) -> str:
        """`naples` to `turin`, or `emulated`."""
        return self.root.generation

    @property
    def emulated(self) -> bool:
        """Whether the root is one that somebody named, and not AMD's."""
        return self.root.emulated

    @property
    def chip_fingerprint(self) -> bytes:
        """SHA-256 of the CEK's body, 32 bytes: names the chip, for ever."""
        return self.chain.cek.fingerprint

    @property
    def pdh_fingerprint(self) -> bytes:
        """SHA-256 of the PDH's body, 32 bytes: names the key that a session is made for."""
        return self.chain.pdh.fingerprint


def verify_platform(chain: PlatformChain, roots: Sequence[Root]) -> VerifiedPlatform:
    """Verify every signature from one of `roots` to the PDH; steps 1 to 6.

    Raises:
        UnsignedCek: step 1, the CEK must be completed from the key service first.
        UntrustedRoot: step 2, none of `roots` signed the CEK.
        BadSignature: any later step.
    """
    links = check_links(chain, roots)
    if failure := links.first_failure:
        raise failure
    if links.root is None:
        raise UntrustedRoot("no trusted root signed the CEK")  # cannot be: its link would have failed
    return VerifiedPlatform(chain=chain, root=links.root)


def check_links(chain: PlatformChain, roots: Sequence[Root]) -> Links:
    """Check every link, also after a failure, so that all of them can be shown.

    Where no root signed the CEK but only one was given, that one is shown as the root, with a broken link.
    """
    root, root_failure = _find_root(chain.cek, roots)
    pdh, pek, oca, cek = chain.pdh, chain.pek, chain.oca, chain.cek
    checks: dict[Link, Callable[[], None]] = {
        CEK_PEK: lambda: _check_link(pek, cek),
        OCA_OCA: lambda: _check_link(oca, oca),
        OCA_PEK: lambda: _check_owner(oca, pek, cek),
        PEK_PDH: lambda: _check_link(pdh, pek),
    }
    failures: dict[Link, Refused] = {}
    if root_failure:
        failures[ASK_CEK] = root_failure
    if root:
        ask, ark = root.ask, root.ark
        checks = {
            ARK_ARK: lambda: verify_amd_signature(ark, ark),
            ARK_ASK: lambda: verify_amd_signature(ask, ark),
            **checks,
        }
    for link, check in checks.items():
        try:
            check()
        except BadSignature as error:
            failures[link] = error
    return Links(chain=chain, root=root, failures=failures)


def attach_cek(chain: PlatformChain, signed: SevCertificate) -> PlatformChain:
    """The chain with the key service's signed copy of its CEK in place of its own.

    Only the signature may be new: each download carries another one, over the same body.

    Raises:
        Refused: CEK_MISMATCH, the signed CEK belongs to another chip.
        UnsignedCek: the copy carries no signature either.
    """
    if signed.body != chain.cek.body:
        raise Refused(Reason.CEK_MISMATCH, "the signed CEK is not this platform's")
    if not signed.is_signed:
        raise UnsignedCek("the key service's CEK carries no signature")
    return replace(chain, cek=signed)


def _find_root(cek: SevCertificate, roots: Sequence[Root]) -> tuple[Root | None, Refused | None]:
    only = roots[0] if len(roots) == 1 else None
    if not cek.is_signed:
        return only, UnsignedCek("the CEK carries no signature: AMD's key service has the signed one")
    # AMD's come first, so that no named root can stand in front of them.
    for root in sorted(roots, key=lambda root: root.emulated):
        try:
            _check_link(cek, root.ask)
        except BadSignature:
            continue
        return root, None
    return only, UntrustedRoot("none of the trusted roots signed the CEK")


def _check_link(cert: SevCertificate, signer: SevCertificate | AmdCertificate) -> None:
    named = {slot.usage for slot in cert.slots if not slot.is_empty}
    if strange := named - _SIGNERS[cert.usage]:
        names = ", ".join(Usage(usage).name for usage in sorted(strange))
        raise BadSignature(f"{cert.usage.name} carries a signature that is not due: by {names}")
    if signer is not cert and isinstance(signer, SevCertificate) and signer.public_key == cert.public_key:
        raise BadSignature(f"{cert.usage.name} and {signer.usage.name} are the same key")
    verify_signature(cert, signer)


def _check_owner(oca: SevCertificate, pek: SevCertificate, cek: SevCertificate) -> None:
    # Two signatures on the PEK mean two parties: the chip and its owner.
    if oca.public_key == cek.public_key:
        raise BadSignature("OCA and CEK are the same key")
    _check_link(pek, oca)
