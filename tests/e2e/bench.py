"""One worker's own stack for the whole run: platform, verifier and agent, with every workload and every guest."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

from common.sev.digest.compute import LaunchShape, hash_chunks, measure_firmware
from common.sev.digest.kernel_hashes import KernelHashes
from common.sev.digest.ovmf import Footer
from orchestrator.demo.artefacts import CURRENT
from orchestrator.demo.processes import script
from orchestrator.demo.site import Site
from orchestrator.demo.stack import Stack, make_identities
from orchestrator.demo.story import read_secrets
from tests.e2e.guests import Guest, Machines
from tests.e2e.workloads import OTHER, Owner, Workload, make_other

# They differ in one byte, and a guest boots with either. On a loaded host the timer is too late for the kernel's check.
CMDLINES = {
    CURRENT: "console=ttyS0 iomem=relaxed no_timer_check loglevel=4",
    OTHER: "console=ttyS0 iomem=relaxed no_timer_check loglevel=5",
}
# From a machine's start to its greeting; one scenario waits for that long.
_START_SECONDS = 15
# What a kernel, or what runs on it, says when it has come up.
_KNOWN_AGAIN = 32  # digits; a shorter text could stand anywhere
BOOTED = ("Linux version", "guest:", "secret ", "disk:")


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What guests are made of.

    Attributes:
        firmware: an AmdSev build of OVMF.
        kernel: a kernel.
        initrds: by version, an initramfs each that reads secrets and says so on the serial line.
        qemu: the real QEMU; None for the stand-in machine.
        newer: another one, whose QMP has the shape of 9.1 and newer, if there is one.
        disk: a disk that only the passphrase opens, if there is one.
        passphrase: what opens it.
        foreign: the distribution's own OVMF, if there is one.
        source: where the guest says that its secrets come from.
    """

    firmware: Path
    kernel: Path
    initrds: dict[str, bytes]
    qemu: Path | None
    newer: Path | None = None
    disk: Path | None = None
    passphrase: bytes | None = None
    foreign: Path | None = None
    source: str = "/dev/mem"


@dataclass
class Bench:
    """The stack, and what its guests may read.

    Attributes:
        stack: the processes.
        owner: the workloads.
        guests: by name.
        real: whether machines are real QEMUs.
        footer: of the current firmware.
        source: where a real guest says that its secrets come from.
        allowed: guests that may run in the scenario, each with its workload, or None where it gets no secret.
    """

    stack: Stack
    owner: Owner
    guests: dict[str, Guest]
    real: bool
    footer: Footer
    source: str
    allowed: dict[str, Workload | None] = field(default_factory=dict)

    @property
    def site(self) -> Site:
        """The folders."""
        return self.stack.site

    def monitor(self, launch_id: UUID) -> Path:
        """The agent's own QMP socket of a launch's machine."""
        return self.site.host / "state" / "launches" / str(launch_id) / "qmp.sock"

    def audit(self, launch_id: UUID) -> list[dict[str, Any]]:
        """What the owner's log has about a launch (`sev-verifier audit --json`)."""
        config = str(self.site.verifier_config)
        command = [*script("sev-verifier"), "audit", "--config", config, "--json", "--launch", str(launch_id)]
        answer = subprocess.run(command, check=True, capture_output=True, text=True)
        return [json.loads(line) for line in answer.stdout.splitlines()]

    def check_owner(self) -> list[str]:
        """What is wrong with the owner's configuration and documents (`sev-verifier check-config`)."""
        command = [*script("sev-verifier"), "check-config", "--config", str(self.site.verifier_config)]
        answer = subprocess.run(command, check=False, capture_output=True, text=True)
        assert answer.returncode == 2, answer.stderr
        return [line for line in answer.stderr.splitlines() if not line.startswith("warning:")]

    def wrongs(self) -> list[str]:
        """What any guest has done that it must not do; asked after every scenario, whatever the scenario asked itself.

        A guest that was not allowed to run must not have booted, and a secret is read only by the guest that it is for.
        """
        found = []
        for guest in self.guests:
            said = self.stack.serial(guest)
            if guest not in self.allowed:
                found += [f"{guest} was not to run and said {word!r}" for word in BOOTED if word in said]
            workload = self.allowed.get(guest)
            rightful = set() if workload is None else {(str(s.guid), s.in_the_guest) for s in workload.secrets}
            read = {(secret.guid, secret.data) for secret in read_secrets(said)}
            found += [f"{guest} read a secret {guid} that is not its own" for guid, _ in read - rightful]
            found += [f"{guest} said a secret that is not its own" for text in self._others(workload) if text in said]
        return found

    def _others(self, own: Workload | None) -> set[str]:
        """Every secret of the owner that is long enough to be known again, but those of one workload, in hex."""
        known = {name: {s.in_the_guest.hex() for s in each.secrets} for name, each in self.owner.workloads.items()}
        ours = known.get(own.name, set()) if own is not None else set()
        return {text for texts in known.values() for text in texts - ours if len(text) > _KNOWN_AGAIN}

    def forget(self) -> None:
        """Make ready for the next scenario: no machine, nothing said, nobody allowed anything."""
        self.allowed.clear()
        for guest in self.guests:
            self.stack.end_guest(guest)
            self.site.serial(guest).unlink(missing_ok=True)
        for service in (self.stack.agent, self.stack.verifier):
            if not service.running:
                self.stack.restart(service)


@contextlib.contextmanager
def running_bench(parts: Parts) -> Iterator[Bench]:
    """Everything started and ready; ended and cleared away afterwards."""
    root = Path(tempfile.mkdtemp(prefix="s"))
    try:
        with Stack(Site(root=root)) as stack:
            yield _prepare(stack, parts)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _prepare(stack: Stack, parts: Parts) -> Bench:
    site = stack.site
    stack.start_platforms(site.platform)
    make_identities(site.pki)
    current = site.artefacts(site.owner, CURRENT)
    shutil.copyfile(parts.firmware, current.firmware)
    shutil.copyfile(parts.kernel, current.kernel)
    for version, initrd in parts.initrds.items():
        site.artefacts(site.owner, version).initrd.write_bytes(initrd)
    make_other(current, site.artefacts(site.owner, OTHER))
    shutil.copytree(current.folder, site.host / "artefacts", dirs_exist_ok=True)
    firmware = measure_firmware([current.firmware.read_bytes()])
    hashes = KernelHashes.of(
        hash_chunks([current.kernel.read_bytes()]),
        hash_chunks([current.initrd.read_bytes()]),
        CMDLINES[CURRENT].encode(),
    )
    owner = Owner(site, CMDLINES)
    owner.write(passphrase=parts.passphrase, digest=LaunchShape(firmware=firmware, hashes=hashes).digest())
    machines = Machines(
        site=site,
        cmdlines=CMDLINES,
        builtin=parts.qemu is None,
        qemu=parts.qemu or Path("/nonexistent"),
        newer=parts.newer,
        disk=parts.disk,
        foreign=parts.foreign,
    )
    guests = {guest.name: guest for guest in machines.guests()}
    site.write_agent(
        (machines.table(guest, site.platform) for guest in guests.values()), site.platform, start_timeout=_START_SECONDS
    )
    stack.wait_prepared()
    stack.start_services(guests)
    return Bench(
        stack=stack,
        owner=owner,
        guests=guests,
        real=parts.qemu is not None,
        footer=firmware.footer,
        source=parts.source,
    )
