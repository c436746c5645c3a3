"""The agent's folder and clock."""

from __future__ import annotations

import json
import os
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from host_agent.doctor.captured import CapturedMachine
from host_agent.doctor.site import clock, machines_outlive, state_dir
from host_agent.doctor.this_machine import ThisMachine
from tests.support.hosts import changed, host, outcomes
from tests.support.machine_kinds import REPOSITORY
from tests.support.nobody import NOBODY, become_nobody, public_folder
from tests.support.under import program_of

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)


def look(folder: Path, mounts: str | None = None, *, scratch: Path | None = None) -> dict[str, str]:
    machine = host("rome-sev-es")
    if mounts is not None and scratch is not None:
        machine = CapturedMachine(changed(scratch, "rome-sev-es", {"proc/self/mountinfo": mounts}))
    return outcomes([*state_dir(machine, folder)])


@pytest.mark.parametrize(("mode", "outcome"), [(0o700, "PASS"), (0o750, "WARN"), (0o701, "WARN"), (0o770, "FAIL")])
def test_others_have_no_business_in_the_folder(tmp_path: Path, mode: int, outcome: str) -> None:
    folder = tmp_path / "state"
    folder.mkdir()
    folder.chmod(mode)
    assert look(folder)["state_dir.private"] == outcome


def test_a_folder_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "state"
    assert look(folder)["state_dir.private"] == "PASS"
    assert not folder.exists()
    assert not folder.parent.exists()


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("")
    assert look(tmp_path / "state")["state_dir.private"] == "FAIL"


def seen_without_privileges(folder: str) -> dict[str, str]:
    """In a process of its own: root may write everywhere."""
    become_nobody()
    return outcomes([*state_dir(ThisMachine(), Path(folder))])


@pytest.mark.parametrize(("mode", "outcome"), [(0o500, "FAIL"), (0o700, "PASS")])
def test_a_folder_that_cannot_be_made_fails(mode: int, outcome: str) -> None:
    with public_folder() as root:
        above = root / "above"
        above.mkdir()
        if os.geteuid() == 0:
            os.chown(above, NOBODY, NOBODY)
        above.chmod(mode)
        program = program_of(seen_without_privileges, str(above / "state"))
        seen = json.loads(subprocess.run(program, capture_output=True, check=True, cwd=REPOSITORY).stdout)
    assert seen["state_dir.private"] == outcome


@pytest.mark.parametrize(
    ("kind", "outcome"),
    [("ext4", "PASS"), ("xfs", "PASS"), ("tmpfs", "WARN"), ("nfs4", "FAIL"), ("cifs", "FAIL"), ("fuse.sshfs", "FAIL")],
)
def test_the_folder_is_on_a_disk_of_the_host(tmp_path: Path, kind: str, outcome: str) -> None:
    folder = tmp_path / "my state"
    folder.mkdir()
    escaped = str(folder.resolve()).replace(" ", "\\040")
    mounts = f"22 1 253:0 / / rw - btrfs /dev/vda1 rw\n30 22 0:31 / {escaped} rw,relatime shared:9 - {kind} x rw\n"
    assert look(folder, mounts, scratch=tmp_path)["state_dir.local"] == outcome


def test_a_mount_beside_the_folder_is_not_the_folders(tmp_path: Path) -> None:
    mounts = f"22 1 253:0 / / rw - ext4 /dev/vda1 rw\n30 22 0:31 / {tmp_path.resolve()}/stat rw - nfs4 x rw\n"
    assert look(tmp_path / "state", mounts, scratch=tmp_path)["state_dir.local"] == "PASS"


@pytest.mark.parametrize(
    ("ahead", "outcome"), [(timedelta(hours=-1), "PASS"), (timedelta(minutes=5), "PASS"), (timedelta(days=1), "FAIL")]
)
def test_a_configuration_from_the_future_shows_a_clock_that_is_behind(ahead: timedelta, outcome: str) -> None:
    assert str(clock(host("rome-sev-es"), now=NOW, written=NOW + ahead).outcome) == outcome


@pytest.mark.parametrize(
    ("name", "outcome"), [("rome-sev-es", "PASS"), ("virtual-machine", "WARN"), ("rome-unprivileged", "SKIP")]
)
def test_a_clock_that_nothing_keeps_right_warns(name: str, outcome: str) -> None:
    assert str(clock(host(name), now=NOW, written=None).outcome) == outcome


QEMU = {"web": ["qemu-system-x86_64"]}
SCOPED = {"web": ["systemd-run", "--scope", "--", "qemu-system-x86_64"]}
ASKED = "systemctl show --property=KillMode -- agent.service"


@pytest.mark.parametrize(
    ("cgroup", "mode", "programs", "outcome"),
    [
        ("0::/system.slice/agent.service", "control-group", QEMU, "WARN"),
        ("0::/system.slice/agent.service", "mixed", QEMU, "WARN"),
        ("0::/system.slice/agent.service", "process", QEMU, "PASS"),
        ("0::/system.slice/agent.service", "control-group", SCOPED, "PASS"),
        ("0::/system.slice/agent.service", "control-group", {**SCOPED, "db": ["qemu"]}, "WARN"),
        ("0::/system.slice/agent.service", "control-group", {}, "PASS"),
        ("0::/system.slice/agent.service", None, QEMU, "SKIP"),
        ("0::/user.slice/user-0.slice/session-1.scope", "control-group", QEMU, "SKIP"),
        (None, "control-group", QEMU, "SKIP"),
    ],
)
def test_a_service_that_would_take_the_machines_along_warns(
    tmp_path: Path, cgroup: str | None, mode: str | None, programs: dict[str, list[str]], outcome: str
) -> None:
    files = {} if cgroup is None else {"proc/self/cgroup": f"{cgroup}\n"}
    root = changed(tmp_path, "rome-sev-es", files)
    if mode is not None:
        # The captured machine's last table is the one of its programs.
        with (root / "machine.toml").open("a") as file:
            file.write(f'"{ASKED}" = "KillMode={mode}\\n"\n')
    finding = machines_outlive(CapturedMachine(root), programs)
    assert (finding.probe, str(finding.outcome)) == ("agent.unit", outcome), finding
    assert ("web" in finding.seen) == (outcome == "WARN" and programs == QEMU)
