"""What the rules look at: facts that were verified, each beside what it is held against.

Nothing here comes from a host unchecked. A platform's facts stand behind its certificates' signatures; the firmware's
version counts only where `matched` is not None, because the measurement covers it.
"""

from __future__ import annotations

from dataclasses import dataclass

from common.errors import Reason
from common.sev.certs.chain import PlatformChain
from common.sev.measurement import FirmwareVersion
from common.sev.policy import GuestPolicy
from verifier.documents.grant import Grant
from verifier.documents.platform import KnownPlatform
from verifier.documents.workload import Ownership


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that speaks against a platform, a launch or a report.

    Attributes:
        rule: the rule's dotted id, for ever.
        reason: what a caller is told, if this finding comes first.
        message: a sentence for the owner.
    """

    rule: str
    reason: Reason
    message: str


@dataclass(frozen=True, kw_only=True)
class PlatformEvidence:
    """A genuine platform and what the owner's documents say of platforms.

    Attributes:
        generation: of the root that its chip's key leads to.
        fingerprint: of the chip's key, lower-case hex.
        oca: fingerprint of its owner's certificate, lower-case hex.
        self_made: whether the owner's certificate looks like the firmware's own work (`looks_self_made`).
        denied: why the chip is on a deny-list; None where it is not.
        revoked: why anything else of it, or the workload, is revoked; None where nothing is.
        generations: what the workload allows.
        chips: what the workload allows; None for any.
        ownership: what the workload allows.
        floor_known: whether a firmware floor is in force for this generation.
        known: the Platform document of the chip; None where there is none.
        grant: the grant that the launch spends; None for none.
        caller: who asks, as a SPIFFE id.
    """

    generation: str
    fingerprint: str
    oca: str
    self_made: bool
    denied: str | None
    revoked: str | None
    generations: frozenset[str]
    chips: frozenset[str] | None
    ownership: Ownership
    floor_known: bool
    known: KnownPlatform | None
    grant: Grant | None
    caller: str


@dataclass(frozen=True, kw_only=True)
class StandingEvidence:
    """What the owner may have taken back since a launch began.

    Attributes:
        denied: why the chip is on a deny-list by now; None where it is not.
        revoked: why anything else of the launch is revoked by now; None where nothing is.
        withdrawn: whether no version of the workload is on file any more.
        stopped: why nothing may be released under the launch's grant any more; None where it may, or it spends none.
    """

    denied: str | None
    revoked: str | None
    withdrawn: bool
    stopped: str | None


@dataclass(frozen=True, kw_only=True)
class LaunchEvidence(StandingEvidence):
    """A measurement that was tried against everything that was frozen for its launch.

    `revoked` speaks of the firmware only where `matched` is not None.

    Attributes:
        matched: index of the launch digest that was measured; None where none was.
        firmware: the version that the host names; true if `matched` is not None.
        floor: the oldest accepted firmware.
        generation: the platform's.
        pdh_oldest: the oldest firmware that the launch's PDH was proven to be used under; None where it never was.
    """

    matched: int | None
    firmware: FirmwareVersion
    floor: FirmwareVersion
    generation: str
    pdh_oldest: FirmwareVersion | None


@dataclass(frozen=True, kw_only=True)
class ReportEvidence:
    """A genuine attestation report beside the launch that it should show.

    Attributes:
        denied: why the platform's chip is on a deny-list by now, so that its signatures prove nothing; None where it
            is not.
        revoked: why anything else of the launch is revoked by now; None where nothing is.
        nonce: in the report, 16 bytes.
        asked_nonce: that it was asked for with, 16 bytes.
        digest: in the report, 32 bytes.
        launch_digest: that the launch released its secrets to, 32 bytes.
        policy: in the report.
        launch_policy: the launch's.
    """

    denied: str | None
    revoked: str | None
    nonce: bytes
    asked_nonce: bytes
    digest: bytes
    launch_digest: bytes
    policy: GuestPolicy
    launch_policy: GuestPolicy


def looks_self_made(chain: PlatformChain) -> bool:
    """Whether a platform's OCA looks like the firmware's own work.

    The firmware makes OCA and PEK together and writes its API version into both; `sevctl generate`, sev-tool and
    `sevattest generate` write 0.0 into an OCA. No signature by AMD covers an OCA, so this finds an owner's honest
    certificate and not one that pretends.
    """
    oca, pek = chain.oca, chain.pek
    return (oca.api_major, oca.api_minor) == (pek.api_major, pek.api_minor) != (0, 0)
