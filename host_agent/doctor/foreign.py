"""Guests that somebody else starts: whether the agent reaches who starts them, and the folders that both share.

What is looked at is what the drivers do at a launch: `hypervisors/inputs.py` for the folder of the owner's files,
`hypervisors/libvirt_calls.py` for the connection, which is opened and asked for a version.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path

from common.errors import SevattestError
from host_agent.config import AgentConfig
from host_agent.doctor.findings import Finding, failed, passed, skipped
from host_agent.guest_tables import GuestTable
from host_agent.hypervisors.attach import AttachDefinition
from host_agent.hypervisors.libvirt import LibvirtDefinition
from host_agent.hypervisors.libvirt_calls import LibvirtCalls, NoDomain
from host_agent.hypervisors.proxmox import ProxmoxDefinition

_AS_AGENT = "run this as the agent's user"
_OLDEST_LIBVIRT = 8_006_000  # 8.6.0, the first that takes firmware without variables (`stateless`)


async def probe(agent: AgentConfig) -> AsyncIterator[Finding]:
    """What the guests of the drivers `attach`, `proxmox` and `libvirt` need of this host."""
    drivers = {table.driver for table in agent.guests.values()}
    if ProxmoxDefinition.driver in drivers:
        yield _qm(agent.proxmox.qm)
    for name, table in sorted(agent.guests.items()):
        for finding in _folders(f"guest.{name}", _places(agent, table)):
            yield finding
    if LibvirtDefinition.driver in drivers:
        yield await _libvirt(agent.libvirt.uri, agent.qemu.command_timeout)


def _places(agent: AgentConfig, table: GuestTable) -> Mapping[str, Path]:
    """The folder for the owner's files and the one with the machine's monitor; none where the driver has none."""
    if table.driver == ProxmoxDefinition.driver and table.vmid is not None:
        return {"inputs": agent.proxmox.run / str(table.vmid), "monitors": agent.proxmox.monitors}
    if table.driver == AttachDefinition.driver and table.inputs is not None and table.monitor is not None:
        return {"inputs": table.inputs, "monitors": table.monitor.parent}
    return {}


def _folders(where: str, places: Mapping[str, Path]) -> Iterator[Finding]:
    if places:
        yield _inputs(f"{where}.inputs", places["inputs"])
        yield _monitors(f"{where}.monitor_folder", places["monitors"])


def _inputs(probe_id: str, folder: Path) -> Finding:
    """As `Inputs.prepare` will judge it; it is not made here."""
    try:
        found = folder.lstat()
    except FileNotFoundError:
        there = next(parent for parent in folder.parents if os.path.lexists(parent))
        if os.access(there, os.W_OK | os.X_OK, effective_ids=True):
            return passed(probe_id, f"{folder} is not there yet; the agent will make it")
        advice = f"make {folder} for the agent's user, mode 0700 (in a unit: RuntimeDirectory=)"
        return failed(probe_id, f"{folder} is not there, and this user cannot make it", advice)
    except OSError as error:
        return failed(probe_id, f"{folder} cannot be looked at: {error.strerror}", _AS_AGENT)
    mode = stat.S_IMODE(found.st_mode)
    advice = f"{_AS_AGENT}; `chown` and `chmod 700 {folder}`"
    if not stat.S_ISDIR(found.st_mode):
        return failed(probe_id, f"{folder} is no folder", "take it away; the agent makes it")
    if found.st_uid != os.geteuid() == 0:
        return skipped(
            probe_id, f"{folder} belongs to uid {found.st_uid}, and this is root; is it the agent's?", _AS_AGENT
        )
    if found.st_uid != os.geteuid():
        return failed(probe_id, f"{folder} belongs to uid {found.st_uid}, not to this user", advice)
    if mode & 0o077:
        return failed(probe_id, f"{folder} has mode {mode:04o}: the agent refuses a folder that others may use", advice)
    return passed(probe_id, f"{folder} has mode {mode:04o}")


def _monitors(probe_id: str, folder: Path) -> Finding:
    try:
        folder.stat()
    except FileNotFoundError:
        return skipped(probe_id, f"{folder} is not there yet: who starts the machine makes it")
    except OSError as error:
        return failed(probe_id, f"{folder} cannot be looked at: {error.strerror}", _AS_AGENT)
    if not os.access(folder, os.X_OK, effective_ids=True):
        return failed(probe_id, f"this user may not reach a socket in {folder}", _AS_AGENT)
    return passed(probe_id, f"sockets in {folder} can be reached")


def _qm(program: Path) -> Finding:
    found = shutil.which(program)
    if found is None:
        advice = "run the agent on the Proxmox VE host itself, as root, or set proxmox.qm"
        return failed("proxmox.qm", f"{program}: there is no such program, or this user may not run it", advice)
    return passed("proxmox.qm", f"{found} can be run")


async def _libvirt(uri: str, limit: float) -> Finding:
    probe_id = "libvirt.connection"
    calls = LibvirtCalls(uri, limit)
    try:
        version = int(await calls.run("its version", lambda connection: connection.getLibVersion()))
    except NoDomain:
        return failed(probe_id, f"{uri} does not tell its version", "look at the daemon's log")
    except SevattestError as error:
        advice = error.fields.get(
            "hint", f"is the daemon up, and is this user in the group libvirt? `virsh -c {uri} uri`"
        )
        return failed(probe_id, error.message, advice)
    finally:
        calls.close()
    text = f"libvirt {version // 1_000_000}.{version // 1000 % 1000}.{version % 1000} at {uri}"
    if version < _OLDEST_LIBVIRT:
        return failed(probe_id, text, "use libvirt 8.6 or newer: older ones want variables beside a firmware")
    return passed(probe_id, text)
