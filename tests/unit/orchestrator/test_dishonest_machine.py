"""The dishonest host's wrapper changes exactly what it says, and nothing of an honest command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orchestrator.demo.dishonest_machine import behind, denied, reworded


def test_the_owners_session_is_dropped_and_the_policy_lowered() -> None:
    words = [
        "qemu",
        "-object",
        "sev-guest,id=sev0,cbitpos=51,policy=0xf,dh-cert-file=/a,session-file=/b,kernel-hashes=on",
        "-S",
    ]
    assert reworded(words) == ["qemu", "-object", "sev-guest,id=sev0,cbitpos=51,policy=0xe,kernel-hashes=on", "-S"]


def test_other_arguments_are_left_alone() -> None:
    words = ["qemu", "-append", "sev-guest,policy=15", "-object", "rng-random,id=policy=15"]
    assert reworded(words) == words


def test_the_machines_monitor_is_moved_aside() -> None:
    words, visible, hidden = behind(["qemu", "-qmp", "unix:/run/x/qmp.sock,server=on,wait=off", "-S"])
    assert words == ["qemu", "-qmp", "unix:/run/x/m,server=on,wait=off", "-S"]
    assert (visible, hidden) == (Path("/run/x/qmp.sock"), Path("/run/x/m"))


def test_the_lowered_policy_is_denied() -> None:
    line = b'{"return": {"enabled": true, "state": "launch-secret", "policy": 14}}\r\n'
    assert json.loads(denied(line))["return"] == {"enabled": True, "state": "launch-secret", "policy": 15}


@pytest.mark.parametrize(
    "line",
    [b"", b"\r\n", b"no json\r\n", b"[]", b'{"QMP": {}}\r\n', b'{"return": {}}\r\n', b'{"return": {"policy": "x"}}'],
)
def test_other_lines_pass_as_they_are(line: bytes) -> None:
    assert denied(line) == line
