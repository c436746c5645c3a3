"""What the guest owner's verifier tells its owner, as values. Names and members are those of `--json`."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True, kw_only=True)
class Document:
    """One version of one document.

    Attributes:
        kind: `workload`, `grant`, `platform` or `revocation`.
        name: its name.
        version: as its metadata says.
        json: the whole document as JSON, defaults written out; empty where the verifier cannot read it.
        sha256: of its text, lower-case hex.
        file: that it is from, at the verifier; empty for one that was applied.
        apply_time: when it was applied; None for one from a file, and for one that is not on file.
        warnings: what deserves a second look.
        newer_version: that takes its place, so that it is kept and not in force; empty where none does.
    """

    kind: str
    name: str
    version: str
    json: str
    sha256: str
    file: str
    apply_time: datetime | None
    warnings: tuple[str, ...]
    newer_version: str

    @property
    def on_file(self) -> bool:
        """Whether the verifier has it; False for one that was only checked."""
        return self.apply_time is not None or bool(self.file)


@dataclass(frozen=True, kw_only=True)
class Applied:
    """What became of a text, or would become.

    Attributes:
        document: the document.
        changed: whether anything was changed, or would be.
    """

    document: Document
    changed: bool

    @property
    def conflict(self) -> str | None:
        """Why a text that was only checked could not be applied; None where it could."""
        if self.changed or self.document.on_file:
            return None
        return next(iter(self.document.warnings), "it is in conflict with what is on file")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that an appraisal found.

    Attributes:
        rule: the rule's dotted id.
        message: a sentence.
    """

    rule: str
    message: str


@dataclass(frozen=True, kw_only=True)
class OwnedLaunch:
    """A launch, as its owner may see it.

    Attributes:
        launch_id: its id.
        workload: the workload's name.
        workload_version: its version at begin.
        state: `open`, `released`, `refused`, `abandoned` or `expired`.
        reason: why it was refused or given up; None for none.
        caller: a SPIFFE id.
        grant: that it spends; None for none.
        generation: the platform's.
        fingerprint: of the chip's key, lower-case hex.
        chip: the pseudonym by which the audit log, the verifier's log and receipts know it; None of an older verifier.
        firmware: proven for a released launch, the host's word for a refused one; None before.
        create_time: when it began.
        expire_time: until when a measurement may come.
        end_time: when it ended; None before.
        audit_id: of the record of how it ended; None before.
        findings: why it ended, in full.
        explanation: why the measurement did not match; None where no search was made.
    """

    launch_id: str
    workload: str
    workload_version: str
    state: str
    reason: str | None
    caller: str
    grant: str | None
    generation: str
    fingerprint: str
    chip: str | None
    firmware: str | None
    create_time: datetime
    expire_time: datetime
    end_time: datetime | None
    audit_id: str | None
    findings: tuple[Finding, ...]
    explanation: str | None


@dataclass(frozen=True, kw_only=True)
class LaunchQuery:
    """Which launches are wanted; empty allows any.

    Attributes:
        workload: of this workload.
        state: in this state, for example `open`.
        caller: of this caller, a SPIFFE id.
        grant: that spend this grant.
    """

    workload: str = ""
    state: str = ""
    caller: str = ""
    grant: str = ""


@dataclass(frozen=True, kw_only=True)
class GrantStatus:
    """How far a grant is spent.

    Attributes:
        document: the version in force; None where it was withdrawn.
        open: launches between begin and their end.
        released: launches that were released.
        refused: launches that were refused.
        reason: why it cannot be spent now; None where it can.
    """

    document: Document | None
    open: int
    released: int
    refused: int
    reason: str | None


@dataclass(frozen=True, kw_only=True)
class Secret:
    """A stored secret, without its value.

    Attributes:
        name: its name.
        version: the newest.
        size: bytes of the newest.
        create_time: when the newest was stored.
    """

    name: str
    version: int
    size: int
    create_time: datetime


@dataclass(frozen=True, kw_only=True)
class AuditRecord:
    """An audit record in its place in the log.

    Attributes:
        number: from 1, without gaps.
        hash: lower-case hex, 64 digits.
        audit_id: its id.
        time: when it was written.
        event: what happened.
        reason: where the event is a refusal; None for none.
        json: the members that are hashed, as JSON text (docs/audit-log.md).
    """

    number: int
    hash: str
    audit_id: str
    time: datetime
    event: str
    reason: str | None
    json: str


@dataclass(frozen=True, kw_only=True)
class SupposedLaunch:
    """A launch that nobody began.

    Attributes:
        workload: the workload's name.
        caller: a SPIFFE id.
        grant: the grant; empty to have one chosen as at begin.
        chain: the platform's, 8336 bytes.
        digest: that would be measured, 32 bytes; empty for the first that the workload allows.
    """

    workload: str
    caller: str
    grant: str
    chain: bytes
    digest: bytes


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What became of a simulation.

    Attributes:
        accepted: whether the secrets would be released.
        findings: all that was found against it.
        workload_version: the version that it was judged by; None where there is none.
        grant: that it would spend; None for none.
    """

    accepted: bool
    findings: tuple[Finding, ...]
    workload_version: str | None
    grant: str | None
