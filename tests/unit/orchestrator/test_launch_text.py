"""What `sevattest launch` prints of an outcome: lines, errors, and the JSON object."""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import pytest

from common.errors import OutcomeUnknown, Reason, Refused, SevattestError, Unavailable
from orchestrator.cli import launch
from orchestrator.cli.launch import as_json, error_lines, print_step, step_line
from orchestrator.drivers.base import Measured, Session
from orchestrator.flow import Launch, Order, Outcome, Step, StepResult
from tests.unit.orchestrator.fakes import EVIDENCE, FIRMWARE

REQUEST_ID = UUID("0b9c5c1e-7c43-4b0e-8a51-1c3f3c9b6c11")
LAUNCH_ID = UUID("5f0f2f04-6c3e-4a62-a3f1-52f3cf1f6a0b")
SESSION = Session(
    launch_id=LAUNCH_ID,
    workload_version="2",
    generation="milan",
    fingerprint="1345efa44c7a8597" + "0" * 48,
    policy=0x0F,
    godh=bytes(2084),
    blob=bytes(128),
    pdh_fingerprint=bytes(32),
)
RUNNING = Outcome(
    order=Order(guest="web", workload="shop", request_id=REQUEST_ID),
    steps=tuple(StepResult(step=step, seconds=0.0125, attempts=1) for step in Step),
    evidence=EVIDENCE,
    session=SESSION,
    measured=Measured(blob=b"m" * 48, firmware=FIRMWARE),
    receipt="e30.eyJzZWNyZXRzIjoxfQ.c2lnbmVk",  # {"secrets":1}, signed by nobody
)
BEGUN = Outcome(order=RUNNING.order, steps=RUNNING.steps[:2], evidence=EVIDENCE, session=SESSION)

MEMBERS = {
    "launch_id",
    "state",
    "reason",
    "message",
    "audit_id",
    "request_id",
    "platform",
    "measurement",
    "steps",
    "receipt",
    "receipt_token",
}


def failed(error: SevattestError, at: Step = Step.RELEASE) -> Outcome:
    steps = RUNNING.steps[: list(Step).index(at)]
    return replace(RUNNING, error=error, receipt=None, steps=(*steps, StepResult(step=at, seconds=1, attempts=1)))


def test_each_step_is_a_line_with_its_time_and_what_it_said() -> None:
    assert [step_line(result, RUNNING) for result in RUNNING.steps] == [
        "export      12.5 ms  8336 bytes of certificates",
        f"begin       12.5 ms  launch {LAUNCH_ID}: milan platform, chip 1345efa44c7a8597…",
        "start       12.5 ms  guest web paused, policy 0x0f",
        "measure     12.5 ms  measured by firmware 1.55.24",
        "release     12.5 ms  accepted: workload shop, version 2",
        "inject      12.5 ms  secret packet in place",
        "resume      12.5 ms  guest runs",
    ]


def test_what_a_verifier_says_moves_no_cursor() -> None:
    hostile = replace(SESSION, generation="\x1b[2Jmilan\r\n", fingerprint="\x9b1A" * 8, workload_version="\u202e2\a")
    lines = [step_line(result, replace(RUNNING, session=hostile)) for result in RUNNING.steps]
    assert all(line.isprintable() for line in lines)
    assert "milan" in lines[1]


def test_a_repeated_step_says_how_often_it_was_asked_for() -> None:
    result = StepResult(step=Step.START, seconds=2, attempts=3)
    assert step_line(result, BEGUN) == "start     2000.0 ms  guest web paused, policy 0x0f  (attempt 3)"


def test_a_failed_step_says_so_and_nothing_of_an_answer() -> None:
    error = Unavailable(Reason.UNREACHABLE, "cannot be reached")
    assert step_line(StepResult(step=Step.START, seconds=1, attempts=1, error=error), BEGUN).endswith("failed")


def test_a_refusal_shows_reason_and_audit_id() -> None:
    error = Refused(Reason.MEASUREMENT_REFUSED, "the measurement is not one that the owner expects", audit_id="0c5d")
    assert error_lines(failed(error)) == [
        "sevattest: release: the measurement is not one that the owner expects (MEASUREMENT_REFUSED, audit id 0c5d)",
        "hint: the guest owner's audit log has more under that id",
    ]


def test_an_unknown_outcome_says_how_to_go_on() -> None:
    error = OutcomeUnknown(Reason.OUTCOME_UNKNOWN, "no answer came back")
    assert error_lines(failed(error, Step.RESUME)) == [
        "sevattest: resume: no answer came back (OUTCOME_UNKNOWN)",
        f"hint: --request-id {REQUEST_ID} repeats this launch",
    ]


def test_a_hint_of_the_error_itself_is_shown() -> None:
    error = Unavailable(Reason.UNREACHABLE, "the service cannot be talked to", hint="check the CA")
    assert error_lines(failed(error, Step.EXPORT))[1] == "hint: check the CA"


def test_a_guest_that_runs_has_no_error_lines() -> None:
    assert error_lines(RUNNING) == []


def test_the_json_of_a_running_guest_is_complete() -> None:
    seen = json.loads(json.dumps(as_json(RUNNING)))
    assert set(seen) == MEMBERS
    assert seen["launch_id"] == str(LAUNCH_ID)
    assert seen["state"] == "running"
    assert seen["reason"] is None
    assert seen["platform"] == {
        "generation": "milan",
        "api": "1.55",
        "build": 24,
        "fingerprint": SESSION.fingerprint,
    }
    assert base64.b64decode(seen["measurement"]) == b"m" * 48
    assert seen["steps"] == [{"name": step, "ms": 12.5} for step in Step]
    assert seen["receipt"] == {"secrets": 1}
    assert seen["receipt_token"] == RUNNING.receipt


@pytest.mark.parametrize("receipt", ["", "no token", "{", "e30.!.", '["a list"]'])
def test_a_receipt_that_cannot_be_read_is_passed_on_as_it_is(receipt: str) -> None:
    seen = as_json(replace(RUNNING, receipt=receipt))
    assert (seen["receipt"], seen["receipt_token"]) == (None, receipt)


def test_a_receipt_of_a_verifier_that_signs_none_is_read_too() -> None:
    assert as_json(replace(RUNNING, receipt='{"secrets": 2}'))["receipt"] == {"secrets": 2}


@pytest.mark.parametrize("outcome", [Outcome(order=RUNNING.order), BEGUN, RUNNING], ids=["none", "two", "all"])
def test_the_json_has_the_same_members_however_far_the_launch_came(outcome: Outcome) -> None:
    seen = as_json(outcome)
    assert set(seen) == MEMBERS
    platform = seen["platform"]
    assert isinstance(platform, dict)
    assert set(platform) == {"generation", "api", "build", "fingerprint"}


def test_the_json_of_a_refusal_names_state_reason_and_audit_id() -> None:
    seen = as_json(failed(Refused(Reason.MEASUREMENT_REFUSED, "no", audit_id="0c5d")))
    assert (seen["state"], seen["reason"], seen["audit_id"]) == ("refused", "MEASUREMENT_REFUSED", "0c5d")
    assert (seen["receipt"], seen["receipt_token"]) == (None, None)


def test_the_page_about_launch_names_every_member_and_every_state() -> None:
    page = (Path(__file__).parents[3] / "docs" / "launch.md").read_text()
    rows = {line.split("`")[1] for line in page[page.index("## JSON") :].splitlines() if line.startswith("| `")}
    assert rows == MEMBERS
    assert all(f"`{state}`" in page for state in ("running", "refused", "expired", "abandoned", "released", "failed"))


def test_the_page_about_launch_has_the_exit_codes_that_there_are() -> None:
    page = (Path(__file__).parents[3] / "docs" / "launch.md").read_text()
    codes = re.findall(r"^\| (\d[\d, ]*) \|", page, re.MULTILINE)
    # None for a reader that has gone: tests/integration/test_launch_refusals.py sees such a launch end with 0.
    assert [int(code) for row in codes for code in row.split(", ")] == [0, 1, 2, 3, 4, 129, 130, 143]


def test_a_full_disk_under_stdout_is_said_and_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Path("/dev/full").open("w", encoding="utf-8") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        for result in RUNNING.steps:
            print_step(result, RUNNING)
    assert capsys.readouterr().err == "sevattest: standard output: No space left on device\n"


@pytest.mark.parametrize(("outcome", "code"), [(RUNNING, 0), (failed(Refused(Reason.MEASUREMENT_REFUSED, "no")), 1)])
def test_a_signal_after_the_end_of_the_launch_changes_nothing_about_it(
    outcome: Outcome, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @asynccontextmanager
    async def interrupted_while_it_closes(*_: object) -> AsyncIterator[object]:
        yield None
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        signal.raise_signal(signal.SIGTERM)
        await asyncio.Event().wait()

    async def ended(_self: Launch) -> Outcome:
        return outcome

    monkeypatch.setattr("common.rpc.client.open_channel", interrupted_while_it_closes)
    monkeypatch.setattr("orchestrator.drivers.agent.AgentHost", lambda _channel: None)
    monkeypatch.setattr("orchestrator.drivers.verifier.VerifierOwner", lambda _channel: None)
    monkeypatch.setattr(Launch, "run", ended)
    words = "web --workload shop --agent a:1 --verifier v:1 --tls-cert c --tls-key k --tls-ca t"
    parser = argparse.ArgumentParser()
    launch.add_arguments(parser)
    assert launch.run(parser.parse_args(words.split())) == code
    assert "interrupted" not in capsys.readouterr().err
