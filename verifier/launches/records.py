"""Audit records: the row that goes into a decision's own transaction, and the log line beside it, from one place.

Events, their bodies and the reasons are listed in docs/verifier.md. A body never holds a secret, a key or a chip's id;
it may hold what the caller must not learn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from enum import StrEnum
from typing import Any
from uuid import UUID

import msgspec

from common.errors import Reason, SevattestError
from common.telemetry.few_lines import FewLines
from common.telemetry.log import Log
from common.telemetry.metrics import UNMEASURED, Meter
from verifier.appraisal.evidence import Finding
from verifier.metrics import RECORDS, REFUSALS, UNSETTLED
from verifier.store.rows import AuditRow


class AuditEvent(StrEnum):
    """What is recorded. The values are stored: they are for ever."""

    BEGUN = "launch.begun"
    BEGIN_REFUSED = "launch.begin_refused"
    RELEASED = "launch.released"
    REFUSED = "launch.refused"
    REFUSED_LATE = "launch.refused_late"
    REPEAT_REFUSED = "launch.repeat_refused"
    ABANDONED = "launch.abandoned"
    EXPIRED = "launch.expired"
    REPORT_VERIFIED = "report.verified"
    REPORT_REFUSED = "report.refused"
    TURNED_AWAY = "caller.turned_away"
    DOCUMENT_APPLIED = "document.applied"
    DOCUMENT_DELETED = "document.deleted"
    DOCUMENTS_SEALED = "documents.sealed"
    SECRET_PUT = "secret.put"  # noqa: S105 -- an event's name
    SECRET_DELETED = "secret.deleted"  # noqa: S105 -- an event's name


_REFUSALS = frozenset(
    {
        AuditEvent.BEGIN_REFUSED,
        AuditEvent.REFUSED,
        AuditEvent.REFUSED_LATE,
        AuditEvent.REPEAT_REFUSED,
        AuditEvent.REPORT_REFUSED,
        AuditEvent.TURNED_AWAY,
    }
)


class Recorder:
    """Makes audit rows, and writes and counts their log lines."""

    def __init__(self, log: Log, new_id: Callable[[], UUID], meter: Meter = UNMEASURED) -> None:
        """Take the log, the source of audit ids, and who counts what is recorded."""
        self._log = log
        self._passing = FewLines(log.warning)
        self._new_id = new_id
        self._meter = meter
        meter.add(UNSETTLED, by=0)
        for event in AuditEvent:
            meter.add(RECORDS, event.value, by=0)

    def new_id(self) -> UUID:
        """A fresh audit id."""
        return self._new_id()

    def row(
        self,
        event: AuditEvent,
        *,
        time: datetime,
        caller: str | None,
        launch_id: UUID | None = None,
        reason: Reason | None = None,
        findings: Sequence[Finding] = (),
        audit_id: UUID | None = None,
        **body: Any,
    ) -> AuditRow:
        """A row to store. Its log line follows with `log`, once it is stored."""
        if findings:
            body["findings"] = [
                {"rule": each.rule, "reason": each.reason.value, "message": each.message} for each in findings
            ]
        return AuditRow(
            audit_id=audit_id or self._new_id(),
            time=time,
            event=event.value,
            launch_id=launch_id,
            caller=caller,
            reason=None if reason is None else reason.value,
            body=msgspec.json.encode(body).decode(),
        )

    def log(self, row: AuditRow) -> None:
        """Write the line that goes with a stored row, and count it."""
        refusal = row.event in _REFUSALS
        self._meter.add(RECORDS, row.event)
        if refusal:
            self._meter.add(REFUSALS, row.event, row.reason or "")
        write = self._log.warning if refusal else self._log.info
        write(
            row.event,
            audit_id=str(row.audit_id),
            launch_id=None if row.launch_id is None else str(row.launch_id),
            caller=row.caller,
            reason=row.reason,
            record=msgspec.json.decode(row.body),
        )

    def log_unsettled(self, row: AuditRow, grant: str | None, error: SevattestError) -> None:
        """Write the line of a launch that ended without its grant's ledger, which does not know of it, and count it."""
        self._meter.add(UNSETTLED)
        self._log.error(
            "grant.unsettled", audit_id=str(row.audit_id), launch_id=str(row.launch_id), grant=grant, error=error
        )

    def log_altered(self, launch_id: UUID, error: SevattestError) -> None:
        """Write the line of a launch that stays as it is: somebody wrote to its row."""
        self._log.error("launch.altered", launch_id=str(launch_id), error=error)

    def log_refusal(self, event: str, caller: str, error: SevattestError) -> None:
        """Write the line of a refusal that passes by itself, and of which no record is kept: nobody could read them."""
        self._passing.write(event, caller=caller, like={"reason": error.reason}, text=error.message)
