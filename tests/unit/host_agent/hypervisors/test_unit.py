"""The service that the agent runs in: who it is, what its end takes along, and machines in scopes of their own."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from common.errors import SevattestError
from host_agent import app
from host_agent.config import AgentConfig
from host_agent.hypervisors import unit
from host_agent.hypervisors.base import GuestDefinition
from host_agent.hypervisors.qemu import QemuHypervisor
from host_agent.hypervisors.unit import Service
from host_agent.launches.state import LaunchState
from tests.support import fake_qemu
from tests.support.agent import ALICE, QUICK, Rig, alive, pid_of, rig
from tests.support.eventually import until
from tests.support.recording_log import Event, RecordingLog

# What systemd-run(1) does with --scope: it tells systemd, and becomes the command. Without, systemd starts the command.
SYSTEMD_RUN = """\
#!/bin/sh
scope=no
while :; do
  case "$1" in
    --scope) scope=yes ;;
    --) shift; break ;;
    --*) ;;
    *) break ;;
  esac
  shift
done
echo "Running scope as unit: run-r1.scope" >&2
[ $scope = yes ] && exec "$@"
exit 0
"""
KILLS_ALL = '#!/bin/sh\necho "$*" >> "$0.asked"\necho KillMode=control-group\n'
KILLS_ONE = "#!/bin/sh\necho KillMode=process\n"


def executable(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("0::/system.slice/sev-host-agent.service\n", Service(name="sev-host-agent.service", of_user=False)),
        ("0::/system.slice/a.service/supervisor\n", Service(name="a.service", of_user=False)),
        (
            "12:cpu,cpuacct:/x.service\n1:name=systemd:/system.slice/a.service\n0::/\n",
            Service(name="a.service", of_user=False),
        ),
        (
            "0::/user.slice/user-7.slice/user@7.service/app.slice/a.service\n",
            Service(name="a.service", of_user=True),
        ),
        ("0::/user.slice/user-7.slice/session-2.scope\n", None),
        ("0::/user.slice/user-7.slice/user@7.service/app.slice/run-1.scope\n", None),
        ("0::/system.slice/docker-0123.scope\n", None),
        ("4:memory:/system.slice/a.service\n", None),
        ("0::/\n", None),
        ("nonsense", None),
        ("", None),
    ],
)
def test_the_service_is_the_innermost_unit_if_that_is_a_service(text: str, found: Service | None) -> None:
    assert unit.service_of(text) == found


def test_a_users_own_service_is_asked_for_at_its_own_manager() -> None:
    assert Service(name="a.service", of_user=False).question == [
        *("systemctl", "show", "--property=KillMode", "--", "a.service"),
    ]
    assert Service(name="a.service", of_user=True).question[:2] == ["systemctl", "--user"]


@pytest.mark.parametrize(
    ("answer", "mode", "along"),
    [
        ("KillMode=control-group\n", "control-group", True),
        ("KillMode=mixed\n", "mixed", True),
        ("KillMode=process\n", "process", False),
        ("KillMode=none\n", "none", False),
    ],
)
def test_a_kill_mode_takes_the_machines_along_or_leaves_them(answer: str, mode: str, *, along: bool) -> None:
    found = unit.kill_mode(answer)
    assert found == mode
    assert unit.takes_along(mode) == along


@pytest.mark.parametrize(
    "answer", ["", "KillMode=\n", "System has not been booted with systemd\n", "XKillMode=mixed\n"]
)
def test_an_answer_that_says_nothing_is_none(answer: str) -> None:
    assert unit.kill_mode(answer) is None


def test_only_a_machine_in_a_scope_of_its_own_is_safe() -> None:
    programs = {
        "plain": ["/usr/bin/qemu-system-x86_64"],
        "scoped": ["/usr/bin/systemd-run", "--quiet", "--scope", "--", "qemu"],
        "service": ["systemd-run", "--", "qemu", "--scope"],
        "named": ["/opt/not-systemd-run", "--scope", "qemu"],
    }
    assert unit.at_risk(programs) == ["named", "plain", "service"]


# --------------------------------------------------------------------------------------------------- in the agent's log


def started(
    monkeypatch: pytest.MonkeyPatch, folder: Path, cgroup: str, systemctl: str, **programs: list[str]
) -> list[Event]:
    """What the agent says at its start in such a place."""
    executable(folder / "systemctl", systemctl)
    (folder / "cgroup").write_text(cgroup)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    monkeypatch.setattr(app, "_CGROUP", folder / "cgroup")
    log = RecordingLog()
    config = cast("AgentConfig", SimpleNamespace(started_programs=lambda: programs))
    app.warn_of_unit(config, log=log)
    return log.named("agent.machines_end_with_unit")


IN_SERVICE = "0::/system.slice/agent.service\n"


def test_a_service_that_ends_the_machines_is_named_in_the_log(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    [event] = started(monkeypatch, tmp_path, IN_SERVICE, KILLS_ALL, web=["qemu"], db=["systemd-run", "--scope"])
    assert (event.level, event.fields["unit"], event.fields["guests"]) == ("warning", "agent.service", ["web"])
    assert "KillMode=process" in event.fields["text"]
    assert (tmp_path / "systemctl.asked").read_text() == "show --property=KillMode -- agent.service\n"


def test_nothing_is_said_where_the_machines_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert started(monkeypatch, tmp_path, IN_SERVICE, KILLS_ONE, web=["qemu"]) == []
    assert started(monkeypatch, tmp_path, IN_SERVICE, KILLS_ALL, web=["systemd-run", "--scope"]) == []
    assert started(monkeypatch, tmp_path, "0::/user.slice/session-1.scope\n", KILLS_ALL, web=["qemu"]) == []


@pytest.mark.parametrize("text", ["#!/bin/sh\nexit 1\n", "no program", "#!/bin/sh\nprintf '\\377'\n"])
def test_a_systemctl_that_says_nothing_is_no_reason_not_to_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str
) -> None:
    assert started(monkeypatch, tmp_path, IN_SERVICE, text, web=["qemu"]) == []


# --------------------------------------------------------------------------------------- machines in their own scope


def through(folder: Path, *options: str) -> QemuHypervisor:
    """The fake QEMU, started by way of a systemd-run with these options."""
    runner = executable(folder / "systemd-run", SYSTEMD_RUN)
    program = (str(runner), *options, "--", sys.executable, "-ISE", fake_qemu.__file__, str(folder / "script.json"))
    guest = GuestDefinition(program=program, firmware=folder / "OVMF.fd", args=("-m", "256M"))
    return QemuHypervisor({"web": guest}, QUICK)


async def test_a_machine_in_its_own_scope_is_started_found_again_and_ended(tmp_path: Path) -> None:
    first = Rig(tmp_path, hypervisor=through(tmp_path, "--scope", "--quiet"))
    first.folders.open()
    await first.supervisor.recover()
    launch = await first.runner.start(ALICE, first.order())
    assert launch.state is LaunchState.PAUSED
    await first.leave()
    assert alive(pid_of(launch))
    async with rig(tmp_path, hypervisor=through(tmp_path, "--scope", "--quiet")) as second:
        assert second.now(launch).machine == launch.machine
        measured = await second.runner.measure(ALICE, launch.launch_id)
        assert measured.state is LaunchState.MEASURED
        await second.runner.abort(ALICE, launch.launch_id, second.order().request_id)
        assert not alive(pid_of(launch))
        assert len(second.script.started) == 1


async def test_a_machine_that_systemd_runs_as_a_service_is_not_the_agents(tmp_path: Path) -> None:
    async with rig(tmp_path, hypervisor=through(tmp_path, "--quiet")) as agent:
        with pytest.raises(SevattestError, match="died before its monitor greeted"):
            await agent.runner.start(ALICE, agent.order())
        [launch] = agent.runner.launches(ALICE)
        assert launch.state is LaunchState.FAILED
        await until(lambda: agent.custody.machine(launch.launch_id) is None)
