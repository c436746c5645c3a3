"""All processes of one site: the software platform, the verifier and the agent, started and ended in order.

Also what the integration tests run against: `restart` brings a service back at the address that it had.
"""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from common.errors import PlatformFailed, Reason
from orchestrator.demo.artefacts import CURRENT, VERSIONS
from orchestrator.demo.processes import Service, end_machine, machine_pid, script, signals_held
from orchestrator.demo.site import AGENT, DATACENTER_DOMAIN, ORCHESTRATOR, OWNER_DOMAIN, VERIFIER, Site

_SETTINGS_PREFIX = "SEVATTEST_"


class Stack:
    """The processes of one site; as a context manager it ends all that were started, whatever happens.

    Attributes:
        site: the folders.
        platforms: the software platforms by state folder.
        verifier: the verifier.
        agent: the host agent.
    """

    def __init__(self, site: Site) -> None:
        self.site = site
        self.platforms: dict[Path, Service] = {}
        self.verifier = self._service("verifier", [*script("sev-verifier"), "serve", "--config", site.verifier_config])
        self.agent = self._service("agent", [*script("sev-host-agent"), "serve", "--config", site.agent_config])
        self._guests: set[str] = set()
        self._tools: list[subprocess.Popen[bytes]] = []
        self._held: dict[str, socket.socket] = {}

    def __enter__(self) -> Self:
        """Make the folders."""
        self.site.make_folders()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End every process that was started, the guests' machines too."""
        for tool in self._tools:
            tool.kill()
            tool.wait()
        self.agent.stop()
        for guest in self._guests:
            self.end_guest(guest)
        self.verifier.stop()
        for platform in self.platforms.values():
            platform.stop()
        for held in self._held.values():
            held.close()

    # -------------------------------------------------------------------------------------------------------- set-up

    def prepare(self, *, progress: Callable[[str], None] = lambda _text: None, impostor: bool = False) -> None:
        """Make identities, keys, artefacts and documents while the platform makes its own keys, then wait for it.

        Args:
            progress: told what is being done.
            impostor: also start a platform whose root the owner does not name.
        """
        site = self.site
        progress("making the software platform's keys")
        self.start_platforms(*([site.platform, site.impostor] if impostor else [site.platform]))
        self._start_firmware_tools()
        progress("making identities for two sites")
        make_identities(site.pki)
        for version in VERSIONS:
            site.artefacts(site.owner, version).write_kernel_and_initrd(site.parts)
        site.write_owner()
        self.wait_prepared()
        for version in VERSIONS:
            site.artefacts(site.owner, version).copy_to(site.host / "artefacts")

    def start_platforms(self, *states: Path) -> None:
        """Start software platforms and let the owner's key file be made; `wait_prepared` waits for them.

        Args:
            states: state folders.
        """
        for state in states:
            self._start_platform(state)
        self._tool([*script("sev-verifier"), "keygen", str(self.site.owner / "kek.bin")])

    def wait_prepared(self) -> None:
        """Wait until every tool has made its file and the platforms serve.

        Raises:
            PlatformFailed: one of them failed.
        """
        self._wait_tools()
        for platform in self.platforms.values():
            platform.wait_ready(60)

    def _wait_tools(self) -> None:
        for tool in self._tools:
            if tool.wait():
                raise PlatformFailed(Reason.INTERNAL, f"a tool ended with {tool.returncode}; see {self.site.logs}")
        self._tools.clear()

    def _start_platform(self, state: Path) -> None:
        command = [*script("sevattest"), "platform", "serve", "--state", str(state)]
        self.platforms[state] = self._service(state.name, command)
        self.platforms[state].start()

    def _start_firmware_tools(self) -> None:
        """Start what makes the firmware images where the distribution has none."""
        site = self.site
        for version in VERSIONS:
            path = site.artefacts(site.owner, version).firmware
            ovmf = site.firmware if version == CURRENT else None
            if ovmf:
                path.write_bytes(ovmf.read_bytes())
            else:
                self._tool([*script("sevattest"), "platform", "firmware", str(path), "--label", f"firmware {version}"])

    def start_services(self, guests: Iterable[str]) -> None:
        """Make the verifier's store, start verifier and agent, whose configurations are in place, until both serve.

        Args:
            guests: the agent's guests, whose machines are ended in the end.
        """
        self._guests |= set(guests)
        # A verifier makes no store by itself: an empty disk must never pass for the right one.
        self._tool([*script("sev-verifier"), "init", "--config", str(self.site.verifier_config)])
        self.agent.start({"SEVATTEST_LISTEN": self._address(self.agent)})
        self._wait_tools()
        self.verifier.start({"SEVATTEST_LISTEN": self._address(self.verifier)})
        for service in (self.verifier, self.agent):
            service.wait_ready()

    def restart(self, service: Service) -> None:
        """Start verifier or agent again after it was stopped or killed, at the address that it had."""
        service.start({"SEVATTEST_LISTEN": self._address(service)})
        service.wait_ready()

    def _address(self, service: Service) -> str:
        """An address of the service's own, also while it is away: a socket that is bound and never listens keeps it."""
        if service.name not in self._held:
            held = socket.socket()
            self._held[service.name] = held
            # The service's own listening socket has this option too, so it may share the address with ours.
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            held.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{self._held[service.name].getsockname()[1]}"

    def _service(self, name: str, command: Iterable[str | Path]) -> Service:
        return Service(name, [str(word) for word in command], logs=self.site.logs, environ=_environment())

    def _tool(self, command: list[str]) -> None:
        log = self.site.logs / "tools.log"
        with log.open("ab") as stderr, signals_held():
            self._tools.append(
                subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stderr, stderr=stderr)  # noqa: S603 -- ours
            )

    # -------------------------------------------------------------------------------------------------------- guests

    def machine_runs(self, guest: str) -> bool:
        """Whether a machine of that guest is there, paused or running."""
        return machine_pid(self.site.pid_file(guest), str(self.site.root)) is not None

    def end_guest(self, guest: str) -> None:
        """End the guest's machine, if there is one."""
        end_machine(self.site.pid_file(guest), str(self.site.root))

    def serial(self, guest: str) -> str:
        """What the guest wrote to its serial line so far."""
        path = self.site.serial(guest)
        return path.read_text(errors="replace") if path.exists() else ""


def make_identities(folder: Path) -> None:
    """Make both sites' authorities and the identities of agent, orchestrator and verifier in `folder`."""
    from common.rpc.identity import Role  # noqa: PLC0415 -- loads gRPC, while the platform makes its keys
    from orchestrator.cli import pki  # noqa: PLC0415 -- the same

    pki.init(folder, datacenter_domain=DATACENTER_DOMAIN, owner_domain=OWNER_DOMAIN)
    for role, name in ((Role.AGENT, AGENT), (Role.ORCHESTRATOR, ORCHESTRATOR), (Role.VERIFIER, VERIFIER)):
        pki.issue(folder, role, name)


def _environment() -> Mapping[str, str]:
    """Our environment without settings of services that somebody else has set."""
    return {name: value for name, value in os.environ.items() if not name.startswith(_SETTINGS_PREFIX)}
