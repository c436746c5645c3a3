"""A stage for each driver: one guest, set up as a host of that kind has it, for tests that run on all of them.

A stage is what is outside of the agent: the definition, whoever starts the machine, and what a test wants to know about
the machine without asking the agent. `hypervisor` gives the driver anew for each run of an agent.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from host_agent.hypervisors.attach import AttachDefinition, AttachHypervisor
from host_agent.hypervisors.base import GuestDefinition, Hypervisor
from host_agent.hypervisors.libvirt import LibvirtDefinition, LibvirtHypervisor, LibvirtSettings
from host_agent.hypervisors.monitored import QemuSettings
from host_agent.hypervisors.proxmox import ProxmoxDefinition, ProxmoxHypervisor, ProxmoxSettings
from host_agent.hypervisors.qemu import QemuHypervisor
from tests.support import fake_qm
from tests.support.agent import alive
from tests.support.fake_libvirt import FakeLibvirt
from tests.support.machine_kinds import (
    CMDLINE,
    CPU,
    REPOSITORY,
    VCPUS,
    Kind,
    behind_readconfig,
    command_line,
    guest_words,
    kill,
    start,
)

GUEST = "web"


@dataclass(kw_only=True)
class Stage:
    """What all stages have.

    Attributes:
        root: a short folder; the guest's files are in it.
        kind: what runs in QEMU's place.
        firmware: the guest's firmware.
    """

    name: ClassVar[str]
    # Whether a machine can be in the guest's place that is not the launch's.
    has_a_place: ClassVar[bool] = True
    root: Path
    kind: Kind
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def firmware(self) -> Path:
        """The guest's firmware."""
        return self.root / "OVMF.fd"

    @property
    def state_dir(self) -> Path:
        """The agent's own folder."""
        return self.root / "agent"

    def hypervisor(self, settings: QemuSettings) -> Hypervisor:
        """The driver, for one run of an agent."""
        raise NotImplementedError

    @asynccontextmanager
    async def somebody(self) -> AsyncIterator[None]:
        """Whoever starts the machine, if it is not the agent, at work."""
        yield

    def occupy(self) -> int:
        """Put another machine into the guest's place; returns its pid."""
        raise NotImplementedError

    def machines(self) -> list[int]:
        """Pids of the machines that were started for the guest and live."""
        found = []
        for entry in Path("/proc").iterdir():
            with suppress(OSError, ValueError):
                pid = int(entry.name)
                line = (entry / "cmdline").read_bytes().split(b"\0")
                if str(self.kind.program[-1]).encode() in line and self._is_here(line) and alive(pid):
                    found.append(pid)
        return found

    def _is_here(self, line: list[bytes]) -> bool:
        """Whether it is the machine itself and not a shell or a real QEMU behind it, and a machine of this stage."""
        here = any(os.fsencode(self.root) in word for word in line)
        return here and any(word.startswith(b"sev-guest,") for word in line) and b"/bin/sh" not in line

    @property
    def serial(self) -> list[str]:
        """What the guest has written."""
        path = self.root / "serial"
        return path.read_text(errors="replace").splitlines() if path.exists() else []

    def end(self) -> None:
        """End what was started; nothing of it is left."""
        for process in self.processes:
            kill(process)
        for pid in self.machines():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.root, ignore_errors=True)

    def _machine(self, monitor: Path, launch: list[str]) -> int:
        """Start a machine as somebody else would."""
        words = [*guest_words(self.root), "-machine", "q35", *launch, "-S"]
        words += ["-qmp", f"unix:{monitor},server=on,wait=off"]
        process = start(command_line(self.kind.program, words), self.root)
        self.processes.append(process)
        return process.pid

    def _stranger(self, monitor: Path) -> int:
        """A machine of somebody else's, with files of its own."""
        folder = self.root / "stranger"
        folder.mkdir(exist_ok=True)
        for name, size in (("godh", 2084), ("session", 128)):
            (folder / name).write_bytes(base64.b64encode(bytes(size)))
        sev = f"sev-guest,id=s0,cbitpos=51,reduced-phys-bits=1,policy=0xf,dh-cert-file={folder}/godh"
        sev += f",session-file={folder}/session"
        return self._machine(monitor, ["-object", sev, "-machine", "confidential-guest-support=s0"])


@dataclass(kw_only=True)
class QemuStage(Stage):
    """The agent spawns the machine."""

    name: ClassVar[str] = "qemu"
    has_a_place: ClassVar[bool] = False

    def hypervisor(self, settings: QemuSettings) -> Hypervisor:
        definition = GuestDefinition(
            program=self.kind.program, firmware=self.firmware, args=("-machine", "q35", *guest_words(self.root))
        )
        return QemuHypervisor({GUEST: definition}, settings)


@dataclass(kw_only=True)
class AttachStage(Stage):
    """Somebody waits for the launch's file and starts the machine."""

    name: ClassVar[str] = "attach"

    @property
    def monitor(self) -> Path:
        """Where the machine's monitor will be."""
        return self.root / "q"

    @property
    def inputs(self) -> Path:
        """The agent's folder for the machine."""
        return self.root / "in"

    def hypervisor(self, settings: QemuSettings) -> Hypervisor:
        definition = AttachDefinition(firmware=self.firmware, monitor=self.monitor, inputs=self.inputs)
        return AttachHypervisor({GUEST: definition}, settings)

    @asynccontextmanager
    async def somebody(self) -> AsyncIterator[None]:
        waiting = asyncio.create_task(self._start())
        try:
            yield
        finally:
            waiting.cancel()
            with suppress(asyncio.CancelledError):
                await waiting

    async def _start(self) -> None:
        file = self.inputs / "launch.cfg"
        while not file.exists():  # noqa: ASYNC110 -- as whoever starts a machine would
            await asyncio.sleep(0.005)
        self._machine(self.monitor, ["-readconfig", str(file)])

    def occupy(self) -> int:
        return self._stranger(self.monitor)


@dataclass(kw_only=True)
class CommandStage(AttachStage):
    """The definition names a command that starts the machine."""

    name: ClassVar[str] = "attach-command"

    def script(self) -> str:
        """What the command runs: it becomes the machine."""
        words = [*guest_words(self.root), "-machine", "q35", "-S", "-qmp", f"unix:{self.monitor},server=on,wait=off"]
        return (
            "import os\n"
            "from tests.support.machine_kinds import command_line\n"
            f"words = {[*words, '-readconfig', str(self.inputs / 'launch.cfg')]!r}\n"
            f"line = command_line({list(self.kind.program)!r}, words)\n"
            "os.execv(line[0], line)\n"
        )

    def hypervisor(self, settings: QemuSettings) -> Hypervisor:
        script = self.root / "start-web"
        # Once: the next run of an agent comes while a command of the last one may be reading it.
        if not script.exists():
            script.write_text(self.script())
        definition = AttachDefinition(
            firmware=self.firmware,
            monitor=self.monitor,
            inputs=self.inputs,
            start=("/usr/bin/env", f"PYTHONPATH={REPOSITORY}", sys.executable, str(script)),
        )
        return AttachHypervisor({GUEST: definition}, settings)

    @asynccontextmanager
    async def somebody(self) -> AsyncIterator[None]:
        yield


@dataclass(kw_only=True)
class ProxmoxStage(Stage):
    """A virtual machine of Proxmox VE, which the agent starts with `qm start`."""

    name: ClassVar[str] = "proxmox"
    vmid: ClassVar[int] = 100

    @property
    def pve(self) -> Path:
        """What stands in for /etc/pve/qemu-server and /var/run/qemu-server."""
        return self.root / "pve"

    @property
    def settings(self) -> ProxmoxSettings:
        """Where Proxmox VE is."""
        return ProxmoxSettings(qm=self.root / "qm", run=self.root / "run", monitors=self.pve)

    def hypervisor(self, settings: QemuSettings) -> Hypervisor:
        # Once: the next run of an agent comes while a `qm start` of the last one may be reading these files.
        if not self.settings.qm.exists():
            self.set_up()
        definition = ProxmoxDefinition(firmware=self.firmware, vmid=self.vmid)
        return ProxmoxHypervisor({GUEST: definition}, settings, self.settings)

    def set_up(self, **changes: str) -> None:
        """Write the machine's configuration and the command."""
        self.pve.mkdir(exist_ok=True)
        words = guest_words(self.root)
        boot = shlex.join(words[words.index("-kernel") :])
        conf = {
            "name": GUEST,
            "cores": str(VCPUS),
            "cpu": CPU,
            "memory": "256M",
            "freeze": "1",
            "args": f"-readconfig {self.settings.run}/{self.vmid}/launch.cfg {boot}",
            **changes,
        }
        (self.pve / f"{self.vmid}.conf").write_text("".join(f"{key}: {value}\n" for key, value in conf.items()))
        program = behind_readconfig(self.kind.program, self.settings.run / str(self.vmid) / "launch.cfg")
        (self.pve / "kvm.json").write_text(json.dumps(program))
        qm = self.root / "qm"
        qm.write_text(
            f'#!/bin/sh\nexport PYTHONPATH={REPOSITORY}\nexec {sys.executable} {fake_qm.__file__} {self.pve} "$@"\n'
        )
        qm.chmod(0o755)

    def occupy(self) -> int:
        self.pve.mkdir(exist_ok=True)
        return self._stranger(self.pve / f"{self.vmid}.qmp")


@dataclass(kw_only=True)
class LibvirtStage(Stage):
    """A transient domain of libvirt."""

    name: ClassVar[str] = "libvirt"
    daemon: FakeLibvirt = field(init=False)

    def __post_init__(self) -> None:
        folder = self.root / "lv"
        folder.mkdir()
        self.daemon = FakeLibvirt(folder=folder, kind=self.kind)

    def hypervisor(self, settings: QemuSettings) -> Hypervisor:
        definition = LibvirtDefinition(firmware=self.firmware, domain=domain(self.root))
        return LibvirtHypervisor({GUEST: definition}, settings, LibvirtSettings())

    def occupy(self) -> int:
        stranger = "11111111-2222-4333-8444-555555555555"
        text = domain(self.root).replace("</domain>", f"<uuid>{stranger}</uuid>{STRANGERS_SECURITY}</domain>")
        text = text.replace(
            "</os>", f'<loader readonly="yes" stateless="yes" type="pflash">{self.firmware}</loader></os>'
        )
        self.daemon.open("qemu:///system").createXML(text, 1)
        process = self.daemon.domains[stranger].process
        assert process is not None
        return process.pid

    def end(self) -> None:
        self.daemon.end()
        super().end()


STRANGERS_SECURITY = (
    "<launchSecurity type='sev'><cbitpos>51</cbitpos><reducedPhysBits>1</reducedPhysBits><policy>0x000f</policy>"
    f"<dhCert>{base64.b64encode(bytes(2084)).decode()}</dhCert>"
    f"<session>{base64.b64encode(bytes(128)).decode()}</session></launchSecurity>"
)


def domain(root: Path) -> str:
    """The guest's domain, as its definition has it."""
    return f"""\
<domain type='kvm'>
  <name>{GUEST}</name>
  <memory unit='MiB'>256</memory>
  <vcpu>{VCPUS}</vcpu>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>{root}/vmlinuz</kernel>
    <initrd>{root}/initrd</initrd>
    <cmdline>{CMDLINE}</cmdline>
  </os>
  <features><acpi/></features>
  <cpu mode='custom' match='exact' check='none'><model>{CPU}</model></cpu>
  <on_reboot>destroy</on_reboot>
  <devices>
    <serial type='file'><source path='{root}/serial'/></serial>
  </devices>
</domain>
"""


STAGES: dict[str, type[Stage]] = {
    stage.name: stage for stage in (QemuStage, AttachStage, CommandStage, ProxmoxStage, LibvirtStage)
}


@contextmanager
def short_folder() -> Iterator[Path]:
    """A folder short enough for a socket's path."""
    root = Path(tempfile.mkdtemp(prefix="sevattest-"))
    try:
        yield root
    finally:
        shutil.rmtree(root, ignore_errors=True)
