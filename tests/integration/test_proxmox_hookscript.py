"""Proxmox VE's hookscript with everything real behind it: `sevattest launch`, agent, verifier, mutual TLS.

`qm` is a fake that does what the real one does in its order (tests/support/fake_qm.py); the machine is the stand-in.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from orchestrator.demo.processes import script
from orchestrator.demo.site import CPU, GUEST, ORCHESTRATOR, VCPUS, WORKLOAD, HostPlay, Site
from orchestrator.demo.stack import Stack
from tests.support.agent import alive
from tests.support.eventually import until, wait_until
from tests.support.machine_kinds import REPOSITORY, Kind
from tests.support.stack import Sides, order, running_stack, sides
from tests.support.stages import ProxmoxStage

pytestmark = pytest.mark.slow
HOOK = REPOSITORY / "host_agent" / "hookscript" / "sevattest-hookscript"
VM = "vm"


@dataclass
class Host:
    """A Proxmox VE host with one virtual machine, and the services of both sites."""

    stack: Stack
    stage: ProxmoxStage

    def set_up(self, **changes: str) -> None:
        """The machine's configuration, and the words of `sevattest launch`."""
        site, stage = self.stack.site, self.stage
        artefacts = site.artefacts(site.host, "2")
        boot = f"-kernel {artefacts.kernel} -initrd {artefacts.initrd} -append '{artefacts.cmdline}'"
        stage.set_up(
            **{
                "cores": str(VCPUS),
                "cpu": CPU,
                "hookscript": str(stage.root / "hook"),
                "args": f"-readconfig {stage.settings.run}/{stage.vmid}/launch.cfg {boot} -serial file:{self.serial}",
                **changes,
            }
        )
        hook = stage.root / "hook"
        hook.write_text(
            f"#!/bin/sh\nexport SEVATTEST_PROXMOX_CONF={stage.root}/conf SEVATTEST_PROXMOX_RUN={stage.settings.run}\n"
            f'export SEVATTEST_PROGRAM={stage.root}/sevattest\nexec {HOOK} "$@"\n'
        )
        hook.chmod(0o755)
        program = stage.root / "sevattest"
        program.write_text("#!/bin/sh\nexec " + " ".join(f"'{word}'" for word in script("sevattest")) + ' "$@"\n')
        program.chmod(0o755)
        (stage.root / "conf").mkdir(exist_ok=True)
        pki = site.pki
        words = [
            *(VM, "--workload", WORKLOAD, "--agent", self.stack.agent.where or ""),
            *("--verifier", self.stack.verifier.where or ""),
            *("--tls-cert", str(pki / f"orchestrator-{ORCHESTRATOR}.pem")),
            *("--tls-key", str(pki / f"orchestrator-{ORCHESTRATOR}.key")),
            *("--agent-ca", str(pki / "datacenter-ca.pem"), "--verifier-ca", str(pki / "owner-ca.pem")),
        ]
        (stage.root / "conf" / str(stage.vmid)).write_text("".join(f"{word}\n" for word in words))

    @property
    def serial(self) -> Path:
        return self.stage.root / "serial"

    async def qm(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run the command, as the GUI does."""
        return await asyncio.to_thread(
            subprocess.run,
            [str(self.stage.root / "qm"), *words],
            capture_output=True,
            text=True,
            check=False,
            timeout=100,
        )

    @property
    def pid(self) -> int | None:
        """The machine's process, if it lives."""
        with suppress(OSError, ValueError):
            pid = int((self.stage.pve / f"{self.stage.vmid}.pid").read_text())
            return pid if alive(pid) else None
        return None

    @property
    def tasks(self) -> list[str]:
        return (self.stage.pve / "tasks").read_text().split()

    @property
    def calls(self) -> list[str]:
        """The commands of `qm` that were run, whoever ran them."""
        return (self.stage.pve / "calls").read_text().split()

    def end_machine(self) -> None:
        if self.pid is not None:
            os.kill(self.pid, signal.SIGKILL)
        wait_until(lambda: self.pid is None)


def _add_guest(site: Site, stage: ProxmoxStage) -> None:
    firmware = site.artefacts(site.host, "2").firmware
    settings = stage.settings
    site.agent_config.write_text(
        site.agent_config.read_text()
        + f"""
[proxmox]
qm = "{settings.qm}"
run = "{settings.run}"
monitors = "{settings.monitors}"
[guests.{VM}]
driver = "proxmox"
vmid = {stage.vmid}
firmware = "{firmware}"
"""
    )


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    stages: list[ProxmoxStage] = []

    def edit(site: Site) -> None:
        # As a Python program: what runs in QEMU's place has `-readconfig` on its line before it (`behind_readconfig`).
        main = "import sys; from orchestrator.cli import main; sys.exit(main())"
        program = (sys.executable, "-c", main, "platform", "qemu", "--builtin", "--state", str(site.platform))
        stage = ProxmoxStage(root=site.root / "px", kind=Kind(name="builtin", program=program))
        stage.root.mkdir()
        stage.settings.run.mkdir(mode=0o700)
        stages.append(stage)
        stage.set_up()
        _add_guest(site, stage)

    with running_stack({GUEST: HostPlay()}, edit=edit) as stack:
        made = Host(stack, stages[0])
        made.set_up()
        try:
            yield made
        finally:
            made.end_machine()


@pytest.fixture
async def both(host: Host) -> AsyncIterator[Sides]:
    """The sides, with no machine running and a configuration as it must be."""
    host.end_machine()
    for left in (host.serial, host.stage.pve / "tasks", host.stage.pve / "calls"):
        left.unlink(missing_ok=True)
    host.set_up()
    async with sides(host.stack) as reached:
        yield reached


def secret_of(host: Host) -> str:
    return host.stack.site.secret.read_bytes().hex()


async def test_a_machine_that_is_started_by_qm_is_attested_and_reads_the_owners_secret(host: Host, both: Sides) -> None:
    del both
    done = await host.qm("start", str(host.stage.vmid))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "secret packet in place" in done.stdout
    assert "running: vm" in done.stdout
    assert host.tasks == ["pre-start", "kvm", "post-start"]
    # The agent has looked at the machine and not started it a second time: qm is under way and holds its lock.
    assert host.calls == ["start", "showcmd"]
    await until(lambda: host.serial.exists() and secret_of(host) in host.serial.read_text())
    assert not list((host.stage.settings.run / "100").glob("*.b64"))
    assert not (host.stage.settings.run / "100" / "launch.cfg").exists()


async def test_a_guest_that_is_launched_at_the_agent_is_started_by_the_agent(host: Host, both: Sides) -> None:
    outcome = await both.launch(order(VM)).run()
    assert outcome.error is None, outcome.error
    assert host.pid is not None
    assert host.tasks[:2] == ["pre-start", "kvm"]
    assert host.calls == ["showcmd", "start"]
    # What qm makes is for others as well, though the agent's own files are not.
    assert (host.stage.pve / "tasks").stat().st_mode & 0o777 == 0o644
    assert host.stage.settings.run.joinpath(str(host.stage.vmid)).stat().st_mode & 0o777 == 0o700
    await both.end(outcome)
    assert host.pid is None


@pytest.mark.parametrize(
    ("machine", "file"),
    [({"machine": "q35"}, "pve-q35-4.0.cfg"), ({"machine": "pc-i440fx-4.1", "usb0": "host=1-2"}, "pve-usb.cfg")],
    ids=["q35", "older-i440fx"],
)
async def test_the_agent_takes_a_machine_with_proxmox_ves_own_files(
    host: Host, both: Sides, machine: dict[str, str], file: str
) -> None:
    del both
    host.set_up(**machine)
    shown = await host.qm("showcmd", str(host.stage.vmid))
    assert f"-readconfig /usr/share/qemu-server/{file}" in shown.stdout
    done = await host.qm("start", str(host.stage.vmid))
    assert "is not started with the launch's file" not in done.stdout
    assert host.tasks[:2] == ["pre-start", "kvm"]


async def test_a_refusal_aborts_the_start_before_any_machine_exists(host: Host, both: Sides) -> None:
    del both
    words = host.stage.root / "conf" / "100"
    words.write_text(words.read_text().replace(WORKLOAD, "nothing-of-the-kind"))
    done = await host.qm("start", str(host.stage.vmid))
    assert done.returncode != 0
    assert "begin: " in done.stdout
    assert "no launch; the machine is not started" in done.stdout
    assert host.tasks == ["pre-start"]
    assert host.pid is None


async def test_a_machine_that_the_owner_refuses_is_ended_before_it_runs(host: Host, both: Sides) -> None:
    del both
    site = host.stack.site
    other = site.artefacts(site.host, "1")
    conf = host.stage.pve / "100.conf"
    conf.write_text(conf.read_text().replace(str(site.artefacts(site.host, "2").kernel), str(other.kernel)))
    done = await host.qm("start", str(host.stage.vmid))
    assert "MEASUREMENT_REFUSED" in done.stdout
    assert "the launch failed; the guest has not run" in done.stdout
    assert "hookscript error for 100 on post-start" in done.stderr
    assert host.pid is None
    assert not host.serial.exists() or host.serial.read_text() == ""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"freeze": "0"}, "would not start paused"),
        ({"bios": "ovmf"}, "flash drive is the agent's"),
        ({"amd-sev": "type=std"}, "the agent makes the guest's object itself"),
        ({"args": "-snapshot"}, "is not started with the launch's file"),
    ],
    ids=["not-frozen", "own-firmware", "own-sev", "no-file"],
)
async def test_a_machine_that_is_not_set_up_for_it_does_not_start(
    host: Host, both: Sides, change: dict[str, str], words: str
) -> None:
    del both
    host.set_up(**change)
    done = await host.qm("start", str(host.stage.vmid))
    assert done.returncode != 0
    assert words in done.stdout
    assert host.tasks == ["pre-start"]
    assert host.pid is None


async def test_a_machine_without_words_for_its_launch_does_not_start(host: Host, both: Sides) -> None:
    del both
    (host.stage.root / "conf" / "100").unlink()
    done = await host.qm("start", str(host.stage.vmid))
    assert done.returncode != 0
    assert "is missing: it must have the words of 'sevattest launch'" in done.stdout
    assert host.tasks == ["pre-start"]


async def test_an_agent_that_is_away_aborts_the_start(host: Host, both: Sides) -> None:
    del both
    words = host.stage.root / "conf" / "100"
    words.write_text(words.read_text() + "--timeout\n2\n")
    host.stack.agent.kill()
    try:
        done = await host.qm("start", str(host.stage.vmid))
        assert done.returncode != 0
        assert host.tasks == ["pre-start"]
        assert host.pid is None
    finally:
        host.stack.restart(host.stack.agent)
