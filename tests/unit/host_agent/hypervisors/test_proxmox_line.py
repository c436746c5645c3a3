"""What `qm showcmd` prints: the line that is accepted, and for each that is not what to change."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from common.errors import InvalidInput, Reason
from host_agent.hypervisors.proxmox_line import check_line
from tests.support.machine_kinds import fake
from tests.support.stages import ProxmoxStage


@pytest.fixture
def stage(tmp_path: Path) -> ProxmoxStage:
    made = ProxmoxStage(root=tmp_path, kind=fake(tmp_path / "script"))
    made.set_up()
    return made


def shown(stage: ProxmoxStage, *options: str) -> str:
    done = subprocess.run([stage.root / "qm", "showcmd", "100", *options], capture_output=True, text=True, check=True)
    return done.stdout


def check(stage: ProxmoxStage, text: str) -> None:
    check_line(100, text, monitor=stage.pve / "100.qmp", launch_file=stage.settings.run / "100" / "launch.cfg")


def test_a_machine_that_is_set_up_for_it_is_accepted(stage: ProxmoxStage) -> None:
    check(stage, shown(stage))


@pytest.mark.parametrize(
    ("change", "words", "hint"),
    [
        ({"freeze": "0"}, "vm 100 would not start paused", "qm set 100 --freeze 1"),
        ({"bios": "ovmf"}, "firmware's flash drive is the agent's", "qm set 100 --bios seabios --delete efidisk0"),
        ({"amd-sev": "type=es"}, "the agent makes the guest's object itself", "qm set 100 --delete amd-sev"),
        ({"args": "-kernel /k"}, "is not started with the launch's file", "qm set 100 --args '-readconfig "),
        ({"args": "-readconfig /elsewhere.cfg"}, "is not started with the launch's file", None),
    ],
)
def test_a_machine_that_is_not_is_refused_with_what_to_change(
    stage: ProxmoxStage, change: dict[str, str], words: str, hint: str | None
) -> None:
    stage.set_up(**change)
    with pytest.raises(InvalidInput, match=words) as refusal:
        check(stage, shown(stage))
    assert refusal.value.reason is Reason.INVALID_CONFIGURATION
    if hint is not None:
        assert refusal.value.fields["hint"].startswith(hint)


@pytest.mark.parametrize(
    "args",
    [
        "-incoming tcp:0:1",
        "-object sev-guest,id=x",
        "-global sev-guest.policy=1",
        "-set object.sevattest0.policy=1",
        "-machine confidential-guest-support=other",
        "-machine pflash1=vars",
        "-drive if=pflash,unit=1,file=/vars",
        "-bios /elsewhere",
        "-readconfig /second.cfg",
        "-loadvm snap",
        "-nothing-that-is-known 1",
    ],
)
def test_what_a_definition_may_not_say_a_machines_args_may_not_either(stage: ProxmoxStage, args: str) -> None:
    own = f"-readconfig {stage.settings.run}/100/launch.cfg"
    stage.set_up(args=own)
    check(stage, shown(stage))
    stage.set_up(args=f"{own} {args}")
    with pytest.raises(InvalidInput):
        check(stage, shown(stage))


@pytest.mark.parametrize("text", ["", "\n", "no such machine", "'", "kvm -S", "/usr/bin/kvm disk.img"])
def test_what_is_no_command_line_is_refused(stage: ProxmoxStage, text: str) -> None:
    with pytest.raises(InvalidInput):
        check(stage, text)


def test_a_machine_whose_monitor_is_elsewhere_is_refused(stage: ProxmoxStage) -> None:
    with pytest.raises(InvalidInput, match="has no QMP monitor"):
        check(stage, shown(stage).replace("100.qmp", "100.mon"))
