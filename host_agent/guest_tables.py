"""`[guests.NAME]` of `agent.toml`: one guest as a table, and the definition that its driver wants of it.

Each driver has its own keys; one that belongs to another driver is refused. docs/hypervisors.md has the tables.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import msgspec

from common import wire
from common.errors import InvalidInput, Reason
from host_agent.hypervisors.arguments import check_definition
from host_agent.hypervisors.attach import AttachDefinition
from host_agent.hypervisors.base import GuestDefinition
from host_agent.hypervisors.domain_xml import check_domain
from host_agent.hypervisors.fleet import AnyDefinition
from host_agent.hypervisors.libvirt import LibvirtDefinition
from host_agent.hypervisors.proxmox import ProxmoxDefinition
from host_agent.hypervisors.unit import has_own_scope, is_scope_runner

_DOMAIN_MAX = 1 << 20  # bytes of a domain's XML; libvirt's own are some kilobytes


class GuestTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[guests.NAME]`: one guest. Policy, session and handle are no keys: they come from the owner.

    Attributes:
        firmware: the guest's firmware image, an AmdSev build.
        driver: what starts its machine; the keys below are one driver's each.
        program: qemu: the machine's program (absolute, or a name on the PATH) and its own leading arguments.
        args: qemu: QEMU's arguments, without what the agent adds.
        monitor: attach: where its machine's QMP socket will be.
        inputs: attach: the agent's folder for what the machine is started with.
        start: attach: a command that starts the machine; none where somebody else does.
        vmid: proxmox: the virtual machine's number.
        domain: libvirt: a file with the domain's XML.
    """

    firmware: Path
    driver: str = GuestDefinition.driver
    program: list[str] = []
    args: list[str] = []
    monitor: Path | None = None
    inputs: Path | None = None
    start: list[str] = []
    vmid: Annotated[int, msgspec.Meta(ge=100, le=999_999_999)] | None = None
    domain: Path | None = None


# Driver -> the keys that are its own.
_KEYS: dict[str, frozenset[str]] = {
    GuestDefinition.driver: frozenset({"program", "args"}),
    AttachDefinition.driver: frozenset({"monitor", "inputs", "start"}),
    ProxmoxDefinition.driver: frozenset({"vmid"}),
    LibvirtDefinition.driver: frozenset({"domain"}),
}


def definition(name: str, table: GuestTable, state_dir: Path) -> AnyDefinition:
    """The guest's definition, checked.

    Args:
        name: the guest's.
        table: its table.
        state_dir: the agent's own folder, in which a definition has nothing to look for.

    Raises:
        InvalidInput: `INVALID_CONFIGURATION`; names the key and says why.
    """
    where = f"guests.{name}"
    try:
        wire.name(where, name)
    except InvalidInput as error:
        raise _bad(where, "a guest's name is 1 to 128 of A-Z a-z 0-9 . _ -, not starting with . or -") from error
    _check_keys(where, table)
    if table.driver == GuestDefinition.driver:
        _check_command(f"{where}.program", table.program)
        if is_scope_runner(table.program) and not has_own_scope(table.program):
            raise _bad(
                f"{where}.program", "systemd-run without --scope starts a service, whose process is not the agent's"
            )
    _check_file(f"{where}.firmware", table.firmware)
    match table.driver:
        case AttachDefinition.driver:
            return _attach(where, table, state_dir)
        case ProxmoxDefinition.driver:
            if table.vmid is None:
                raise _bad(f"{where}.vmid", "must be there")
            return ProxmoxDefinition(firmware=table.firmware, vmid=table.vmid)
        case LibvirtDefinition.driver:
            return LibvirtDefinition(firmware=table.firmware, domain=_domain(f"{where}.domain", table.domain))
        case _:
            check_definition(f"{where}.args", table.args, state_dir=_resolved(state_dir))
            return GuestDefinition(program=tuple(table.program), firmware=table.firmware, args=tuple(table.args))


def check_distinct(definitions: Mapping[str, AnyDefinition]) -> None:
    """Refuse two guests that are one machine.

    Raises:
        InvalidInput: `INVALID_CONFIGURATION`; names the second guest's key.
    """
    seen: dict[object, str] = {}
    for name, guest in definitions.items():
        marks: dict[str, object] = {}
        match guest:
            case AttachDefinition():
                marks = {"monitor": _resolved(guest.monitor), "inputs": _resolved(guest.inputs)}
            case ProxmoxDefinition():
                marks = {"vmid": guest.vmid}
            case _:
                pass
        for key, mark in marks.items():
            if (other := seen.setdefault((key, mark), name)) != name:
                raise _bad(f"guests.{name}.{key}", f"{mark} is the guest {other}'s")


def _check_keys(where: str, table: GuestTable) -> None:
    if table.driver not in _KEYS:
        raise _bad(f"{where}.driver", f"there is no driver {table.driver!r}; there are {', '.join(sorted(_KEYS))}")
    for driver, keys in _KEYS.items():
        for key in sorted(keys):
            if driver != table.driver and getattr(table, key) not in (None, []):
                raise _bad(f"{where}.{key}", f"is a key of the driver {driver}, and the guest has {table.driver}")


def _check_command(where: str, command: Sequence[str]) -> None:
    if not command or not command[0]:
        raise _bad(where, "names no program")
    if any("\0" in word for word in command):
        raise _bad(where, "holds a zero byte")
    program = command[0]
    if "/" in program and not Path(program).is_absolute():
        raise _bad(where, f"{program}: must be an absolute path, or a name to be found on the PATH")
    if shutil.which(program) is None:
        raise _bad(where, f"{program}: there is no such program, or it cannot be executed")


def _check_file(where: str, path: Path) -> None:
    try:
        found = path.is_file()
    except OSError as error:  # a folder above it cannot be searched
        raise _bad(where, f"{path}: {error.strerror or error}") from error
    if not found:
        raise _bad(where, f"{path}: there is no such file")


def _resolved(path: Path) -> Path:
    """The path without links. `Path.resolve` raises where they lead in a circle; who opens it will say so."""
    return Path(os.path.realpath(path))


def _attach(where: str, table: GuestTable, state_dir: Path) -> AttachDefinition:
    if table.start:
        _check_command(f"{where}.start", table.start)
    places = {"monitor": table.monitor, "inputs": table.inputs}
    for key, path in places.items():
        if path is None:
            raise _bad(f"{where}.{key}", "must be there")
        if _resolved(path).is_relative_to(_resolved(state_dir)):
            raise _bad(f"{where}.{key}", f"{path}: the agent's own files are there; it must be outside of state_dir")
    assert table.monitor is not None and table.inputs is not None  # noqa: S101, PT018 -- just checked
    return AttachDefinition(
        firmware=table.firmware, monitor=table.monitor, inputs=table.inputs, start=tuple(table.start)
    )


def _domain(where: str, path: Path | None) -> str:
    if path is None:
        raise _bad(where, "must be there")
    try:
        with path.open("rb") as file:
            text = file.read(_DOMAIN_MAX + 1).decode()
    except OSError as error:
        raise _bad(where, f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise _bad(where, f"{path}: is not UTF-8 text") from error
    if len(text) > _DOMAIN_MAX:
        raise _bad(where, f"{path}: is too large for a domain")
    check_domain(where, text)
    return text


def _bad(key: str, message: str) -> InvalidInput:
    return InvalidInput(Reason.INVALID_CONFIGURATION, f"{key}: {message}", key=key)
