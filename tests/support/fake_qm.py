"""Proxmox VE's `qm` as far as a launch needs it: `showcmd`, `start`, `stop`, and the order of things in `start`.

    fake_qm.py STATE showcmd VMID [--pretty] | start VMID | stop VMID

STATE is a folder: `VMID.conf` as in /etc/pve/qemu-server, `kvm.json` with the words that run a machine in place of
/usr/bin/kvm, `lock-VMID`, `tasks` (a line for each thing that was done), and the sockets as in /var/run/qemu-server.

Facts, from qemu-server (src/PVE/QemuServer.pm, vm_start_nolock and config_to_command; src/test/cfg2cmd/*.cmd) and
pve-guest-common (GuestHelpers.pm, exec_hookscript): the configuration is read, under its lock, before the hookscript's
pre-start, so what a hook changes in it does not count; a failing pre-start ends the start; QEMU daemonizes; a failing
post-start is a warning. `args:` comes last on the line but for nothing; `freeze: 1` is -S.
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
        uefi = ["-drive", "if=pflash,unit=0,format=raw,readonly=on,file=/usr/share/pve-edk2-firmware//OVMF_CODE_4M.fd"]
        sev = ["-object", "sev-guest,id=sev0,cbitpos=51,reduced-phys-bits=6,policy=0x8"]
        machine = f"type={conf.get('machine', 'q35')}+pve0"
        return [
            *("/usr/bin/kvm", "-id", vmid, "-name", f"{conf['name']},debug-threads=on", "-no-shutdown"),
            *("-chardev", f"socket,id=qmp,path={run}/{vmid}.qmp,server=on,wait=off"),
            *("-mon", "chardev=qmp,mode=control"),
            *("-chardev", "socket,id=qmp-event,path=/var/run/qmeventd.sock,reconnect=5"),
            *("-mon", "chardev=qmp-event,mode=control"),
            *("-pidfile", f"{run}/{vmid}.pid", "-daemonize"),
            *("-smbios", "type=1,uuid=7b10d7af-b932-4c66-b2c3-3996152ec465"),
            *(uefi if conf.get("bios") == "ovmf" else []),
            *("-smp", "{0},sockets=1,cores={0},maxcpus={0}".format(conf.get("cores", "1")), "-nodefaults"),
            *("-boot", "menu=on,strict=on,reboot-timeout=1000,splash=/usr/share/qemu-server/bootsplash.jpg"),
            *("-vnc", f"unix:{run}/{vmid}.vnc,password=on", "-cpu", conf.get("cpu", "kvm64"), "-m", conf["memory"]),
            *(["-S"] if conf.get("freeze") == "1" else []),
            *("-device", "pcie-root-port,id=ich9-pcie-port-1,addr=10.0,x-speed=16,x-width=32,chassis=1"),
            *("-device", "virtio-balloon-pci,id=balloon0,bus=pcie.0,addr=0x3,free-page-reporting=on"),
            *("-iscsi", "initiator-name=iqn.1993-08.org.debian:01:aabbccddeeff"),
            *(sev if "amd-sev" in conf else []),
            *("-machine", machine + (",confidential-guest-support=sev0" if "amd-sev" in conf else "")),
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
        given = iter(expanded(self._command()[1:]))
        for word in given:
            if word in {"-id", "-chardev", "-mon", "-pidfile", "-smbios", "-boot", "-vnc", "-device", "-iscsi"}:
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
