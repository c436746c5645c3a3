"""The verifier's metrics: every name on its page, with what it means. docs/metrics.md says the same.

What is counted per record is what `audit` lists: the events are those of `verifier.launches.records`. No metric names a
workload, a grant, a caller, a launch or a chip: that is what the records are for.
"""

from __future__ import annotations

from common.rpc import metrics as rpc
from common.telemetry.metrics import Counter, Gauge, Metric

RECORDS = Counter(
    name="sevattest_audit_records_total",
    meaning="audit records that this process wrote: launches begun, released, abandoned, expired, and the rest",
    labels=("event",),
)
REFUSALS = Counter(
    name="sevattest_audit_refusals_total",
    meaning="those among them that say no, by the reason that the caller was told",
    labels=("event", "reason"),
)
UNSETTLED = Counter(
    name="sevattest_grants_unsettled_total",
    meaning="launches that ran out and that the ledger of their grant knew nothing of: somebody wrote to the database",
)
AUDIT_NUMBER = Gauge(
    name="sevattest_audit_number",
    meaning="number of the last audit record, at the last sweep",
)
SIGNED_NUMBER = Gauge(
    name="sevattest_audit_signed_number",
    meaning="number of the record that this process signed last",
)
SIGNED_TIME = Gauge(
    name="sevattest_audit_signed_timestamp_seconds",
    meaning="when that was, seconds since 1970",
)
OPEN_LAUNCHES = Gauge(
    name="sevattest_open_launches",
    meaning="launches in the store that are open, those of all callers and replicas, at the last look",
)
OLDER_KEYS = Gauge(
    name="sevattest_older_keys_in_use",
    meaning="older keys under which something is still sealed, at the last look; 0 when re-wrapping is done",
)
REVISION = Gauge(
    name="sevattest_documents_revision",
    meaning="revision of the documents that launches are judged by",
)
UNUSABLE = Gauge(
    name="sevattest_documents_unusable",
    meaning="documents that cannot be used, workloads without their artefacts among them",
    labels=("kind",),
)
CLOCK_BEHIND = Gauge(
    name="sevattest_clock_behind_seconds",
    meaning="by how much the clock is behind the latest stored time; above 600 nothing is decided",
)

METRICS: tuple[Metric, ...] = (
    *rpc.METRICS,
    *(RECORDS, REFUSALS, UNSETTLED, AUDIT_NUMBER, SIGNED_NUMBER, SIGNED_TIME),
    *(OPEN_LAUNCHES, OLDER_KEYS, REVISION, UNUSABLE, CLOCK_BEHIND),
)
