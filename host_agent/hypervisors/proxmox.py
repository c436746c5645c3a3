"""A virtual machine of Proxmox VE: started by `qm`, met at its QMP socket.

One line in the machine's configuration makes it an attested guest, and never changes:
`args: -readconfig RUN/VMID/launch.cfg`, beside `freeze: 1`. The rest is `attach.py`.

There are two ways to a launch. Somebody launches the guest at the agent: then the agent runs `qm start`. Or somebody
starts the machine (GUI, API, autostart): then the hookscript (host_agent/hookscript/) asks for the launch in its phase
pre-start, and `qm start` is under way already and holds the machine's configuration lock, so the agent must not run
another one. The hookscript says so by a lock on RUN/VMID/starting, which the kernel lets go of when the hook ends.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from common.errors import PlatformFailed, Reason
from host_agent.firmware_errors import printable
from host_agent.hypervisors.arguments import LAUNCH_FILE
from host_agent.hypervisors.attach import AttachDefinition, expect, find_again, sweep_up
from host_agent.hypervisors.base import Machine, StartOrder, Trace
from host_agent.hypervisors.guests import Guests
from host_agent.hypervisors.monitored import QemuSettings
from host_agent.hypervisors.proxmox_line import check_line

STARTING = "starting"
# The agent's files are its own only (umask 077); qm makes folders on its way, for tasks' logs, that others read.
_AS_AN_ADMINISTRATOR = ("/bin/sh", "-c", 'umask 022 && exec "$@"', "sh")
_LINE_MAX = 1 << 20  # bytes of a command line; the kernel's own limit is some 2 MiB


@dataclass(frozen=True, kw_only=True)
class ProxmoxDefinition:
    """A virtual machine, already checked.

    Attributes:
        firmware: the guest's firmware image.
        vmid: its number.
    """

    driver: ClassVar[str] = "proxmox"
    firmware: Path
    vmid: int


@dataclass(frozen=True, kw_only=True)
class ProxmoxSettings:
    """Where Proxmox VE is.

    Attributes:
        qm: the command.
        run: the agent's own folder, with one for each machine below it.
        monitors: where the machines' QMP sockets are.
    """

    qm: Path = Path("/usr/sbin/qm")
    run: Path = Path("/run/sevattest")
    monitors: Path = Path("/var/run/qemu-server")


class ProxmoxHypervisor(Guests[ProxmoxDefinition]):
    """Has the guests of the configuration started by Proxmox VE."""

    def __init__(
        self, guests: Mapping[str, ProxmoxDefinition], settings: QemuSettings, proxmox: ProxmoxSettings
    ) -> None:
        super().__init__(guests)
        self._settings = settings
        self._proxmox = proxmox

    async def create(self, order: StartOrder) -> Machine:
        """See `Hypervisor`."""
        definition = self.definition(order.guest)
        vmid, proxmox = definition.vmid, self._proxmox
        inputs = proxmox.run / str(vmid)
        monitor = proxmox.monitors / f"{vmid}.qmp"
        line = await self._showcmd(vmid)
        check_line(vmid, line, monitor=monitor, launch_file=inputs / LAUNCH_FILE)
        place = AttachDefinition(
            firmware=definition.firmware,
            monitor=monitor,
            inputs=inputs,
            start=() if is_starting(inputs) else (*_AS_AN_ADMINISTRATOR, str(proxmox.qm), "start", str(vmid)),
        )
        return await expect(place, order, self._settings)

    async def find(self, trace: Trace) -> Machine | None:
        """See `Hypervisor`."""
        return find_again(trace, self._settings)

    async def sweep(self, trace: Trace) -> None:
        """See `Hypervisor`."""
        await sweep_up(trace)

    async def _showcmd(self, vmid: int) -> str:
        """The command line that `qm start` would run.

        Raises:
            PlatformFailed: `HYPERVISOR_FAILED`; qm fails, or gives no answer in time.
        """
        try:
            child = await asyncio.create_subprocess_exec(
                str(self._proxmox.qm),
                "showcmd",
                str(vmid),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                limit=_LINE_MAX,
            )
        except OSError as error:
            raise _failed(f"{self._proxmox.qm} cannot be run: {error.strerror or error}") from error
        try:
            async with asyncio.timeout(self._settings.start_timeout):
                out, err = await child.communicate()
        except TimeoutError:
            raise _failed(f"qm showcmd {vmid} gave no answer in {self._settings.start_timeout:g} s") from None
        finally:
            if child.returncode is None:
                with suppress(ProcessLookupError):
                    child.kill()
                await child.wait()
        if child.returncode != 0:
            said = printable(err.decode(errors="replace"))
            raise _failed(f"qm showcmd {vmid} failed (exit code {child.returncode}): {said}")
        return out.decode(errors="replace")


def is_starting(inputs: Path) -> bool:
    """Whether a hookscript holds its lock: `qm start` is under way."""
    try:
        descriptor = os.open(inputs / STARTING, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _failed(why: str) -> PlatformFailed:
    return PlatformFailed(Reason.HYPERVISOR_FAILED, why)
