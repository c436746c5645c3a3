"""The sample configuration, and what the page on the verifier says of settings, rules and events."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import msgspec

from common.rpc import MAX_STREAMS
from common.rpc.server import Limits
from common.telemetry.endpoint import MetricsConfig
from verifier.appraisal import authority
from verifier.appraisal.rules import LAUNCH_RULES, PLATFORM_RULES, REPORT_RULES
from verifier.config import (
    AdminConfig,
    AuditConfig,
    Config,
    HealthConfig,
    KdsConfig,
    LimitsConfig,
    Pkcs11Config,
    PlatformsConfig,
    StoreConfig,
    TlsConfig,
    VaultConfig,
    load_config,
)
from verifier.launches.records import AuditEvent
from verifier.library.documents import snapshot
from verifier.library.folder import read_folder
from verifier.library.warnings import warnings_for

STRUCTS = (
    *(TlsConfig, HealthConfig, PlatformsConfig, KdsConfig, LimitsConfig),
    *(AdminConfig, StoreConfig, Pkcs11Config, VaultConfig, AuditConfig, MetricsConfig),
)


SAMPLES = Path(__file__).parents[3] / "deploy" / "verifier"


def test_the_sample_configuration_and_workload_are_good() -> None:
    config = load_config(SAMPLES / "verifier.toml", {})
    assert config.tls.trust_domain == "datacenter.example"
    documents = snapshot(0, read_folder(SAMPLES / "documents"))
    assert {entry.kind for entry in documents.entries} == {"Workload", "Grant", "Platform"}
    for entry in documents.entries:
        assert entry.document is not None
        assert warnings_for(entry.document, documents) == ()


def test_what_the_sample_leaves_out_is_good_too(tmp_path: Path) -> None:
    sample = (SAMPLES / "verifier.toml").read_text()
    whole = re.sub(r"^# (\[\w+\]|\w+ = .*)$", r"\1", sample, flags=re.MULTILINE).replace("state_dir", "# state_dir", 1)
    (tmp_path / "verifier.toml").write_text(whole)
    config = load_config(tmp_path / "verifier.toml", {})
    dsn = config.store.postgres if config.store else None
    assert None not in {config.admin, dsn, config.pkcs11, config.vault, config.metrics}


def test_the_page_describes_every_setting() -> None:
    page = (SAMPLES.parents[1] / "docs" / "verifier.md").read_text()

    def keys(struct: type[msgspec.Struct], prefix: str = "") -> Iterator[str]:
        for field in msgspec.structs.fields(struct):
            inner = next((each for each in STRUCTS if each.__name__ in str(field.type)), None)
            yield from keys(inner, f"{field.name}.") if inner else (prefix + field.name,)

    assert [key for key in keys(Config) if f"`{key}`" not in page] == []


def test_the_pages_say_how_many_calls_a_caller_may_have() -> None:
    docs, calls = SAMPLES.parents[1] / "docs", LimitsConfig().calls
    assert calls == Limits().in_flight == MAX_STREAMS  # the agent takes the default of all listeners
    assert f"| `limits.calls` | {calls} |" in (docs / "verifier.md").read_text()
    page = (docs / "identities.md").read_text()
    assert f"fewer than {calls} calls under way, or than the verifier's `limits.calls` says" in page
    assert f"| calls of one identity at once | {calls}; the verifier's `limits.calls` |" in page


def test_the_page_describes_every_rule_and_event() -> None:
    page = (SAMPLES.parents[1] / "docs" / "verifier.md").read_text()
    rules = {*PLATFORM_RULES, *LAUNCH_RULES, *REPORT_RULES, *authority.RULES.values()}
    assert [name for name in (*rules, *AuditEvent) if f"`{name}`" not in page] == []
