"""docs/metrics.md, the alerts and the code name the same metrics, with the same words."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.errors import Reason
from common.rpc import metrics as rpc
from common.rpc.authz import METHODS
from common.telemetry.metrics import Counter, Histogram, Metric
from host_agent import metrics as agent
from verifier import metrics as verifier
from verifier.config import AuditConfig
from verifier.launches.records import AuditEvent

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
ALERTS = ROOT / "deploy" / "observability" / "alerts.yaml"
HEADS = {"Both services": rpc.METRICS, "The verifier": verifier.METRICS, "The agent": agent.METRICS}
ALL = {metric.name: metric for metrics in HEADS.values() for metric in metrics}
# A caller, a launch, … would be one of these; whoever adds a label adds it here, and has been asked.
LABELS = {"method", "code", "reason", "callers", "cause", "event", "kind", "state", "from", "to", "status"}


def row(metric: Metric) -> str:
    labels = ", ".join(f"`{label}`" for label in metric.labels) or "none"
    return f"| `{metric.name}` | {metric.kind} | {labels} | {metric.meaning} |"


def section(head: str) -> str:
    return PAGE.split(f"\n## {head}\n")[1].split("\n## ")[0]


@pytest.mark.parametrize("head", HEADS)
def test_the_page_has_every_metric_of_the_code_and_no_other(head: str) -> None:
    own = [metric for metric in HEADS[head] if head == "Both services" or metric not in rpc.METRICS]
    assert [line for line in section(head).splitlines() if line.startswith("| `")] == [row(metric) for metric in own]


def test_every_name_on_the_page_is_a_metric() -> None:
    named = set(re.findall(r"\bsevattest_\w+", PAGE))
    assert named == set(ALL)


def test_both_services_have_the_metrics_of_their_listeners() -> None:
    assert verifier.METRICS[: len(rpc.METRICS)] == agent.METRICS[: len(rpc.METRICS)] == rpc.METRICS


@pytest.mark.parametrize("metric", ALL.values(), ids=ALL)
def test_a_metric_is_well_formed(metric: Metric) -> None:
    assert re.fullmatch(r"sevattest_[a-z_]+", metric.name)
    assert metric.name.endswith("_total") == isinstance(metric, Counter)
    assert set(metric.labels) <= LABELS
    assert metric.meaning[0].islower() or metric.meaning[0].isdigit()
    assert not metric.meaning.endswith(".")
    if isinstance(metric, Histogram):
        assert metric.buckets == tuple(sorted(metric.buckets))


def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"]
    found: list[dict[str, Any]] = group["rules"]
    return found


def test_the_alerts_ask_for_metrics_and_labels_that_there_are() -> None:
    known = {*AuditEvent, *Reason, *METHODS, "FAILED"}
    for rule in rules():
        for name, selector in re.findall(r"(\bsevattest_\w+)(?:\{([^}]*)\})?", f"{rule['expr']} {rule['annotations']}"):
            assert name in ALL, rule["alert"]
            for label, values in re.findall(r'(\w+)=~?"([^"]*)"', selector):
                assert label in ALL[name].labels, rule["alert"]
                assert set(values.split("|")) <= known, rule["alert"]


def test_a_log_that_is_not_signed_is_an_alert_with_and_without_a_first_signature() -> None:
    by_name = {rule["alert"]: rule for rule in rules()}
    number, signed, time = verifier.AUDIT_NUMBER.name, verifier.SIGNED_NUMBER.name, verifier.SIGNED_TIME.name
    # Where there is no series, a comparison with it holds for nothing.
    behind = f"{number} > {signed} and time() - {time} > 600"
    assert " ".join(by_name["SevattestAuditUnsigned"]["expr"].split()) == behind
    never = by_name["SevattestAuditNeverSigned"]
    assert never["expr"] == f"{number} > 0 unless {signed}"
    assert never["for"] == "10m"
    assert 2 * AuditConfig().checkpoint_interval <= 600


def test_the_page_has_every_alert_and_no_other() -> None:
    named = re.findall(r"^\| `(\w+)` \|", section("Alerts"), re.MULTILINE)
    assert named == [rule["alert"] for rule in rules()]
