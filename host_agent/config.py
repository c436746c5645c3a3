"""The agent's configuration: `agent.toml` as types, and the checks that types cannot make.

Every key has a safe default or is required; unknown keys are refused by the loader. docs/host-agent.md has the table.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import msgspec

from common import config, wire
from common.errors import InvalidInput, Reason
from common.rpc.identity import Role
from common.rpc.tls import ServerTls
from host_agent.devices import DEFAULT_PATH, DRIVERS
from host_agent.hypervisors.arguments import check_definition
from host_agent.hypervisors.base import GuestDefinition
from host_agent.hypervisors.qemu import QemuSettings
from host_agent.launches.supervisor import Limits

# A launch's RPCs have 60 s at the most (common/rpc), so no step may take longer.
Seconds = Annotated[float, msgspec.Meta(gt=0, le=50)]
_DAY = 86400.0


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
        driver: how it is reached: `dev_sev`, the kernel's device; `socket`, the software platform.
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
        reduced_phys_bits: physical address bits that encryption costs, EBX 11:6.
        start_timeout: seconds from the program's start to its monitor's greeting.
        command_timeout: seconds that one monitor command may take.
        stop_timeout: seconds between SIGTERM and SIGKILL.
    """

    cbitpos: Annotated[int, msgspec.Meta(ge=0, le=63)] = 51
    reduced_phys_bits: Annotated[int, msgspec.Meta(ge=0, le=63)] = 1
    start_timeout: Seconds = 30.0
    command_timeout: Seconds = 10.0
    stop_timeout: Seconds = 5.0


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


class GuestTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[guests.NAME]`: one guest. Policy, session and handle are no keys: they come from the owner.

    Attributes:
        program: the machine's program (absolute, or a name on the PATH) and its own leading arguments.
        firmware: the guest's firmware image, an AmdSev build.
        args: QEMU's arguments, without what the agent adds.
    """

    program: list[str]
    firmware: Path
    args: list[str] = []


class AgentConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`agent.toml`.

    Attributes:
        listen: HOST:PORT; port 0 takes a free one.
        state_dir: the launches' folder.
        tls: identity and callers.
        device: the platform's SEV device.
        health: where probes ask.
        qemu: how machines are started.
        launches: how long they may take and are kept.
        guests: by name.
    """

    listen: str
    state_dir: Path
    tls: Tls
    device: DeviceTable
    health: HealthSocket = HealthSocket()
    qemu: QemuTable = QemuTable()
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

    def definitions(self) -> dict[str, GuestDefinition]:
        """The guests, each one checked.

        Raises:
            InvalidInput: `INVALID_CONFIGURATION`; names the key and says why.
        """
        return {name: _definition(name, table, self.state_dir) for name, table in self.guests.items()}

    def qemu_settings(self) -> QemuSettings:
        """`[qemu]` as the hypervisor takes it."""
        return QemuSettings(
            cbitpos=self.qemu.cbitpos,
            reduced_phys_bits=self.qemu.reduced_phys_bits,
            start_timeout=self.qemu.start_timeout,
            command_timeout=self.qemu.command_timeout,
            stop_timeout=self.qemu.stop_timeout,
        )

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
    if loaded.device.driver not in DRIVERS:
        raise _bad(
            "device.driver",
            f"this version has no driver {loaded.device.driver!r}; it has {', '.join(sorted(DRIVERS))}",
        )
    if loaded.device.driver == "socket" and loaded.device.path == Path(DEFAULT_PATH):
        raise _bad("device.path", f"{DEFAULT_PATH} is the kernel's device: the socket driver wants a platform's socket")
    loaded.definitions()
    return loaded


def _definition(name: str, table: GuestTable, state_dir: Path) -> GuestDefinition:
    where = f"guests.{name}"
    try:
        wire.name(where, name)
    except InvalidInput as error:
        raise _bad(where, "a guest's name is 1 to 128 of A-Z a-z 0-9 . _ -, not starting with . or -") from error
    if not table.program or not table.program[0]:
        raise _bad(f"{where}.program", "names no program")
    if any("\0" in word for word in table.program):
        raise _bad(f"{where}.program", "holds a zero byte")
    program = table.program[0]
    if "/" in program and not Path(program).is_absolute():
        raise _bad(f"{where}.program", f"{program}: must be an absolute path, or a name to be found on the PATH")
    if shutil.which(program) is None:
        raise _bad(f"{where}.program", f"{program}: there is no such program, or it cannot be executed")
    if not table.firmware.is_file():
        raise _bad(f"{where}.firmware", f"{table.firmware}: there is no such file")
    check_definition(f"{where}.args", table.args, state_dir=state_dir.resolve())
    return GuestDefinition(program=tuple(table.program), firmware=table.firmware, args=tuple(table.args))


def _bad(key: str, message: str) -> InvalidInput:
    return InvalidInput(Reason.INVALID_CONFIGURATION, f"{key}: {message}", key=key)
