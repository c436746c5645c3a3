"""Transcripts of `sevattest owner` with launches: listed, watched, simulated, and hit by a revocation."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
from pathlib import Path
from uuid import uuid4

import pytest

from orchestrator.demo.processes import script
from tests.cli.transcripts import Said
from tests.support.documents import CALLER, revocation
from tests.support.owner_cli import begin, name, owner, served, write
from tests.support.owner_process import OwnersVerifier

__all__ = ["name", "served"]  # fixtures
pytestmark = pytest.mark.slow


# Launches.


def test_launches_are_listed_and_shown(served: OwnersVerifier) -> None:
    launch_id = begin(served, "cluster", release=True)
    listed = owner(served, "launches", "list", "--state", "refused")
    head, *rows = listed.out.splitlines()
    assert head.split() == ["LAUNCH", "STATE", "WORKLOAD", "CALLER", "GRANT", "PLATFORM", "BEGAN", "WHY"]
    [row] = [row for row in rows if row.startswith(launch_id)]
    assert row.split()[1:5] == ["refused", "web", "1", "cluster"]
    assert row.endswith("MEASUREMENT_REFUSED")
    assert launch_id not in owner(served, "launches", "list", "--state", "released").out
    shown = owner(served, "launches", "get", launch_id).out
    assert shown.startswith(f"launch {launch_id}: refused (MEASUREMENT_REFUSED)\n")
    assert "  launch.measurement: " in shown
    assert "  explanation  " in shown
    [found] = [
        each for each in json.loads(owner(served, "launches", "list", "--json").out) if each["launch_id"] == launch_id
    ]
    assert found["caller"] == CALLER
    assert re.fullmatch(r"chip:[0-9a-f]{32}", found["chip"])
    assert f"  in records   {found['chip']}\n" in shown
    assert found["chip"] in owner(served, "audit", "list", "--launch", launch_id, "--json").out
    assert len(json.loads(owner(served, "launches", "list", "--limit", "1", "--json").out)) == 1
    assert owner(served, "launches", "get", str(uuid4())).code == 2
    assert owner(served, "launches", "get", "garbage").code == 2


def test_a_watch_prints_each_change_until_it_is_stopped(served: OwnersVerifier) -> None:
    command = [*script("sevattest"), "owner", "launches", "watch", "--interval", "0.1", "--json"]
    environ = {**os.environ, **served.environ}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ) as process:
        launch_id = begin(served, "cluster", release=True)
        assert process.stdout is not None
        seen = []
        for line in process.stdout:
            launch = json.loads(line)
            if launch["launch_id"] == launch_id:
                seen.append(launch["state"])
            if seen[-1:] == ["refused"]:
                break
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert seen in (["refused"], ["open", "refused"])
    assert (process.returncode, err) == (130, "")


def test_a_watch_on_a_terminal_draws_a_table_over_itself(served: OwnersVerifier) -> None:
    begin(served, "cluster")
    leader, follower = pty.openpty()
    command = [*script("sevattest"), "owner", "launches", "watch", "--interval", "0.1"]
    environ = {**os.environ, **served.environ, "COLUMNS": "80", "LINES": "5"}
    process = subprocess.Popen(command, stdout=follower, stderr=subprocess.PIPE, env=environ)
    os.close(follower)
    try:
        drawn = b""
        while drawn.count(b"\x1b[H") < 3:
            drawn += os.read(leader, 65536)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        _, err = process.communicate(timeout=30)
    finally:
        os.close(leader)
        if process.poll() is None:
            process.kill()
            process.communicate()
    assert (process.returncode, err) == (130, b"")
    frame = drawn.split(b"\x1b[H")[1].replace(b"\x1b[K", b"").replace(b"\x1b[J", b"").decode()
    lines = frame.splitlines()
    assert lines[0].split()[:3] == ["LAUNCH", "STATE", "WHY"]
    assert len(lines) <= 4
    assert max(map(len, lines)) <= 80


# Judgement.


def test_the_impact_of_a_revocation_is_known_before_it_is_applied(
    served: OwnersVerifier, tmp_path: Path, name: str
) -> None:
    launch_id = begin(served, "cluster")
    cek = served.site.platform.chain.cek.fingerprint.hex()
    file = write(tmp_path, revocation(name, ceks=[cek]))
    head, *rows = owner(served, "revocation", "impact", "-f", file).out.splitlines()
    assert head.split() == ["LAUNCH", "STATE", "WORKLOAD", "WHY"]
    [row] = [row for row in rows if row.startswith(launch_id)]
    assert f"revocation {name} 1: the chip: sold" in row
    assert owner(served, "get", "revocation", name).code == 2
    assert (
        json.loads(owner(served, "revocation", "impact", "-f", write(tmp_path, revocation(name)), "--json").out) == []
    )
    assert owner(served, "revocation", "impact", name).code == 2
    assert owner(served, "revocation", "impact").code == 2


def test_a_launch_is_simulated_with_a_verdict_as_exit_code(served: OwnersVerifier, tmp_path: Path, name: str) -> None:
    chain = tmp_path / "chain.cert"
    chain.write_bytes(served.site.platform.chain.to_bytes())
    words = ["simulate", "--workload", "web", "--caller", CALLER, "--chain", str(chain)]
    good = owner(served, *words, "--firmware", "1.55.24")
    assert good == Said(out="accepted: workload version 1\n", err="", code=0)
    unknown = owner(served, *words)
    assert unknown.code == 1
    assert unknown.out.startswith("refused: workload version 1\n  simulate.firmware: ")
    cek = served.site.platform.chain.cek.fingerprint.hex()
    file = write(tmp_path, revocation(name, ceks=[cek]))
    revoked = owner(served, *words, "--firmware", "1.55.24", "-f", file, "--json")
    assert revoked.code == 1
    assert [each["rule"] for each in json.loads(revoked.out)["findings"]] == [
        "platform.chip_revoked",
        "launch.chip_revoked",
    ]
    past = owner(served, "simulate", "--launch", begin(served, "cluster", release=True), "--firmware", "1.55.24")
    assert past.code == 1
    assert "simulate.unproven" in past.out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--workload", "web"], "--caller is needed"),
        (["--launch", "7"], "argument --launch: must be a launch's id, a UUID in lower case"),
        (["--launch", "5f0f2f04-6c3e-4a62-a3f1-52f3cf1f6a0b", "--workload", "web"], "--launch has its own workload"),
        (["--digest", "ab"], "argument --digest: must be a launch digest: 64 hex digits"),
        (["--firmware", "new"], "argument --firmware: "),
    ],
)
def test_a_simulation_that_cannot_be_says_why(served: OwnersVerifier, words: list[str], sentence: str) -> None:
    said = owner(served, "simulate", *words)
    assert (said.out, said.code) == ("", 2)
    assert said.err.startswith(f"sevattest: {sentence}")
