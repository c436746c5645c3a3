"""The agent's configuration: `agent.toml` as types, and the checks that types cannot make.

Every key has a safe default or is required; unknown keys are refused by the loader. docs/host-agent.md has the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import msgspec

from common import config
from common.errors import InvalidInput, Reason
from common.rpc.identity import Role
from common.rpc.tls import ServerTls
from common.telemetry.endpoint import MetricsConfig
from host_agent.devices import DEFAULT_PATH, DEV_SEV, DRIVERS
from host_agent.devices.qmp import QmpDevice
from host_agent.guest_tables import GuestTable, check_distinct, definition
from host_agent.hypervisors.fleet import AnyDefinition
from host_agent.hypervisors.libvirt import LibvirtSettings
from host_agent.hypervisors.memlock import LockLimit, own_limit
from host_agent.hypervisors.monitored import QemuSettings
from host_agent.hypervisors.proxmox import ProxmoxSettings
from host_agent.launches.supervisor import Limits

# A launch's RPCs have 60 s at the most (common/rpc), so no step may take longer.
Seconds = Annotated[float, msgspec.Meta(gt=0, le=50)]
_DAY = 86400.0
# Drivers without a place where everybody has their device.
_SOCKETS = {"socket": "a platform's socket", QmpDevice.name: "a QEMU's monitor"}


class Tls(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[tls]`: how the agent proves itself and whom it serves.

    Attributes:
        cert: PEM file, the agent's certificate, serverAuth.
        key: PEM file, its key, 0600.
        client_ca: PEM file, the datacenter's CA.
        trust_domain: of the orchestrators, and the agent's own.
    """

    cert: Path
    key: Path
    client_ca: Path
    trust_domain: str


class HealthSocket(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[health]`: where probes ask.

    Attributes:
        socket: a unix socket that serves grpc.health.v1 and nothing else; none by default.
    """

    socket: Path | None = None


class DeviceTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[device]`: the platform's SEV device.

    Attributes:
        driver: how it is reached: `dev_sev`, the kernel's device; `socket`, the software platform; `qmp`, a QEMU.
        path: where it is; a socket has no default.
        timeout: seconds that one command may take.
    """

    driver: str
    path: Path = Path(DEFAULT_PATH)
    timeout: Seconds = 10.0


class QemuTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[qemu]`: how machines are started and spoken to.

    Attributes:
        cbitpos: position of the encryption bit, CPUID 8000001F EBX 5:0 (Naples, Rome 47; Milan 51).
        reduced_phys_bits: what QEMU is told of the address bits that encryption costs; it refuses 0.
        start_timeout: seconds from the program's start to its monitor's greeting.
        command_timeout: seconds that one monitor command may take.
        stop_timeout: seconds between SIGTERM and SIGKILL.
        check_memlock: with the driver `dev_sev`, refuse a guest that is larger than what may be locked.
    """

    cbitpos: Annotated[int, msgspec.Meta(ge=0, le=63)] = 51
    reduced_phys_bits: Annotated[int, msgspec.Meta(ge=0, le=63)] = 1
    start_timeout: Seconds = 30.0
    command_timeout: Seconds = 10.0
    stop_timeout: Seconds = 5.0
    check_memlock: bool = True


class ProxmoxTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[proxmox]`: where Proxmox VE is, for guests with the driver `proxmox`.

    Attributes:
        qm: the command.
        run: the agent's own folder; the virtual machine 100 has its files in 100/ below it.
        monitors: where the machines' QMP sockets are.
    """

    qm: Path = ProxmoxSettings.qm
    run: Path = ProxmoxSettings.run
    monitors: Path = ProxmoxSettings.monitors


class LibvirtTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[libvirt]`: where libvirt is, for guests with the driver `libvirt`.

    Attributes:
        uri: of the connection.
    """

    uri: str = LibvirtSettings.uri


class LaunchesTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[launches]`: how long they may take and are kept.

    Attributes:
        lifetime: seconds from StartLaunch to ResumeGuest; what takes longer is ended.
        check_interval: seconds between two looks at a paused guest.
        silent_checks: looks in a row without an answer after which a paused guest's machine is ended.
        retain_days: how long an ended launch can be asked for.
        retain_count: how many ended launches can be asked for.
    """

    lifetime: Annotated[float, msgspec.Meta(ge=1, le=_DAY)] = 900.0
    check_interval: Annotated[float, msgspec.Meta(gt=0, le=3600)] = 5.0
    silent_checks: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 3
    retain_days: Annotated[float, msgspec.Meta(ge=0, le=3650)] = 30.0
    retain_count: Annotated[int, msgspec.Meta(ge=0, le=100_000)] = 1000


class AgentConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`agent.toml`.

    Attributes:
        listen: HOST:PORT; port 0 takes a free one.
        state_dir: the launches' folder.
        tls: identity and callers.
        device: the platform's SEV device.
        health: where probes ask.
        metrics: where metrics are read; without it, nothing is measured.
        qemu: how machines are started.
        proxmox: where Proxmox VE is.
        libvirt: where libvirt is.
        launches: how long they may take and are kept.
        guests: by name.
    """

    listen: str
    state_dir: Path
    tls: Tls
    device: DeviceTable
    health: HealthSocket = HealthSocket()
    metrics: MetricsConfig | None = None
    qemu: QemuTable = QemuTable()
    proxmox: ProxmoxTable = ProxmoxTable()
    libvirt: LibvirtTable = LibvirtTable()
    launches: LaunchesTable = LaunchesTable()
    guests: dict[str, GuestTable] = {}

    def server_tls(self) -> ServerTls:
        """The listener's side of `[tls]`."""
        return ServerTls(
            cert=self.tls.cert,
            key=self.tls.key,
            client_ca=self.tls.client_ca,
            trust_domain=self.tls.trust_domain,
            role=Role.AGENT,
        )

    def definitions(self) -> dict[str, AnyDefinition]:
        """The guests, whichever driver starts them, each one checked.

        Raises:
            InvalidInput: `INVALID_CONFIGURATION`; names the key and says why.
        """
        definitions = {name: definition(name, table, self.state_dir) for name, table in self.guests.items()}
        check_distinct(definitions)
        return definitions

    def qemu_settings(self) -> QemuSettings:
        """`[qemu]` as the hypervisor takes it."""
        return QemuSettings(
            cbitpos=self.qemu.cbitpos,
            reduced_phys_bits=self.qemu.reduced_phys_bits,
            start_timeout=self.qemu.start_timeout,
            command_timeout=self.qemu.command_timeout,
            stop_timeout=self.qemu.stop_timeout,
        )

    def lock_limit(self) -> LockLimit | None:
        """What tells how much memory a machine may lock; None where nobody pins a guest's, or nobody is to look."""
        return own_limit if self.device.driver == DEV_SEV and self.qemu.check_memlock else None

    def started_programs(self) -> dict[str, list[str]]:
        """What the agent itself starts, by guest: machines, and commands that may become one."""
        started = {name: table.program or table.start for name, table in self.guests.items()}
        return {name: words for name, words in started.items() if words}

    def proxmox_settings(self) -> ProxmoxSettings:
        """`[proxmox]` as the hypervisor takes it."""
        return ProxmoxSettings(qm=self.proxmox.qm, run=self.proxmox.run, monitors=self.proxmox.monitors)

    def libvirt_settings(self) -> LibvirtSettings:
        """`[libvirt]` as the hypervisor takes it."""
        return LibvirtSettings(uri=self.libvirt.uri)

    def limits(self) -> Limits:
        """`[launches]` as the supervisor takes it."""
        return Limits(
            lifetime=timedelta(seconds=self.launches.lifetime),
            check_interval=timedelta(seconds=self.launches.check_interval),
            silent_checks=self.launches.silent_checks,
            retain_age=timedelta(days=self.launches.retain_days),
            retain_count=self.launches.retain_count,
        )


def load(path: Path, environ: Mapping[str, str]) -> AgentConfig:
    """Read and check `agent.toml`.

    Raises:
        InvalidInput: `INVALID_CONFIGURATION`; names the key and says why.
    """
    loaded = config.load(path, AgentConfig, environ)
    config.listen_address(loaded.listen)
    drivers = {*DRIVERS, QmpDevice.name}
    if loaded.device.driver not in drivers:
        raise _bad(
            "device.driver",
            f"this version has no driver {loaded.device.driver!r}; it has {', '.join(sorted(drivers))}",
        )
    if loaded.device.path == Path(DEFAULT_PATH) and loaded.device.driver in _SOCKETS:
        what = _SOCKETS[loaded.device.driver]
        raise _bad(
            "device.path", f"{DEFAULT_PATH} is the kernel's device: the {loaded.device.driver} driver wants {what}"
        )
    loaded.definitions()
    return loaded


def _bad(key: str, message: str) -> InvalidInput:
    return InvalidInput(Reason.INVALID_CONFIGURATION, f"{key}: {message}", key=key)
