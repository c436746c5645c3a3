"""The agent's own place: configuration, certificate, folder, unit and clock.

Sources: proc(5) for mountinfo, adjtimex(2). The folder is looked at, never made.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from common.errors import SevattestError
from common.rpc.tls import ServerTls, load_server
from host_agent.doctor.findings import Finding, failed, passed, skipped, warned
from host_agent.doctor.machine import Machine, Unreadable
from host_agent.hypervisors import unit

_REMOTE = ("nfs", "cifs", "smb", "9p", "ceph", "glusterfs", "lustre", "gpfs", "afs", "ocfs2", "gfs2", "fuse")
_FORGETFUL = ("tmpfs", "ramfs")
_OCTAL = re.compile(r"\\([0-7]{3})")  # how mountinfo writes a space
_SLACK = timedelta(minutes=10)  # what two hosts' clocks may differ by


def certificate(tls: ServerTls, now: datetime) -> Finding:
    """Whether the agent's certificate can be used now."""
    try:
        identity = load_server(tls, now).identity
    except SevattestError as error:
        return failed("agent.certificate", error.message, "make or renew it (`sevattest pki`), and see clock.sane")
    return passed("agent.certificate", str(identity))


def clock(machine: Machine, *, now: datetime, written: datetime | None) -> Finding:
    """Whether the clock can be right.

    Args:
        machine: whose clock it is.
        now: what it says.
        written: when the configuration was last changed, which cannot lie ahead; None without one.
    """
    advice = "keep the clock with chrony or systemd-timesyncd: certificates and launches live by it"
    said = f"{now.astimezone(UTC):%Y-%m-%d %H:%M} UTC"
    if written is not None and written > now + _SLACK:
        seen = f"{said}, but the configuration was changed at {written.astimezone(UTC):%Y-%m-%d %H:%M} UTC"
        return failed("clock.sane", seen, advice)
    synchronised = machine.clock_is_synchronised()
    if synchronised is None:
        return skipped("clock.sane", f"{said}; the kernel does not say whether it is kept right", advice)
    if not synchronised:
        return warned("clock.sane", f"{said}, but nothing keeps it right", advice)
    return passed("clock.sane", f"{said}, kept right")


def state_dir(machine: Machine, folder: Path) -> Iterator[Finding]:
    """Whether the launches' folder is the agent's alone, and on a disk of this host."""
    there = folder
    try:
        while not there.exists() and there != there.parent:
            there = there.parent
        yield _private(folder) if there == folder else _to_be_made(folder, there)
    except OSError as error:
        advice = f"run this as the agent's user, and let it search the folders above {folder}"
        yield failed("state_dir.private", f"{folder} cannot be looked at: {error.strerror}", advice)
        yield skipped("state_dir.local", f"{folder} cannot be looked at")
        return
    try:
        table = machine.text("/proc/self/mountinfo")
    except OSError as error:
        yield skipped("state_dir.local", f"/proc/self/mountinfo cannot be read: {error.strerror}")
        return
    kind = _file_system(table, there.resolve())
    advice = "put state_dir on a disk of this host: records are written, synced and locked before each step"
    if kind.startswith(_REMOTE):
        yield failed("state_dir.local", f"{folder} is on {kind}", advice)
    elif kind in _FORGETFUL:
        yield warned("state_dir.local", f"{folder} is on {kind}, which forgets at a reboot, as machines do", advice)
    else:
        yield passed("state_dir.local", f"{folder} is on {kind or 'a file system without a name'}")


def machines_outlive(machine: Machine, programs: Mapping[str, Sequence[str]]) -> Finding:
    """Whether the machines go on when the service ends that this runs in.

    Args:
        machine: where it runs.
        programs: by guest, what the agent starts.
    """
    probe, guests = "agent.unit", unit.at_risk(programs)
    if not guests:
        return passed(probe, "no machine is in the agent's own unit")
    try:
        service = unit.service_of(machine.text("/proc/self/cgroup"))
    except OSError as error:
        return skipped(probe, f"/proc/self/cgroup cannot be read: {error.strerror}")
    if service is None:
        return skipped(
            probe, "this command runs in no service of systemd's", "the agent says it in its log at its start"
        )
    try:
        mode = unit.kill_mode(machine.run(service.question))
    except Unreadable as error:
        return skipped(probe, error.message)
    if mode is None:
        return skipped(probe, f"systemd does not say how it ends {service.name}")
    seen = f"{service.name} has KillMode={mode}"
    if unit.takes_along(mode):
        return warned(probe, f"{seen}: these guests' machines end with the agent: {', '.join(guests)}", unit.ADVICE)
    return passed(probe, f"{seen}: machines outlive the agent")


def _private(folder: Path) -> Finding:
    info = folder.stat()
    mode = stat.S_IMODE(info.st_mode)
    advice = f"run this as the agent's user; `chown` and `chmod 700 {folder}`"
    if not stat.S_ISDIR(info.st_mode):
        return failed("state_dir.private", f"{folder} is no folder", "name a folder in agent.toml")
    if info.st_uid != os.geteuid() and os.geteuid() != 0:
        return failed("state_dir.private", f"{folder} belongs to uid {info.st_uid}, not to this user", advice)
    if mode & 0o022:
        return failed("state_dir.private", f"{folder} has mode {mode:04o}: others may write into it", advice)
    if mode & 0o055:
        return warned("state_dir.private", f"{folder} has mode {mode:04o}: others may look into it", advice)
    return passed("state_dir.private", f"{folder} has mode {mode:04o}")


def _to_be_made(folder: Path, parent: Path) -> Finding:
    if os.access(parent, os.W_OK | os.X_OK, effective_ids=True):
        return passed("state_dir.private", f"{folder} is not there yet; the agent will make it")
    advice = f"make {folder} for the agent's user, mode 0700"
    return failed("state_dir.private", f"{folder} is not there, and this user cannot make it", advice)


def _file_system(table: str, path: Path) -> str:
    """The file system on which `path` is: the type of the longest mount point above it, the last where several are."""
    best, kind = -1, ""
    for line in table.splitlines():
        left, _, right = line.partition(" - ")
        words = left.split()
        if len(words) < 5 or not right:
            continue
        point = _OCTAL.sub(lambda escape: chr(int(escape[1], 8)), words[4])
        if path.is_relative_to(point) and len(point) >= best:
            best, kind = len(point), right.split()[0]
    return kind
