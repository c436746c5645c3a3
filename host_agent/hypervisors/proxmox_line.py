"""What a virtual machine's command line must look like on Proxmox VE before an attested launch, and what to change.

`qm showcmd` prints the line that `qm start` will run. The launch's own part of it is the file that `args:` names (see
`inputs.py`); the rest is the machine's configuration, checked by the same rules as a definition's arguments
(`arguments.py`). Pure code. Facts: qemu-server, src/PVE/QemuServer.pm (config_to_command, vm_start_nolock),
src/PVE/QemuServer/USB.pm, src/test/cfg2cmd/*.cmd and src/PVE/CLI/qm.pm (showcmd); `--pretty` breaks lines inside
quoted words as well, so it is for people only.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import PurePath

from common.errors import InvalidInput, Reason
from host_agent.hypervisors.arguments import check_options

# What Proxmox VE says and a definition may not: the process is found by its monitor, and the file is the agent's own.
_PROXMOX_FLAGS = frozenset({"daemonize"})
_PROXMOX_VALUES = frozenset({"id", "readconfig"})
# The buses of a q35 machine and the USB controllers of an older i440fx one come from files of the package. They hold
# devices only, and whoever can replace them can replace qm as well.
_PROXMOX_FILES = re.compile(r"/usr/share/qemu-server/pve-[A-Za-z0-9.-]+\.cfg")
_ADVICE = (
    ("sev-", "qm set {vmid} --delete amd-sev"),
    ("pflash", "qm set {vmid} --bios seabios --delete efidisk0"),
)


def check_line(vmid: int, text: str, *, monitor: PurePath, launch_file: PurePath) -> None:
    """Check what `qm showcmd VMID` printed.

    Args:
        vmid: the machine's number.
        text: the output.
        monitor: where its QMP socket must be.
        launch_file: what `args:` must name.

    Raises:
        InvalidInput: `INVALID_CONFIGURATION`; says what to change, as a command.
    """
    try:
        words = shlex.split(text)
    except ValueError:
        words = []
    if not words or not words[0].startswith("/"):
        raise _refused(vmid, "qm showcmd printed no command line")
    arguments = words[1:]
    try:
        found = check_options(f"vm {vmid}", arguments, flags=_PROXMOX_FLAGS, values=_PROXMOX_VALUES)
    except InvalidInput as error:
        hint = next((advice for sign, advice in _ADVICE if sign in error.message), None)
        fields = {"hint": hint.format(vmid=vmid)} if hint else {}
        raise InvalidInput(Reason.INVALID_CONFIGURATION, error.message, **fields) from error
    if "S" not in (name for name, _ in found):
        raise _refused(vmid, "would not start paused", f"qm set {vmid} --freeze 1")
    files = [value for name, value in found if name == "readconfig"]
    if files[-1:] != [str(launch_file)] or not all(_PROXMOX_FILES.fullmatch(file) for file in files[:-1]):
        raise _refused(
            vmid,
            f"is not started with the launch's file {launch_file}, once, last, and with no other than Proxmox VE's own",
            f"qm set {vmid} --args '-readconfig {launch_file}', with what else the guest needs",
        )
    if not _has_monitor(found, monitor):
        raise _refused(vmid, f"has no QMP monitor at {monitor}")


def _has_monitor(found: Sequence[tuple[str, str]], monitor: PurePath) -> bool:
    return any(name == "chardev" and f"path={monitor}" in value.split(",") for name, value in found)


def _refused(vmid: int, why: str, hint: str | None = None) -> InvalidInput:
    fields = {"hint": hint} if hint else {}
    return InvalidInput(Reason.INVALID_CONFIGURATION, f"vm {vmid} {why}", **fields)
