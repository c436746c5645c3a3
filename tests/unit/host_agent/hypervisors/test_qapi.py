"""QEMU's answers: real ones are understood, everything else is refused member by member."""

from __future__ import annotations

import base64
import json
from ast import literal_eval
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import PlatformFailed, Reason
from host_agent.hypervisors import qapi
from host_agent.hypervisors.base import SevState
from tests.support.vectors import vectors

STATUS: dict[str, Any] = {"status": "prelaunch", "singlestep": False, "running": False}
# As a Rome server answered under Proxmox VE 7 (QEMU 7.2).
SEV: dict[str, Any] = {
    "enabled": True,
    "api-minor": 24,
    "handle": 1,
    "state": "launch-secret",
    "api-major": 0,
    "build-id": 15,
    "policy": 5,
}


def real_answer(version: str, command: str) -> object:
    """What a real QEMU without SEV answered, from the transcripts."""
    for line in (vectors() / "qmp" / f"qmp-transcript-qemu{version}.txt").read_text().splitlines():
        if line.startswith("A < "):
            answer = json.loads(literal_eval(line.removeprefix("A < ")))
            if answer.get("id") == command and "return" in answer:
                return answer["return"]
    raise AssertionError(f"{command} is not in the transcript of {version}")


def test_a_real_hosts_answer_is_understood() -> None:
    seen = qapi.inspection(STATUS, SEV)
    assert (str(seen.firmware), seen.policy, seen.state) == ("0.24.15", 5, SevState.LAUNCH_SECRET)
    assert seen.is_paused
    assert not seen.has_run


@pytest.mark.parametrize("version", ["7.2", "10.0"])
def test_the_answers_of_real_qemus_without_sev_are_understood(version: str) -> None:
    seen = qapi.inspection(real_answer(version, "query-status"), real_answer(version, "query-sev"))
    assert (seen.enabled, seen.state, seen.status) == (False, SevState.UNINIT, "prelaunch")
    assert not seen.is_paused


def test_the_union_of_qemu_9_1_is_understood() -> None:
    assert qapi.inspection({"status": "prelaunch", "running": False}, {**SEV, "sev-type": "sev"}).is_paused


@pytest.mark.parametrize(
    ("status", "sev", "paused", "run"),
    [
        ({}, {}, True, False),
        ({"status": "paused"}, {}, True, False),
        ({"status": "internal-error"}, {}, False, False),
        ({"status": "io-error"}, {}, False, False),
        ({"running": True, "status": "running"}, {"state": "running"}, False, True),
        ({"running": True, "status": "running"}, {}, False, True),
        ({"status": "paused"}, {"state": "running"}, False, True),
        ({}, {"state": "launch-update"}, False, False),
        ({}, {"enabled": False}, False, False),
    ],
)
def test_paused_and_has_run_are_never_both(
    status: dict[str, Any], sev: dict[str, Any], *, paused: bool, run: bool
) -> None:
    seen = qapi.inspection({**STATUS, **status}, {**SEV, **sev})
    assert (seen.is_paused, seen.has_run) == (paused, run)


WRONG: list[tuple[str, object]] = [
    ("enabled", 1),
    ("enabled", "true"),
    ("api-major", 256),
    ("api-major", -1),
    ("api-minor", True),
    ("build-id", "24"),
    ("build-id", 1.0),
    ("policy", 1 << 32),
    ("state", "launching"),
    ("state", 3),
    ("sev-type", "sev-snp"),
]


@pytest.mark.parametrize(("member", "value"), WRONG)
def test_a_member_of_another_type_or_range_is_refused_by_name(member: str, value: object) -> None:
    with pytest.raises(PlatformFailed, match=f"query-sev makes no sense: {member}") as failure:
        qapi.inspection(STATUS, {**SEV, member: value})
    assert failure.value.reason is Reason.HYPERVISOR_FAILED


@pytest.mark.parametrize("member", sorted(SEV.keys() - {"handle"}))
def test_a_missing_member_is_refused(member: str) -> None:
    with pytest.raises(PlatformFailed):
        qapi.inspection(STATUS, {key: value for key, value in SEV.items() if key != member})


@pytest.mark.parametrize("size", [0, 47, 49, 208])
def test_a_measurement_has_48_bytes(size: int) -> None:
    with pytest.raises(PlatformFailed):
        qapi.measurement({"data": base64.b64encode(bytes(size)).decode()})
    assert qapi.measurement({"data": base64.b64encode(bytes(48)).decode()}) == bytes(48)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from([*SEV, *STATUS, "data", "sev-type"]), inner),
    max_leaves=8,
)


@given(JSON, JSON)
def test_any_answers_are_understood_or_a_typed_error(status: object, sev: object) -> None:
    for read in (lambda: qapi.inspection(status, sev), lambda: qapi.measurement(sev), lambda: qapi.report(sev)):
        with suppress(PlatformFailed):
            read()
