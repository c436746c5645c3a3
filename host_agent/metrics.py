"""The agent's metrics: every name on its page, with what it means. docs/metrics.md says the same.

States and moves are those of `host_agent.launches.state`, a firmware status is one of `common.sev.abi.Status`. No
metric names a guest, a caller or a launch.
"""

from __future__ import annotations

from common.rpc import metrics as rpc
from common.telemetry.metrics import Counter, Gauge, Metric

LAUNCHES = Gauge(
    name="sevattest_guest_launches",
    meaning="launches that the agent knows of, by state; those that have ended are kept for a while",
    labels=("state",),
)
MOVES = Counter(
    name="sevattest_guest_launch_moves_total",
    meaning="launches that went from one state to the next; an injection is one from INJECTING to INJECTED",
    labels=("from", "to"),
)
FAILURES = Counter(
    name="sevattest_guest_launch_failures_total",
    meaning="launches that ended early and not by their caller's wish, by reason and firmware status",
    labels=("reason", "status"),
)
MACHINES = Gauge(
    name="sevattest_guest_machines",
    meaning="machines that the agent holds, paused or running",
)
DEVICE_ERRORS = Counter(
    name="sevattest_device_errors_total",
    meaning="commands to the SEV device that failed, by reason and firmware status",
    labels=("reason", "status"),
)

METRICS: tuple[Metric, ...] = (*rpc.METRICS, LAUNCHES, MOVES, FAILURES, MACHINES, DEVICE_ERRORS)
