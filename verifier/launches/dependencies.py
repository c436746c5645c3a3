"""What the broker works with: one value that the composition root fills in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol
from uuid import UUID

from common.errors import Reason, Refused
from common.sev.explain import Catalogue, Expected
from verifier.appraisal.evidence import Finding
from verifier.appraisal.reference import Terms
from verifier.documents.workload import Workload
from verifier.keys.base import SealingKey
from verifier.launches.platforms import DenyList, PlatformVerifier
from verifier.launches.records import Recorder
from verifier.launches.timekeeper import Timekeeper
from verifier.library.library import Prepared
from verifier.secrets.base import SecretSource
from verifier.store.base import Store


class Workloads(Protocol):
    """What the owner has on file; `verifier.library.Library` is this."""

    def document(self, name: str) -> Workload | None:
        """The newest version of a workload."""
        ...

    async def in_force(self, name: str) -> Prepared | None:
        """The newest version of a workload with its artefacts measured."""
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
        workloads: the owner's documents.
        platforms: decides whether a platform is genuine.
        denied: the deny-list.
        sealing: seals TEK and TIK at rest.
        secrets: reads what is released.
        time: the time that launches live by.
        records: makes audit records.
        random: gives random bytes.
        new_id: gives launch ids: random UUIDs.
        open_cap: open launches that one caller may have.
        single_ca: whether one CA stands for both sites, which receipts say.
        on_step: called between steps; only crash tests pass one.
    """

    store: Store
    workloads: Workloads
    platforms: PlatformVerifier
    denied: DenyList
    sealing: SealingKey
    secrets: SecretSource
    time: Timekeeper
    records: Recorder
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
