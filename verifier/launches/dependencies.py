"""What the broker works with: one value that the composition root fills in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol
from uuid import UUID

from common.errors import Reason, Refused, Unavailable
from common.sev.explain import Catalogue, Expected
from verifier.appraisal.evidence import Finding
from verifier.appraisal.reference import Terms
from verifier.keys.base import SealingKey
from verifier.keys.signer import Pseudonyms, Signer
from verifier.launches.allowances import Allowances
from verifier.launches.platforms import DenyList, PlatformVerifier
from verifier.launches.records import Recorder
from verifier.launches.timekeeper import Timekeeper
from verifier.library.documents import Documents
from verifier.library.prepared import Prepared
from verifier.library.sealed import DocumentSeal
from verifier.secrets.base import SecretSource
from verifier.store.base import Store


class Library(Protocol):
    """What the owner has on file; `verifier.library.library.Library` is this."""

    async def current(self, revision: int | None = None) -> Documents:
        """All documents as they stand now.

        Args:
            revision: the store's, where it was just read.

        Raises:
            InvalidInput: a document of the store that must not be overlooked cannot be read (INVALID_CONFIGURATION).
            Unavailable: the store has no answer.
        """
        ...

    def likely_grant(self, workload: str, caller: str, named: str | None) -> str | None:
        """The grant that a launch will spend, by the documents of the last look: a guess, for what is read along."""
        ...

    async def in_force(self, documents: Documents, name: str) -> Prepared | None:
        """The version of a workload that these documents have in force, its artefacts measured as they are now.

        Raises:
            InvalidInput: it cannot be used now (INVALID_CONFIGURATION); the owner's log says why.
        """
        ...

    def expected(self, terms: Terms) -> tuple[Expected, ...]:
        """The shapes behind frozen digests, where they are known."""
        ...

    def catalogue(self) -> Catalogue:
        """All artefacts of all versions."""
        ...


def no_step(_step: str) -> None:
    """Production's hook: nothing."""


@dataclass(frozen=True, kw_only=True)
class Dependencies:
    """The broker's means.

    Attributes:
        store: launches, requests, audit records.
        library: the owner's documents.
        platforms: decides whether a platform is genuine.
        denied: the deny-list.
        sealing: seals TEK and TIK at rest.
        signer: signs receipts.
        pseudonyms: hide chips in records, logs and receipts.
        seal: on the documents that owners apply.
        issuer: who signs, as receipts name it.
        secrets: reads what is released.
        time: the time that launches live by.
        records: makes audit records.
        allowances: bound what a caller can have recorded.
        random: gives random bytes.
        new_id: gives launch ids, never one twice.
        open_cap: open launches that one caller may have.
        single_ca: whether one CA stands for both sites, which receipts say.
        on_step: called between steps; only crash tests pass one.
    """

    store: Store
    library: Library
    platforms: PlatformVerifier
    denied: DenyList
    sealing: SealingKey
    signer: Signer
    pseudonyms: Pseudonyms
    seal: DocumentSeal
    issuer: str
    secrets: SecretSource
    time: Timekeeper
    records: Recorder
    allowances: Allowances
    random: Callable[[int], bytes]
    new_id: Callable[[], UUID]
    open_cap: int
    single_ca: bool = False
    on_step: Callable[[str], None] = no_step


# What a caller reads beside a reason. The same words whatever the finding was: details are the owner's.
_SENTENCES: dict[Reason, str] = {
    Reason.CALLER_NOT_ALLOWED: "the workload does not name this caller",
    Reason.GENERATION_NOT_ALLOWED: "the workload does not allow this generation of processor",
    Reason.CHIP_NOT_ALLOWED: "the workload does not allow this chip",
    Reason.CHIP_REVOKED: "the chip is on the deny-list",
    Reason.FIRMWARE_TOO_OLD: "the platform's firmware is older than the owner accepts",
    Reason.MEASUREMENT_REFUSED: "the measurement is not one that the owner expects",
    Reason.GRANT_REQUIRED: "no grant covers this workload and caller",
    Reason.GRANT_SUSPENDED: "the grant is suspended",
    Reason.GRANT_EXPIRED: "the grant's time is over",
    Reason.GRANT_NOT_YET_VALID: "the grant's time has not come",
    Reason.GRANT_EXHAUSTED: "the grant's launches are used up",
    Reason.HOST_NOT_IN_POOL: "the grant is not for this platform",
    Reason.HOST_NOT_FOR_CALLER: "the platform is not for this caller",
    Reason.PLATFORM_OWNER_NOT_ALLOWED: "the workload does not allow this platform's owner",
    Reason.REVOKED: "the platform, its firmware or the workload was revoked",
    Reason.PDH_PREDATES_FIRMWARE: "the platform's PDH was used under older firmware: make new platform keys",
    Reason.REPORT_REFUSED: "the attestation report is not one that the owner accepts",
    Reason.BAD_SIGNATURE: "a signature does not verify",
    Reason.UNTRUSTED_ROOT: "the chain does not lead to a trusted root",
    Reason.CEK_UNSIGNED: "the CEK carries no signature, and none could be attached",
    Reason.CEK_MISMATCH: "the key service's CEK is not this platform's",
}


def refusal(reason: Reason, audit_id: UUID) -> Refused:
    """The error that a caller gets for a refusal: a reason, its one sentence, and the audit record's id."""
    return Refused(reason, _SENTENCES[reason], audit_id=str(audit_id))


def refusal_for(findings: Sequence[Finding], audit_id: UUID) -> Refused:
    """The error for findings, of which the first is told."""
    return refusal(findings[0].reason, audit_id)


def changing() -> Unavailable:
    """The error for a decision that never caught up with the owner's documents."""
    return Unavailable(Reason.STORE_UNAVAILABLE, "the owner's documents change faster than a launch is judged: repeat")


def lost() -> Unavailable:
    """The error for a repeat whose release is read and cannot be confirmed: what was read is another server's."""
    return Unavailable(
        Reason.STORE_UNAVAILABLE,
        "the release is not in the store that answers now: another server took over from the one that had it; repeat",
    )
