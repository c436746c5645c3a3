"""Attestation reports of guests that have their secrets: genuine by the platform's PEK, acceptable by the launch.

1. the caller has not used its allowance up: each report makes a record, whatever it says;
2. the launch is the caller's and has released its secrets;
3. the report is genuine: the PEK of the chain that was verified at begin signed it;
4. the report is acceptable: what vouches for it was not revoked since, and nonce, launch digest and policy are those
   that are due. A grant or a workload that was withdrawn makes no report untrue, and is not asked for.
"""

from __future__ import annotations

from uuid import UUID

from common.errors import Reason, Refused, WrongState
from common.sev.certs.chain import PlatformChain
from common.sev.measurement import FirmwareVersion
from common.sev.report import AttestationReport
from verifier.appraisal.appraise import appraise_report
from verifier.appraisal.evidence import Finding, ReportEvidence
from verifier.appraisal.reference import decode_terms
from verifier.launches.dependencies import Dependencies, refusal_for
from verifier.launches.gather import standing_evidence
from verifier.launches.records import AuditEvent
from verifier.launches.state import State, ended
from verifier.launches.steps import owned_launch, record, require_allowance


class ReportVerifier:
    """Judges attestation reports against launches that were released."""

    def __init__(self, dependencies: Dependencies) -> None:
        """Take the means."""
        self._d = dependencies

    async def verify(self, *, caller: str, launch_id: UUID, nonce: bytes, report: bytes) -> AttestationReport:
        """The report, if it is genuine and shows the launch's own guest.

        Args:
            caller: SPIFFE id.
            launch_id: the launch.
            nonce: that the report was asked for with, 16 bytes.
            report: 208 bytes.

        Raises:
            NotFound: there is no such launch, or it is somebody else's.
            WrongState: the launch has not released its secrets.
            ParseError: the bytes are no report.
            Refused: BAD_SIGNATURE or REPORT_REFUSED; CHIP_REVOKED or REVOKED.
            InvalidInput: a document of the owner's that may forbid it cannot be read (INVALID_CONFIGURATION).
            LimitExceeded: too many reports or refusals of this caller (TOO_MANY_REFUSALS).
            Unavailable: the store has no answer, or the owner's documents are not as they were sealed.
        """
        now = await self._d.time.now()
        await require_allowance(self._d, caller, now)  # step 1
        row = await owned_launch(self._d, launch_id, caller, now)  # step 2
        if row.state == State.OPEN:
            raise WrongState(Reason.WRONG_STATE, "the launch has not released its secrets yet")
        if row.state != State.RELEASED or row.digest is None:
            raise ended(State(row.state))
        parsed = AttestationReport.parse(report)
        findings: list[Finding] = []
        try:
            parsed.verify(PlatformChain.parse(await self._d.store.chain(row.platform_id)).pek)  # step 3
        except Refused as error:
            findings.append(Finding(rule="report.genuine", reason=error.reason, message=error.message))
        else:
            standing = standing_evidence(  # step 4
                documents=await self._d.library.current(),
                denied=self._d.denied,
                row=row,
                firmware=None if row.firmware is None else FirmwareVersion(*row.firmware),
            )
            evidence = ReportEvidence(
                denied=standing.denied,
                revoked=standing.revoked,
                nonce=parsed.nonce,
                asked_nonce=nonce,
                digest=parsed.digest,
                launch_digest=row.digest,
                policy=parsed.policy,
                launch_policy=decode_terms(await self._d.store.terms(row.terms_id)).guest_policy,
            )
            findings.extend(appraise_report(evidence))
        audit = self._d.records.row(
            AuditEvent.REPORT_REFUSED if findings else AuditEvent.REPORT_VERIFIED,
            time=now,
            caller=caller,
            launch_id=launch_id,
            reason=findings[0].reason if findings else None,
            findings=findings,
        )
        await record(self._d, audit, caller)
        if findings:
            raise refusal_for(findings, audit.audit_id)
        return parsed
