"""libvirt-python and the daemon behind it, as far as a launch needs them, over a machine of `machine_kinds.py`.

A fake by contract: the names and parameters that are here are held against the real libvirt-python where Debian's
python3-libvirt is installed, the XML that it gets against libvirt's schema (tests/unit/host_agent/hypervisors/
test_domain_xml.py). Domains live in this object and not in a connection, as they live in the daemon.

Behaviour, from libvirt's src/qemu/qemu_driver.c: a transient domain is gone when its process is; a name that is in use
is refused; the launch's secret is taken while the domain is paused.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree as ET

from tests.support.machine_kinds import Kind, start
from tests.support.qmp import QmpClient

OPERATION_FAILED, NO_DOMAIN, OPERATION_INVALID, INTERNAL_ERROR, RPC = 9, 42, 55, 1, 39


class LibvirtError(Exception):
    """`libvirt.libvirtError`."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self._code = code

    def get_error_code(self) -> int:
        return self._code

    def get_error_message(self) -> str:
        return str(self)


@dataclass
class FakeLibvirt:
    """The daemon.

    Attributes:
        folder: short; sockets and the owner's files are here, as in /var/lib/libvirt/qemu.
        kind: what runs in QEMU's place.
        xmls: what was created.
        next_fault: for the next call that changes something: `lost` (not done, no answer), `unheard` (done, no answer).
        away: whether the daemon cannot be reached.
    """

    folder: Path
    kind: Kind
    domains: dict[str, Domain] = field(default_factory=dict)
    xmls: list[str] = field(default_factory=list)
    next_fault: str | None = None
    away: bool = False

    def modules(self) -> dict[str, ModuleType]:
        """What `import libvirt` and `import libvirt_qemu` are to give."""
        libvirt = ModuleType("libvirt")
        libvirt.__dict__.update(
            open=self.open, libvirtError=LibvirtError, VIR_DOMAIN_START_PAUSED=1, VIR_DOMAIN_START_VALIDATE=16
        )
        qemu = ModuleType("libvirt_qemu")
        qemu.__dict__.update(qemuMonitorCommand=lambda domain, cmd, flags: domain.monitor(cmd, flags))
        return {"libvirt": libvirt, "libvirt_qemu": qemu}

    def open(self, name: str) -> Connection:
        assert name == "qemu:///system"
        self.check()
        return Connection(self)

    def check(self) -> None:
        if self.away:
            raise LibvirtError(RPC, "Cannot recv data: Connection reset by peer")

    def fault(self, when: str) -> None:
        """Lose an answer, if one is to be lost at this point."""
        if self.next_fault == when:
            self.next_fault = None
            raise LibvirtError(RPC, "Cannot recv data: Connection reset by peer")

    def end(self) -> None:
        """End every domain."""
        for domain in list(self.domains.values()):
            domain.kill()


class Connection:
    """`libvirt.virConnect`."""

    def __init__(self, daemon: FakeLibvirt) -> None:
        self._daemon = daemon

    def isAlive(self) -> int:  # noqa: N802 -- libvirt's name
        return int(not self._daemon.away)

    def close(self) -> int:
        return 0

    def createXML(self, xmlDesc: str, flags: int = 0) -> Domain:  # noqa: N802, N803 -- libvirt's names
        self._daemon.check()
        self._daemon.xmls.append(xmlDesc)
        domain = ET.fromstring(xmlDesc)  # noqa: S314 -- our own
        name, uuid = str(domain.findtext("name")), str(domain.findtext("uuid"))
        if any(other.name == name and other.isActive() for other in self._daemon.domains.values()):
            raise LibvirtError(OPERATION_FAILED, f"operation failed: domain '{name}' already exists with another uuid")
        made = Domain(self._daemon, name, uuid)
        self._daemon.domains[uuid] = made
        try:
            made.run(domain, paused=bool(flags & 1))
        except LibvirtError:
            made.kill()
            del self._daemon.domains[uuid]
            raise
        self._daemon.fault("unheard")
        return made

    def lookupByUUIDString(self, uuidstr: str) -> Domain:  # noqa: N802 -- libvirt's name
        self._daemon.check()
        found = self._daemon.domains.get(uuidstr)
        if found is None or not found.isActive():
            raise LibvirtError(NO_DOMAIN, f"Domain not found: no domain with matching uuid '{uuidstr}'")
        return found


class Domain:
    """`libvirt.virDomain`."""

    def __init__(self, daemon: FakeLibvirt, name: str, uuid: str) -> None:
        self._daemon = daemon
        self.name = name
        self.uuid = uuid
        self.process: subprocess.Popen[bytes] | None = None
        self._monitor: QmpClient | None = None
        self._lock = threading.Lock()

    def run(self, domain: ET.Element, *, paused: bool) -> None:
        """Start the machine."""
        folder = self._daemon.folder / self.uuid[:8]
        folder.mkdir()
        socket = folder / "monitor"
        self.process = start([*self._daemon.kind.program, *_words(domain, folder, paused=paused)], folder)
        while not socket.exists():
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(0.01)
                said = (folder / "somebody.log").read_text().strip()
                raise LibvirtError(
                    INTERNAL_ERROR, f"internal error: process exited while connecting to monitor: {said}"
                )
        self._monitor = QmpClient(socket)
        with self._link():
            self._monitor.negotiate()

    def isActive(self) -> int:  # noqa: N802 -- libvirt's name
        return int(self.process is not None and self.process.poll() is None)

    def destroy(self) -> int:
        self._daemon.check()
        self.kill()
        return 0

    def resume(self) -> int:
        self._change("cont")
        return 0

    def launchSecurityInfo(self, flags: int = 0) -> dict[str, Any]:  # noqa: N802 -- libvirt's name
        assert flags == 0
        sev = self._ask("query-sev")
        return {
            "sev-measurement": self._ask("query-sev-launch-measure")["data"],
            "sev-api-major": sev["api-major"],
            "sev-api-minor": sev["api-minor"],
            "sev-build-id": sev["build-id"],
            "sev-policy": sev["policy"],
        }

    def setLaunchSecurityState(self, params: dict[str, Any], flags: int = 0) -> int:  # noqa: N802 -- libvirt's name
        assert flags == 0
        assert set(params) == {"sev-secret-header", "sev-secret"}
        if self._ask("query-status")["running"]:
            raise LibvirtError(OPERATION_INVALID, "Requested operation is not valid: domain must be in a paused state")
        self._change("sev-inject-launch-secret", packet_header=params["sev-secret-header"], secret=params["sev-secret"])
        return 0

    def monitor(self, command: str, flags: int) -> str:
        """`libvirt_qemu.qemuMonitorCommand`: QEMU's whole reply."""
        assert flags == 0
        asked = json.loads(command)
        return json.dumps(self._execute(asked["execute"], **asked.get("arguments", {})))

    def kill(self) -> None:
        """End the machine, whatever it is doing."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        if self.process is not None:
            self.process.wait()
        with self._lock:
            if self._monitor is not None:
                self._monitor.close()
                self._monitor = None

    def _change(self, command: str, **arguments: str) -> None:
        self._daemon.fault("lost")
        self._ask(command, **arguments)
        self._daemon.fault("unheard")

    def _ask(self, command: str, **arguments: str) -> Any:
        reply = self._execute(command, **arguments)
        if "error" in reply:
            said = reply["error"]["desc"]
            raise LibvirtError(INTERNAL_ERROR, f"internal error: unable to execute QEMU command '{command}': {said}")
        return reply["return"]

    def _execute(self, command: str, **arguments: str) -> dict[str, Any]:
        self._daemon.check()
        with self._lock, self._link():
            if self._monitor is None:
                raise LibvirtError(OPERATION_INVALID, "Requested operation is not valid: domain is not running")
            return self._monitor.execute(command, **arguments)

    def _link(self) -> _Link:
        return _Link()


class _Link:
    """Turns what a broken monitor does to the client into libvirt's error."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (ValueError, OSError)):
            raise LibvirtError(INTERNAL_ERROR, "internal error: End of file from qemu monitor") from error


def _words(domain: ET.Element, folder: Path, *, paused: bool) -> list[str]:
    """QEMU's command line for the domain, as libvirt would put it."""
    security, system = domain.find("launchSecurity"), domain.find("os")
    assert security is not None
    assert system is not None
    told = {child.tag: str(child.text) for child in security}
    for name, key in (("dh_cert.base64", "dhCert"), ("session.base64", "session")):
        base64.b64decode(told[key], validate=True)
        (folder / name).write_text(told[key])
    loader = system.find("loader")
    assert loader is not None
    assert loader.attrib == {"readonly": "yes", "stateless": "yes", "type": "pflash"}
    serial = domain.find("devices/serial/source")
    sev = {
        "cbitpos": told["cbitpos"],
        "reduced-phys-bits": told["reducedPhysBits"],
        "policy": told["policy"],
        "dh-cert-file": f"{folder}/dh_cert.base64",
        "session-file": f"{folder}/session.base64",
        **({"kernel-hashes": "on"} if security.get("kernelHashes") == "yes" else {}),
    }
    boot = [
        word
        for key, option in (("kernel", "-kernel"), ("initrd", "-initrd"), ("cmdline", "-append"))
        if (value := system.findtext(key)) is not None
        for word in (option, value)
    ]
    return [
        *("-name", f"guest={domain.findtext('name')}", "-machine", "q35,confidential-guest-support=lsec0"),
        *("-cpu", str(domain.findtext("cpu/model")), "-smp", str(domain.findtext("vcpu"))),
        *("-m", f"{domain.findtext('memory')}M", "-nodefaults", "-no-user-config", "-display", "none"),
        *("-drive", f"if=pflash,format=raw,unit=0,readonly=on,file={loader.text}"),
        *("-object", ",".join(["sev-guest,id=lsec0", *(f"{key}={value}" for key, value in sev.items())])),
        *boot,
        *(["-serial", f"file:{serial.get('path')}"] if serial is not None else []),
        *(["-S"] if paused else []),
        *("-qmp", f"unix:{folder}/monitor,server=on,wait=off"),
    ]
