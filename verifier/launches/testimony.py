"""What is said of a decision: parts of the bodies of audit records, and the receipt of a release. Nothing is judged."""

from __future__ import annotations

from datetime import datetime
from importlib.metadata import version
from typing import Any
from uuid import UUID

from common.audit.jws import RECEIPT_TYPE
from common.sev.certs.roots import EMULATED
from common.sev.measurement import FirmwareVersion
from verifier.appraisal.reference import Reference, Terms
from verifier.launches.dependencies import Dependencies
from verifier.secrets.receipt import receipt_claims
from verifier.secrets.release import LISTED, NOT_MEASURED
from verifier.store.rows import LaunchRow

BUILD = f"sev-verifier {version('sevattest')}"


def signed_receipt(
    dependencies: Dependencies,
    row: LaunchRow,
    terms: Terms,
    reference: Reference,
    *,
    audit_id: UUID,
    time: datetime,
    firmware: FirmwareVersion,
) -> str:
    """The receipt of a release.

    Args:
        dependencies: whose signer, issuer and pseudonyms.
        row: the launch.
        terms: what was frozen for it.
        reference: what was measured.
        audit_id: of the release's record.
        time: of the decision.
        firmware: the version that the measurement proved.
    """
    claims = receipt_claims(
        issuer=dependencies.issuer,
        build=BUILD,
        launch_id=row.launch_id,
        audit_id=audit_id,
        time=time,
        caller=row.caller,
        grant=row.grant,
        workload=workload_words(terms),
        policy=terms.guest_policy,
        shape=shape_words(terms, reference),
        digest=reference.digest,
        firmware=firmware,
        generation=row.generation,
        emulated=row.generation == EMULATED,
        chip=dependencies.pseudonyms.of(row.fingerprint),
        recognized=terms.recognized,
        guids=[secret.guid for secret in terms.secrets],
        notes=notes(dependencies, terms),
    )
    return dependencies.signer.sign(claims, typ=RECEIPT_TYPE)


def notes(dependencies: Dependencies, terms: Terms) -> tuple[str, ...]:
    """What the owner accepts with a launch."""
    single = ("one CA stands for both sites: the datacenter could make an owner's identity",)
    return (*terms.notes, *(single if dependencies.single_ca else ()))


def platform_words(dependencies: Dependencies, row: LaunchRow) -> dict[str, Any]:
    """A launch's platform, its chip behind a pseudonym."""
    return {
        "generation": row.generation,
        "emulated": row.generation == EMULATED,
        "chip": dependencies.pseudonyms.of(row.fingerprint),
    }


def workload_words(terms: Terms) -> dict[str, str]:
    """Which workload it was."""
    return {"name": terms.workload, "version": terms.version, "document_sha256": terms.document}


def shape_words(terms: Terms, reference: Reference) -> dict[str, Any]:
    """Which of the allowed launches was measured, as far as a measurement tells."""
    if reference.label is not None:
        return {"label": reference.label, "note": LISTED}
    if terms.plain_sev:
        return {"note": NOT_MEASURED}
    return {"vcpus": reference.vcpus, "cpu": reference.cpu, "flavour": reference.flavour}
