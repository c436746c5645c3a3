"""Gathers what the rules look at, from a verified platform or a stored launch and the owner's documents as they stand.

The same evidence for a launch that begins, for one that is released, for a repeat, and for one that is only supposed.
What of the documents cannot be read and must not be overlooked raises `InvalidInput` (INVALID_CONFIGURATION).
"""

from __future__ import annotations

from common.sev.certs.verify import VerifiedPlatform
from common.sev.measurement import FirmwareVersion
from verifier.appraisal.authority import stopped
from verifier.appraisal.evidence import LaunchEvidence, PlatformEvidence, StandingEvidence, looks_self_made
from verifier.appraisal.reference import Terms
from verifier.documents.grant import Grant
from verifier.documents.workload import Workload
from verifier.launches.platforms import DenyList
from verifier.library.documents import Documents
from verifier.store.rows import LaunchRow


def platform_evidence(
    *,
    documents: Documents,
    denied: DenyList,
    workload: Workload,
    grant: Grant | None,
    platform: VerifiedPlatform,
    chip_id: bytes,
    caller: str,
) -> PlatformEvidence:
    """What speaks for or against a launch on a platform that is genuine."""
    fingerprint, oca = platform.chip_fingerprint.hex(), platform.chain.oca.fingerprint.hex()
    return PlatformEvidence(
        generation=platform.generation,
        fingerprint=fingerprint,
        oca=oca,
        self_made=looks_self_made(platform.chain),
        denied=_denied(documents, denied, fingerprint, chip_id.hex() or None),
        revoked=documents.revoked.against_rest(
            generation=platform.generation, oca=oca, workload=workload.name, workload_version=workload.version
        ),
        generations=workload.generations,
        chips=workload.chips,
        ownership=workload.ownership,
        floor_known=platform.generation in workload.floors,
        known=documents.platform_of(fingerprint),
        grant=grant,
        caller=caller,
    )


def standing_evidence(
    *, documents: Documents, denied: DenyList, row: LaunchRow, firmware: FirmwareVersion | None
) -> StandingEvidence:
    """What the owner may have taken back since a launch began.

    Args:
        documents: as they stand now.
        denied: the deny-list.
        row: the launch.
        firmware: where the measurement proved it.
    """
    return StandingEvidence(
        denied=_denied(documents, denied, row.fingerprint, row.chip_id),
        revoked=documents.revoked.against_rest(
            generation=row.generation,
            oca=row.oca,
            workload=row.workload,
            workload_version=row.workload_version,
            firmware=firmware,
        ),
        withdrawn=documents.withdrawn(row.workload),
        stopped=stopped(row.grant, None if row.grant is None else documents.grant(row.grant)),
    )


def launch_evidence(
    *,
    documents: Documents,
    denied: DenyList,
    row: LaunchRow,
    terms: Terms,
    matched: int | None,
    firmware: FirmwareVersion,
    pdh_oldest: tuple[int, int, int] | None,
) -> LaunchEvidence:
    """What speaks for or against releasing a launch's secrets.

    Args:
        documents: as they stand now.
        denied: the deny-list.
        row: the launch.
        terms: what was frozen for it.
        matched: index of the launch digest that was measured; None where none was.
        firmware: the version that the host names; true if `matched` is not None.
        pdh_oldest: the oldest firmware that the launch's PDH was used under before.
    """
    standing = standing_evidence(
        documents=documents, denied=denied, row=row, firmware=None if matched is None else firmware
    )
    return LaunchEvidence(
        denied=standing.denied,
        revoked=standing.revoked,
        withdrawn=standing.withdrawn,
        stopped=standing.stopped,
        matched=matched,
        firmware=firmware,
        floor=terms.firmware_floor,
        generation=terms.generation,
        pdh_oldest=None if pdh_oldest is None else FirmwareVersion(*pdh_oldest),
    )


def _denied(documents: Documents, denied: DenyList, fingerprint: str, chip_id: str | None) -> str | None:
    known = denied.why(fingerprint, b"" if chip_id is None else bytes.fromhex(chip_id))
    return known or documents.revoked.against_chip(fingerprint, chip_id)
