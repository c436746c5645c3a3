"""Proxmox VE's `qm` as far as a launch needs it: `showcmd`, `start`, `stop`, and the order of things in `start`.

    fake_qm.py STATE showcmd VMID [--pretty] | start VMID | stop VMID

STATE is a folder: `VMID.conf` as in /etc/pve/qemu-server, `kvm.json` with the words that run a machine in place of
/usr/bin/kvm, `lock-VMID`, `calls` (a line for each run of the command), `tasks` (one for each thing that was done), and
the sockets as in /var/run/qemu-server.

Facts, from qemu-server (src/PVE/QemuServer.pm, vm_start_nolock and config_to_command; src/test/cfg2cmd/*.cmd) and
pve-guest-common (GuestHelpers.pm, exec_hookscript): the configuration is read, under its lock, before the hookscript's
pre-start, so what a hook changes in it does not count; a failing pre-start ends the start; QEMU daemonizes; a failing
post-start is a warning. `args:` comes last on the line; `freeze: 1` is -S. A q35 machine has `-readconfig` of a file of
Proxmox VE's own, an older i440fx one with a USB device has another.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from tests.support.machine_kinds import expanded, merged

_LOCK_TIMEOUT = 10.0  # seconds, as qm has
_START_TIMEOUT = 30.0
_PROXMOX_ONLY = {"-id", "-chardev", "-mon", "-pidfile", "-smbios", "-boot", "-vnc", "-device", "-global", "-iscsi"}
_SHARE = "/usr/share/qemu-server"
# What a machine type brings along, in the order of the line.
_Q35_HOTPLUG = ["-global", "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off"]
_Q35 = [
    *("-global", "ICH9-LPC.disable_s3=1", "-global", "ICH9-LPC.disable_s4=1"),
    *("-readconfig", f"{_SHARE}/pve-q35-4.0.cfg"),
    *("-device", "usb-tablet,id=tablet,bus=ehci.0,port=1", "-device", "VGA,id=vga,bus=pcie.0,addr=0x1"),
]
_I440FX = [
    *("-global", "PIIX4_PM.disable_s3=1", "-global", "PIIX4_PM.disable_s4=1"),
    *("-device", "pci-bridge,id=pci.1,chassis_nr=1,bus=pci.0,addr=0x1e"),
    *("-device", "pci-bridge,id=pci.2,chassis_nr=2,bus=pci.0,addr=0x1f"),
    *("-device", "piix3-usb-uhci,id=uhci,bus=pci.0,addr=0x1.0x2"),
    *("-device", "usb-tablet,id=tablet,bus=uhci.0,port=1", "-device", "VGA,id=vga,bus=pci.0,addr=0x2"),
]
_I440FX_USB = ["-readconfig", f"{_SHARE}/pve-usb.cfg"]
_FLASH_FILE = {"driver": "file", "filename": "/usr/share/pve-edk2-firmware//OVMF_CODE_4M.fd"}
_FLASH = [
    "-blockdev",
    json.dumps({"driver": "raw", "file": _FLASH_FILE, "node-name": "pflash0", "read-only": True}),
]
_FLASH_MACHINE = ["pflash0=pflash0"]


class Qm:
    """One run of the command."""

    def __init__(self, state: Path, vmid: str) -> None:
        self._state = state
        self._vmid = vmid
        self._pid_file = state / f"{vmid}.pid"
        self._conf: dict[str, str] = {}

    def showcmd(self, *, pretty: bool) -> None:
        """Print the command line."""
        self._load()
        line = shlex.join(self._command())
        sys.stdout.write((line.replace(" -", " \\\n  -") if pretty else line) + "\n")

    def start(self) -> int:
        """Start the machine; its configuration stays locked until this is done."""
        with (self._state / f"lock-{self._vmid}").open("w") as lock:
            if not _locked(lock.fileno()):
                _complain(f"can't lock file 'lock-{self._vmid}.conf' - got timeout")
                return 255
            self._load()
            if self._running() is not None:
                _complain(f"VM {self._vmid} already running")
                return 255
            if not self._hook("pre-start"):
                _complain(f"hookscript error for {self._vmid} on pre-start")
                return 255
            code = self._run_kvm()
            if code != 0:
                _complain(f"start failed: QEMU exited with code {code}")
                return 255
            if not self._hook("post-start"):
                _complain(f"hookscript error for {self._vmid} on post-start")
            return 0

    def stop(self) -> int:
        """End the machine."""
        pid = self._running()
        if pid is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return 0

    def _load(self) -> None:
        text = (self._state / f"{self._vmid}.conf").read_text()
        self._conf = dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)

    def _command(self) -> list[str]:
        conf, vmid, run = self._conf, self._vmid, self._state
        machine = conf.get("machine", "q35")
        sev = "amd-sev" in conf
        options = [*(_FLASH_MACHINE if conf.get("bios") == "ovmf" else []), f"type={machine}+pve0"]
        return [
            *("/usr/bin/kvm", "-id", vmid, "-name", f"{conf['name']},debug-threads=on", "-no-shutdown"),
            *("-chardev", f"socket,id=qmp,path={run}/{vmid}.qmp,server=on,wait=off"),
            *("-mon", "chardev=qmp,mode=control"),
            *("-chardev", "socket,id=qmp-event,path=/var/run/qmeventd.sock,reconnect-ms=5000"),
            *("-mon", "chardev=qmp-event,mode=control"),
            *("-pidfile", f"{run}/{vmid}.pid", "-daemonize"),
            *("-smbios", "type=1,uuid=7b10d7af-b932-4c66-b2c3-3996152ec465"),
            *(_FLASH if conf.get("bios") == "ovmf" else []),
            *(_Q35_HOTPLUG if "q35" in machine else []),
            *("-smp", "{0},sockets=1,cores={0},maxcpus={0}".format(conf.get("cores", "1")), "-nodefaults"),
            *("-boot", "menu=on,strict=on,reboot-timeout=1000,splash=/usr/share/qemu-server/bootsplash.jpg"),
            *("-vnc", f"unix:{run}/{vmid}.vnc,password=on", "-cpu", conf.get("cpu", "kvm64"), "-m", conf["memory"]),
            *(["-S"] if conf.get("freeze") == "1" else []),
            *(_Q35 if "q35" in machine else [*_I440FX, *(_I440FX_USB if "usb0" in conf else [])]),
            *("-device", "virtio-balloon-pci,id=balloon0,bus=pci.0,addr=0x3,free-page-reporting=on"),
            *("-iscsi", "initiator-name=iqn.1993-08.org.debian:01:aabbccddeeff"),
            *(["-object", "sev-guest,id=sev0,cbitpos=51,reduced-phys-bits=6,policy=0x8"] if sev else []),
            *("-machine", ",".join([*options, *(["confidential-guest-support=sev0"] if sev else [])])),
            *shlex.split(conf.get("args", "")),
        ]

    def _run_kvm(self) -> int:
        """Run the program in QEMU's place, which is no daemon; wait as for one that is."""
        self._note("kvm")
        program: list[str] = json.loads((self._state / "kvm.json").read_text())
        monitor = self._state / f"{self._vmid}.qmp"
        monitor.unlink(missing_ok=True)
        with (self._state / "kvm.log").open("w+b") as log:
            process = subprocess.Popen(
                [*program, *self._translated()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            deadline = time.monotonic() + _START_TIMEOUT
            while not monitor.exists() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.01)
            if process.poll() is not None:
                sys.stderr.write((self._state / "kvm.log").read_text())
                return process.returncode
            self._pid_file.write_text(str(process.pid))
        return 0

    def _translated(self) -> list[str]:
        """The line for programs that know less than Proxmox VE's QEMU."""
        words: list[str] = []
        line = self._command()[1:]
        own = [index for index, word in enumerate(line) if word.startswith(f"{_SHARE}/pve-")]
        given = iter(expanded([word for index, word in enumerate(line) if not {index, index + 1} & set(own)]))
        for word in given:
            if word in _PROXMOX_ONLY:
                next(given)
            elif word not in {"-daemonize", "-no-shutdown"}:
                words.append(word.replace("+pve0", ""))
        return merged([*words, "-qmp", f"unix:{self._state / f'{self._vmid}.qmp'},server=on,wait=off"])

    def _hook(self, phase: str) -> bool:
        script = self._conf.get("hookscript")
        if script is None:
            return True
        self._note(phase)
        # Its output is read until nobody holds the pipe any more, as PVE::Tools::run_command does.
        done = subprocess.run(
            [script, self._vmid, phase], check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        sys.stdout.buffer.write(done.stdout)
        return done.returncode == 0

    def _running(self) -> int | None:
        try:
            pid = int(self._pid_file.read_text())
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (OSError, ValueError):
            return None
        return None if state in "ZX" else pid

    def _note(self, what: str) -> None:
        with (self._state / "tasks").open("a") as tasks:
            tasks.write(f"{what}\n")


def _complain(sentence: str) -> None:
    sys.stderr.write(f"{sentence}\n")


def _locked(descriptor: int) -> bool:
    deadline = time.monotonic() + _LOCK_TIMEOUT
    while time.monotonic() < deadline:
        with suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        time.sleep(0.05)
    return False


def main(words: list[str]) -> int:
    """Run one command."""
    state, verb, vmid, *options = words
    with (Path(state) / "calls").open("a") as calls:
        calls.write(f"{verb}\n")
    qm = Qm(Path(state), vmid)
    match verb:
        case "showcmd":
            qm.showcmd(pretty="--pretty" in options)
            return 0
        case "start":
            return qm.start()
        case "stop":
            return qm.stop()
        case _:
            return 255


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
