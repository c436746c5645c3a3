"""The parties' folders: who keeps which file, and the configurations and documents in them.

    pki/        both sites' certificate authorities and identities (in earnest: on two machines)
    platform/   the software platform's state, with its root `ask_ark.cert` and its key service's folder
    owner/      the guest owner's: verifier.toml, documents, reference artefacts, the secret
    host/       the datacenter's: agent.toml, the artefacts that guests are started from, their serial output
    logs/       what each process wrote on standard error

Nothing under `owner/` depends on what the host does: `write_owner` is not told.
"""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.demo import dishonest_machine
from orchestrator.demo.artefacts import CURRENT, VERSIONS, Artefacts, installed_ovmf
from orchestrator.demo.guest.parts import GuestParts
from orchestrator.demo.processes import script

DATACENTER_DOMAIN = "datacenter.example"
OWNER_DOMAIN = "owner.example"
AGENT, ORCHESTRATOR, VERIFIER = "host-1", "cluster", "verifier-1"
WORKLOAD = "shop"
GUEST = "web"
SECRET_GUID = "43ced044-42ec-487a-88b7-261bda359f24"  # noqa: S105 -- the entry's name in the secret table
VCPUS = 2
CPU = "EPYC-Milan"
# Where Milan's and Rome's page tables keep the encryption bit; the agent passes it on to the machine.
_CBITPOS = 51


@dataclass(frozen=True, kw_only=True)
class HostPlay:
    """What the host starts guests from; the defaults are what an honest host does.

    Attributes:
        firmware: version of the firmware image.
        kernel: version of kernel.
        cmdline: version of the command line.
        lowered: whether the machine is started without the owner's session and under a lower policy.
    """

    firmware: str = CURRENT
    kernel: str = CURRENT
    cmdline: str = CURRENT
    lowered: bool = False


@dataclass(frozen=True, kw_only=True)
class Site:
    """All folders of one demonstration.

    Attributes:
        root: the folder that holds them.
        parts: what a guest is made of that a real QEMU boots; None where the built-in machine takes its place.
    """

    root: Path
    parts: GuestParts | None = None

    @property
    def firmware(self) -> Path | None:
        """The image that guests of the current version are measured with; None where one is made for the run."""
        return installed_ovmf() if self.parts is None else self.parts.firmware

    @property
    def pki(self) -> Path:
        """Certificate authorities and identities."""
        return self.root / "pki"

    @property
    def platform(self) -> Path:
        """State of the platform that the owner's configuration names."""
        return self.root / "platform"

    @property
    def impostor(self) -> Path:
        """State of a platform that nobody named."""
        return self.root / "impostor"

    @property
    def owner(self) -> Path:
        """The guest owner's folder."""
        return self.root / "owner"

    @property
    def host(self) -> Path:
        """The host's folder."""
        return self.root / "host"

    @property
    def logs(self) -> Path:
        """Standard error of every process."""
        return self.root / "logs"

    @property
    def agent_config(self) -> Path:
        """The agent's configuration."""
        return self.host / "agent.toml"

    @property
    def verifier_config(self) -> Path:
        """The verifier's configuration."""
        return self.owner / "verifier.toml"

    @property
    def secret(self) -> Path:
        """The secret that the guest is to get."""
        return self.owner / "disk-passphrase"

    def serial(self, guest: str) -> Path:
        """What the guest wrote to its serial line."""
        return self.host / f"{guest}.serial"

    def pid_file(self, guest: str) -> Path:
        """The process id of the guest's machine."""
        return self.host / f"{guest}.pid"

    def artefacts(self, folder: Path, version: str) -> Artefacts:
        """One party's copies of one version's artefacts."""
        return Artefacts(folder=folder / "artefacts", version=version)

    def make_folders(self) -> None:
        """Make every party's folder."""
        for folder in (self.root, self.owner, self.host, self.logs):
            folder.mkdir(mode=0o700, exist_ok=True)
        for folder in (self.owner / "artefacts", self.owner / "documents", self.host / "artefacts"):
            folder.mkdir(mode=0o700, exist_ok=True)

    # ------------------------------------------------------------------------------------------- the guest owner's

    def write_owner(self) -> None:
        """Write the verifier's configuration, both versions of the workload, and a fresh secret."""
        self.secret.touch(mode=0o600)
        self.secret.write_text(secrets.token_urlsafe(24))
        for version in VERSIONS:
            document = self.owner / "documents" / f"{WORKLOAD}-{version}.yaml"
            document.write_text(self._workload(self.artefacts(self.owner, version)))
        self.write_verifier()

    def write_verifier(self) -> None:
        """Write the verifier's configuration."""
        pki = "../pki"
        self.verifier_config.write_text(
            f"""\
listen = "127.0.0.1:0"
state_dir = "state"
documents = "documents"
key_file = "kek.bin"

[tls]
cert = "{pki}/verifier-{VERIFIER}.pem"
key = "{pki}/verifier-{VERIFIER}.key"
client_ca = "{pki}/datacenter-ca.pem"
trust_domain = "{DATACENTER_DOMAIN}"

[health]
socket = "health.sock"

# A software platform proves nothing about hardware: its root counts only because it is named here.
[platforms]
extra_roots = ["../platform/ask_ark.cert"]

[kds]
source = "../platform/kds"
"""
        )

    def _workload(self, artefacts: Artefacts) -> str:
        return f"""\
apiVersion: sevattest/v1
kind: Workload
metadata:
  name: {WORKLOAD}
  version: "{artefacts.version}"
spec:
  callers:
    - spiffe://{DATACENTER_DOMAIN}/orchestrator/{ORCHESTRATOR}
  measure:
    firmware: ../artefacts/{artefacts.firmware.name}
    kernel: ../artefacts/{artefacts.kernel.name}
    initrd: ../artefacts/{artefacts.initrd.name}
    cmdline: {quoted(artefacts.cmdline)}
    vcpus: [{VCPUS}]
    cpus: [{CPU}]
    flavours: [legacy]
  platforms:
    generations: [emulated]
    chips: any
  secrets:
    - guid: {SECRET_GUID}
      source:
        file: ../{self.secret.name}
  lifetime: 10m
"""

    # --------------------------------------------------------------------------------------------------- the host's

    def write_host(self, guests: dict[str, HostPlay], platform: Path) -> None:
        """Write the agent's configuration.

        Args:
            guests: by name, what the host starts each from.
            platform: state folder of the software platform that the host shows.
        """
        self.write_agent([self._guest(name, play, platform) for name, play in guests.items()], platform)

    def write_agent(self, guests: Iterable[str], platform: Path, *, start_timeout: int = 30) -> None:
        """Write the agent's configuration around the tables of its guests.

        Args:
            guests: each one's table, as `guest_table` makes it.
            platform: state folder of the software platform that the host shows.
            start_timeout: seconds from a machine's start to its monitor's greeting.
        """
        tables = "\n".join(guests)
        pki = "../pki"
        self.agent_config.write_text(
            f"""\
listen = "127.0.0.1:0"
state_dir = "state"

[tls]
cert = "{pki}/agent-{AGENT}.pem"
key = "{pki}/agent-{AGENT}.key"
client_ca = "{pki}/datacenter-ca.pem"
trust_domain = "{DATACENTER_DOMAIN}"

[health]
socket = "health.sock"

[device]
driver = "socket"
path = {quoted(str(platform / "sev.sock"))}

[qemu]
cbitpos = {_CBITPOS}
reduced_phys_bits = 1
start_timeout = {start_timeout}

{tables}"""
        )

    def _guest(self, name: str, play: HostPlay, platform: Path) -> str:
        firmware = self.artefacts(self.host, play.firmware)
        kernel = self.artefacts(self.host, play.kernel)
        program = ["--builtin"] if self.parts is None else ["--qemu", str(self.parts.qemu)]
        machine = [*script("sevattest"), "platform", "qemu", *program, "--state", str(platform)]
        if play.lowered:
            machine = [sys.executable, "-I", dishonest_machine.__file__, *machine]
        args = [
            *("-name", name, "-accel", "kvm", "-machine", "q35", "-cpu", CPU, "-smp", str(VCPUS), "-m", "512M"),
            *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            *("-kernel", str(kernel.kernel), "-initrd", str(self.artefacts(self.host, CURRENT).initrd)),
            *("-append", self.artefacts(self.host, play.cmdline).cmdline),
            *("-serial", f"file:{self.serial(name)}"),
        ]
        return self.guest_table(name, machine, firmware.firmware, args)

    def guest_table(self, name: str, machine: Sequence[str], firmware: Path, args: Sequence[str]) -> str:
        """One guest in the agent's configuration.

        Args:
            name: the guest's name.
            machine: the machine's program and its own leading arguments.
            firmware: the image that the agent gives it.
            args: QEMU's arguments.
        """
        # The agent leaves a running guest alone when it stops: whoever plays the host must find the machine again.
        program = ["/bin/sh", "-c", 'echo $$ >"$0" && exec "$@"', str(self.pid_file(name)), *machine]
        return f"""\
[guests.{name}]
program = {quoted(program)}
firmware = {quoted(str(firmware))}
args = {quoted(list(args))}
"""


def quoted(value: str | list[str]) -> str:
    """A string or list of strings as TOML and YAML both spell it."""
    return json.dumps(value, ensure_ascii=False)
