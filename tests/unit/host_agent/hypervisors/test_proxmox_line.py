"""What `qm showcmd` prints: the line that is accepted, and for each that is not what to change."""

from __future__ import annotations

import shlex
import subprocess
from itertools import pairwise
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


def with_option_before_args(stage: ProxmoxStage, *words: str) -> str:
    """The line with more of Proxmox VE's own part."""
    return shown(stage).replace(" -nodefaults", " -nodefaults " + shlex.join(words))


Q35 = {"machine": "q35"}
OLDER_I440FX = {"machine": "pc-i440fx-4.1", "usb0": "host=1-2"}


@pytest.mark.parametrize(
    ("machine", "files"),
    [
        (Q35, ["/usr/share/qemu-server/pve-q35-4.0.cfg"]),
        (OLDER_I440FX, ["/usr/share/qemu-server/pve-usb.cfg"]),
        ({"machine": "pc"}, []),
    ],
    ids=["q35", "older-i440fx", "i440fx"],
)
def test_a_machine_that_is_set_up_for_it_is_accepted(
    stage: ProxmoxStage, machine: dict[str, str], files: list[str]
) -> None:
    stage.set_up(**machine)
    line = shown(stage)
    words = shlex.split(line)
    read = [value for option, value in pairwise(words) if option == "-readconfig"]
    assert read == [*files, f"{stage.settings.run}/100/launch.cfg"]
    check(stage, line)


# What config_to_command adds for a guest's devices, as the expected lines of qemu-server's own tests have it
# (src/test/cfg2cmd: q35-usb2, q35-win10-hostpci, q35-simple, custom-cpu-model, simple1, efi-raw).
PUBLISHED = [
    ("-device", "vmgenid,guid=c773c261-d800-4348-9f5d-167fadd53cf8"),
    ("-chardev", "spicevmc,id=vdagent,name=vdagent"),
    ("-spice", "tls-port=61000,addr=127.0.0.1,tls-ciphers=HIGH,seamless-migration=on"),
    ("-device", "vfio-pci,host=0000:f0:43.0,id=hostpci1,bus=ich9-pcie-port-2,addr=0x0"),
    ("-object", "memory-backend-ram,id=ram-node0,size=256M"),
    ("-numa", "node,nodeid=0,cpus=0,memdev=ram-node0"),
    ("-global", "kvm-pit.lost_tick_policy=discard"),
    ("-rtc", "driftfix=slew,base=localtime"),
    ("-object", '{"id":"throttle-drive-scsi0","limits":{},"qom-type":"throttle-group"}'),
    ("-blockdev", '{"driver":"throttle","node-name":"drive-scsi0","throttle-group":"throttle-drive-scsi0"}'),
    ("-netdev", "type=tap,id=net0,ifname=tap100i0,script=/usr/libexec/qemu-server/pve-bridge,vhost=on"),
    ("-machine", "hpet=off,type=pc-q35-5.1+pve0"),
]


@pytest.mark.parametrize("words", PUBLISHED, ids=lambda words: words[1].partition(",")[0])
def test_what_proxmox_ve_itself_says_for_a_guests_devices_is_accepted(
    stage: ProxmoxStage, words: tuple[str, str]
) -> None:
    line = with_option_before_args(stage, *words)
    assert words[1] in shlex.split(line)
    check(stage, line)


@pytest.mark.parametrize(
    "path",
    [
        "/usr/share/qemu-server/../../../tmp/pve-q35-4.0.cfg",
        "/usr/share/qemu-server/pve-/../../../../tmp/x.cfg",
        "/usr/share/qemu-server/pve-q35-4.0.cfg\n",
        "/usr/share/qemu-server/pve-q35-4.0.cfg.mine",
        "/usr/share/qemu-server/mine.cfg",
        "/srv/pve-q35-4.0.cfg",
        "/srv/usr/share/qemu-server/pve-q35-4.0.cfg",
        "usr/share/qemu-server/pve-q35-4.0.cfg",
        "",
    ],
)
def test_a_file_that_only_looks_like_proxmox_ves_own_is_refused(stage: ProxmoxStage, path: str) -> None:
    with pytest.raises(InvalidInput, match="no other than Proxmox VE's own"):
        check(stage, with_option_before_args(stage, "-readconfig", path))


@pytest.mark.parametrize(
    "args",
    [
        "",
        "-readconfig {own} -readconfig {own}",
        "-readconfig {own} -readconfig /usr/share/qemu-server/pve-usb.cfg",
    ],
    ids=["not-at-all", "twice", "not-last"],
)
@pytest.mark.parametrize("machine", [Q35, OLDER_I440FX], ids=["q35", "older-i440fx"])
def test_the_launchs_file_must_be_there_once_and_last(stage: ProxmoxStage, machine: dict[str, str], args: str) -> None:
    own = f"{stage.settings.run}/100/launch.cfg"
    stage.set_up(**machine, args=f"-readconfig {own}")
    check(stage, shown(stage))
    stage.set_up(**machine, args=args.format(own=own))
    with pytest.raises(InvalidInput, match="once, last, and with no other") as refusal:
        check(stage, shown(stage))
    assert refusal.value.fields["hint"].startswith(f"qm set 100 --args '-readconfig {own}'")


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
