"""The host's side of the run: guests as an honest host defines them, and as dishonest ones do.

Each guest has a program line of its own. Where a host cheats behind its agent's back, a program that edits QEMU's words
(`dishonest.py`) stands before the machine; where it cheats behind the measurement, before the real QEMU below it.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from orchestrator.demo import dishonest_machine
from orchestrator.demo.artefacts import CURRENT
from orchestrator.demo.processes import script
from orchestrator.demo.site import Site
from tests.e2e import dishonest
from tests.e2e.workloads import CPUS, MILAN, OTHER, ROME, VCPUS, WITH_DISK, es

_MEMORY = "512M"
# What a host may swap behind the measurement, or before it.
SWAPPED = ("kernel", "initrd", "cmdline")


@dataclass(frozen=True, kw_only=True)
class Guest:
    """One guest in the agent's configuration.

    Attributes:
        name: its name.
        firmware: version of the firmware.
        kernel: version of the kernel; None for a guest that boots what is on its disk.
        initrd: version of the initrd.
        cmdline: version of the command line.
        vcpus: how many.
        cpu: QEMU's name of the CPU model.
        disk: whether it has the disk.
        edits: what the host changes behind its agent's back.
        below: what the host changes behind the measurement.
        liar: whether the host drops the session, lowers the policy and lies about it.
        newer: whether the newer of two QEMUs runs it.
    """

    name: str
    firmware: str = CURRENT
    kernel: str | None = CURRENT
    initrd: str = CURRENT
    cmdline: str = CURRENT
    vcpus: int = 1
    cpu: str = ROME
    disk: bool = False
    edits: tuple[str, ...] = ()
    below: tuple[str, ...] = ()
    liar: bool = False
    newer: bool = False


@dataclass(frozen=True, kw_only=True)
class Machines:
    """How the host's machines are made.

    Attributes:
        site: the folders.
        cmdlines: command lines by version.
        builtin: whether the stand-in machine takes the place of the real QEMU.
        qemu: the real QEMU.
        newer: another one, whose QMP has the shape of 9.1 and newer, if there is one.
        disk: the guest's disk, if there is one.
        foreign: the distribution's own OVMF, which is no AmdSev build.
    """

    site: Site
    cmdlines: dict[str, str]
    builtin: bool
    qemu: Path
    newer: Path | None
    disk: Path | None
    foreign: Path | None

    def guests(self) -> Iterator[Guest]:
        """All guests of the run."""
        yield Guest(name="web")
        yield Guest(name="second")
        yield Guest(name="larger", vcpus=2, cpu=MILAN)
        for cpu in CPUS:
            for vcpus in VCPUS:
                yield Guest(name=es(vcpus, cpu), vcpus=vcpus, cpu=cpu)
        yield Guest(name="es-2-EPYC-Rome", vcpus=2)
        if self.newer is not None:
            yield Guest(name="newer", vcpus=4, cpu=MILAN, newer=True)
        yield Guest(name="other", firmware=OTHER, kernel=OTHER, initrd=OTHER, cmdline=OTHER)
        yield Guest(name="firmware-only", kernel=None)
        if self.disk is not None:
            yield Guest(name="disk", initrd=WITH_DISK, disk=True)
        for what in ("firmware", *SWAPPED):
            yield Guest(name=f"swapped-{what}", **{what: OTHER})  # type: ignore[arg-type]  # all of them are versions
        yield Guest(name="without-hashes", edits=("kernel-hashes=off",))
        yield Guest(name="debug", edits=("policy-without=0x1",))
        yield Guest(name="debug-denied", liar=True)
        yield Guest(name="monitor-elsewhere", edits=(f"monitor={self.site.host / 'elsewhere.sock'}",))
        if self.foreign is not None:
            yield Guest(name="foreign-firmware", firmware="foreign")
            yield Guest(name="foreign-firmware-behind", edits=(f"firmware={self.foreign}",))
        if not self.builtin:
            for what in SWAPPED:
                yield Guest(name=f"behind-{what}", below=(self._swap(what),))

    def table(self, guest: Guest, platform: Path) -> str:
        """The guest's part of the agent's configuration.

        Args:
            guest: the guest.
            platform: state folder of the software platform.
        """
        return self.site.guest_table(
            guest.name, self._program(guest, platform), self._firmware(guest), self._words(guest)
        )

    def _firmware(self, guest: Guest) -> Path:
        if guest.firmware == "foreign" and self.foreign is not None:
            return self.foreign
        return self.site.artefacts(self.site.host, guest.firmware).firmware

    def _program(self, guest: Guest, platform: Path) -> list[str]:
        machine = [*script("sevattest"), "platform", "qemu"]
        machine += ["--builtin"] if self.builtin else ["--qemu", str(self._below(guest))]
        # In this order: the machine's own options come before QEMU's.
        machine += ["--state", str(platform)]
        if guest.edits:
            machine = [sys.executable, "-I", dishonest.__file__, *guest.edits, "--", *machine]
        if guest.liar:
            machine = [sys.executable, "-I", dishonest_machine.__file__, *machine]
        return machine

    def _below(self, guest: Guest) -> Path:
        """The real QEMU, or a script in its place that edits its words."""
        if guest.newer and self.newer is not None:
            return self.newer
        if not guest.below:
            return self.qemu
        words = [sys.executable, "-I", dishonest.__file__, *guest.below, "--", str(self.qemu)]
        path = self.site.host / f"qemu-{guest.name}"
        path.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
        path.chmod(0o700)
        return path

    def _words(self, guest: Guest) -> list[str]:
        words = [
            *("-name", guest.name, "-machine", "q35", "-cpu", guest.cpu, "-smp", str(guest.vcpus), "-m", _MEMORY),
            *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            *("-serial", f"file:{self.site.serial(guest.name)}"),
        ]
        if guest.kernel is not None:
            kernel, initrd = (self.site.artefacts(self.site.host, version) for version in (guest.kernel, guest.initrd))
            words += ["-kernel", str(kernel.kernel), "-initrd", str(initrd.initrd)]
            words += ["-append", self.cmdlines[guest.cmdline]]
        if guest.disk:
            words += ["-drive", f"file={self.disk},format=raw,if=virtio,readonly=on"]
        return words

    def _swap(self, what: str) -> str:
        other = self.site.artefacts(self.site.host, OTHER)
        return {
            "kernel": f"kernel={other.kernel}",
            "initrd": f"initrd={other.initrd}",
            "cmdline": f"append={self.cmdlines[OTHER]}",
        }[what]
