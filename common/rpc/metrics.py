"""What is measured of every listener of both services: its calls, its certificate, whether it is ready.

`callers` is who may call the listener: `orchestrator`, or `owner`. `method` is a full method name of the table in
`authz`, or `unknown` for whatever else a peer asked for.
"""

from __future__ import annotations

from common.telemetry.metrics import Counter, Gauge, Histogram, Metric

CALLS = Histogram(
    name="sevattest_rpc_seconds",
    meaning="calls that ended, by gRPC status, and how long they took",
    labels=("method", "code"),
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
)
ERRORS = Counter(
    name="sevattest_rpc_errors_total",
    meaning="calls that ended with an error of ours, by its reason",
    labels=("method", "reason"),
)
UNDER_WAY = Gauge(
    name="sevattest_rpc_under_way",
    meaning="calls of authenticated callers that have not ended",
    labels=("callers",),
)
CERTIFICATE = Gauge(
    name="sevattest_certificate_not_after_seconds",
    meaning="when the certificate that is in use ends, seconds since 1970",
    labels=("callers",),
)
READY = Gauge(
    name="sevattest_ready",
    meaning="1 for a cause that is well, 0 for one that keeps the listener from being ready",
    labels=("callers", "cause"),
)

METRICS: tuple[Metric, ...] = (CALLS, ERRORS, UNDER_WAY, CERTIFICATE, READY)
