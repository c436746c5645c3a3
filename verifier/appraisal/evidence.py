"""What the rules look at: facts that were verified, each beside what it is held against.

Nothing here comes from a host unchecked. A platform's facts stand behind its certificates' signatures; the firmware's
version counts only where `matched` is not None, because the measurement covers it.
"""

from __future__ import annotations

from dataclasses import dataclass

from common.errors import Reason
from common.sev.measurement import FirmwareVersion
from common.sev.policy import GuestPolicy


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
    """A genuine platform and what a workload says of platforms.

    Attributes:
        generation: of the root that its chip's key leads to.
        fingerprint: of the chip's key, lower-case hex.
        denied: why the chip is on the deny-list; None where it is not.
        generations: what the workload allows.
        chips: what the workload allows; None for any.
        floor_known: whether a firmware floor is in force for this generation.
    """

    generation: str
    fingerprint: str
    denied: str | None
    generations: frozenset[str]
    chips: frozenset[str] | None
    floor_known: bool


@dataclass(frozen=True, kw_only=True)
class StandingEvidence:
    """What the owner may have taken back since a launch began.

    Attributes:
        denied: why the chip is on the deny-list by now; None where it is not.
        withdrawn: whether no version of the workload is on file any more.
    """

    denied: str | None
    withdrawn: bool


@dataclass(frozen=True, kw_only=True)
class LaunchEvidence(StandingEvidence):
    """A measurement that was tried against everything that was frozen for its launch.

    Attributes:
        matched: index of the launch digest that was measured; None where none was.
        firmware: the version that the host names; true if `matched` is not None.
        floor: the oldest accepted firmware.
        generation: the platform's.
    """

    matched: int | None
    firmware: FirmwareVersion
    floor: FirmwareVersion
    generation: str


@dataclass(frozen=True, kw_only=True)
class ReportEvidence:
    """A genuine attestation report beside the launch that it should show.

    Attributes:
        nonce: in the report, 16 bytes.
        asked_nonce: that it was asked for with, 16 bytes.
        digest: in the report, 32 bytes.
        launch_digest: that the launch released its secrets to, 32 bytes.
        policy: in the report.
        launch_policy: the launch's.
    """

    nonce: bytes
    asked_nonce: bytes
    digest: bytes
    launch_digest: bytes
    policy: GuestPolicy
    launch_policy: GuestPolicy
