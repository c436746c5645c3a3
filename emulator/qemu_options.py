"""QEMU's command line, as far as the stand-in machine understands it; everything else is refused as QEMU refuses it.

`parse` turns words into `MachineOptions` or raises `MachineDied` with QEMU's sentence. Options that change nothing here
(devices, names, displays) are accepted and ignored; an option that could put something unmeasured or unmentioned into
the guest's launch is not.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from emulator.cpu_models import DEFAULT_MODEL
from emulator.errors import MachineDied
from emulator.sev_object import SevGuest, object_properties, pairs, sev_guest

_MAX_CPUS = 288  # pc-q35
_TOPOLOGY = ("sockets", "dies", "clusters", "cores", "threads")
_NUMBER_DIGITS = 19  # of the largest number that QEMU reads
_MACHINES = re.compile(r"(q35|pc|pc-(q35|i440fx)-[0-9]+\.[0-9]+)$")
_SIZE = re.compile(r"(?P<digits>[0-9]+)(?:\.(?P<fraction>[0-9]+))?(?P<unit>[bkKmMgGtT]?)$")
_HEX_SIZE = re.compile(r"0[xX](?P<digits>[0-9a-fA-F]+)(?P<unit>[kKmMgGtT]?)$")
_UNITS = {"b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}

# Accepted without effect: option -> how many values it takes.
_IGNORED = {
    "-accel": 1,
    "-boot": 1,
    "-device": 1,
    "-display": 1,
    "-enable-kvm": 0,
    "-global": 1,
    "-monitor": 1,
    "-msg": 1,
    "-name": 1,
    "-net": 1,
    "-netdev": 1,
    "-nic": 1,
    "-no-shutdown": 0,
    "-no-user-config": 0,
    "-nodefaults": 0,
    "-nographic": 0,
    "-overcommit": 1,
    "-rtc": 1,
    "-sandbox": 1,
    "-uuid": 1,
    "-vga": 1,
}
_OBJECTS_IGNORED = frozenset(
    {
        "iothread",
        "memory-backend-file",
        "memory-backend-memfd",
        "memory-backend-ram",
        "rng-builtin",
        "rng-random",
        "secret",
    }
)


@dataclass(kw_only=True)
class MachineOptions:
    """What the words asked for; defaults are QEMU's."""

    sev: SevGuest | None = None
    firmware: Path | None = None
    kernel: Path | None = None
    initrd: Path | None = None
    append: str | None = None
    vcpus: int = 1
    cpu: str = DEFAULT_MODEL
    cpu_flags: Mapping[str, str] = field(default_factory=dict)
    memory: int = 128 << 20
    paused: bool = False
    no_reboot: bool = False
    qmp: Path | None = None
    serial: str | None = None


def parse(words: Sequence[str]) -> MachineOptions:
    """Understand a command line.

    Raises:
        MachineDied: as QEMU would, with its sentence.
    """
    return _CommandLine(words).options()


class _CommandLine:
    def __init__(self, words: Sequence[str]) -> None:
        self._words = iter(words)
        self._options = MachineOptions()
        self._objects: dict[str, SevGuest | None] = {}
        self._cgs: str | None = None
        self._readers: dict[str, Callable[[str], None]] = {
            "-append": self._append,
            "-cpu": self._cpu,
            "-drive": self._drive,
            "-initrd": self._initrd,
            "-kernel": self._kernel,
            "-m": self._memory,
            "-machine": self._machine,
            "-M": self._machine,
            "-object": self._object,
            "-qmp": self._qmp,
            "-serial": self._serial,
            "-smp": self._smp,
        }

    def options(self) -> MachineOptions:
        for word in self._words:
            self._one(word)
        options = self._options
        if self._cgs is not None:
            if self._cgs not in self._objects:
                raise MachineDied(f"Device '{self._cgs}' not found")
            options.sev = self._objects[self._cgs]
            if options.sev is None:
                raise MachineDied(f"Object '{self._cgs}' is not of type 'confidential-guest-support'")
        if options.kernel is None:
            for name, given in (("append", options.append), ("initrd", options.initrd)):
                if given is not None:
                    raise MachineDied(f"-{name} only allowed with -kernel option")
        return options

    def _one(self, word: str) -> None:
        option = word[1:] if word.startswith("--") else word
        if option in self._readers:
            self._readers[option](self._value(word))
        elif option == "-S":
            self._options.paused = True
        elif option == "-no-reboot":
            self._options.no_reboot = True
        elif option in _IGNORED:
            for _ in range(_IGNORED[option]):
                self._value(word)
        elif word.startswith("-"):
            raise MachineDied(f"{word}: invalid option")
        else:
            # QEMU takes a bare word for a disk image; the stand-in has no disks.
            raise MachineDied(f"{word}: Could not open '{word}': No such file or directory")

    def _value(self, option: str) -> str:
        try:
            return next(self._words)
        except StopIteration:
            raise MachineDied(f"{option}: requires an argument") from None

    def _append(self, value: str) -> None:
        self._options.append = value

    def _kernel(self, value: str) -> None:
        self._options.kernel = Path(value)

    def _initrd(self, value: str) -> None:
        self._options.initrd = Path(value)

    def _cpu(self, value: str) -> None:
        name, *flags = value.split(",")
        self._options.cpu = name
        self._options.cpu_flags = dict(flag.partition("=")[::2] for flag in flags)

    def _smp(self, value: str) -> None:
        given: dict[str, int] = {}
        for key, text in pairs(value, "cpus"):
            if not text.isdecimal() or len(text) > _NUMBER_DIGITS:
                raise MachineDied(f"-smp {value}: Parameter '{key}' expects a number")
            given[key] = int(text)
        if 0 in given.values():
            raise MachineDied(f"-smp {value}: Invalid CPU topology: CPU counts must be greater than zero")
        product = math.prod(given.get(level, 1) for level in _TOPOLOGY)
        count = given.get("cpus", given.get("maxcpus", product))
        if count > _MAX_CPUS:
            raise MachineDied(f"Invalid SMP CPUs {count}. The max CPUs supported by machine 'pc-q35' is {_MAX_CPUS}")
        self._options.vcpus = count

    def _memory(self, value: str) -> None:
        size = memory_size(dict(pairs(value, "size")).get("size", ""), "m")
        if size is None:
            raise MachineDied(f"-m {value}: Parameter 'size' expects a size")
        if not size:
            raise MachineDied(f"-m {value}: invalid RAM size: 0")
        self._options.memory = size

    def _machine(self, value: str) -> None:
        for key, text in pairs(value, "type"):
            if key == "type" and not _MACHINES.match(text):
                raise MachineDied(
                    f"-machine {value}: unsupported machine type", "Use -machine help to list supported machines"
                )
            if key in {"confidential-guest-support", "memory-encryption"}:
                self._cgs = text

    def _drive(self, value: str) -> None:
        given = dict(pairs(value, "file"))
        if given.get("if") != "pflash":
            return  # a disk: nothing of it is measured, and the guest does not look at it
        unit = given.get("unit", "0" if self._options.firmware is None else "1")
        if given.get("format", "raw") != "raw":
            raise MachineDied(f"-drive {value}: Image is not in {given['format']} format")
        if "file" not in given:
            raise MachineDied(f"-drive {value}: Device needs media, but drive is empty")
        if not Path(given["file"]).is_file():
            raise MachineDied(f"-drive {value}: Could not open '{given['file']}': No such file or directory")
        if unit == "0":
            self._options.firmware = Path(given["file"])

    def _qmp(self, value: str) -> None:
        scheme, _, rest = value.partition(":")
        if scheme != "unix" or not rest:
            raise MachineDied(f"-qmp {value}: '{value}' is not a valid char driver")
        given = dict(pairs(rest, "path"))
        if "path" not in given:
            raise MachineDied(f"-qmp {value}: None or one of 'path', 'fd' or 'host' option required.")
        if given.get("server", "off") == "off":
            raise MachineDied(
                f"-qmp {value}: Failed to connect to '{given['path']}': the stand-in only listens (server=on)"
            )
        self._options.qmp = Path(given["path"])

    def _serial(self, value: str) -> None:
        if value not in {"stdio", "mon:stdio", "none", "null"} and not value.startswith("file:"):
            raise MachineDied(f"-serial {value}: '{value}' is not a valid char driver")
        self._options.serial = value

    def _object(self, value: str) -> None:
        kind, given = object_properties(value)
        identifier = given.pop("id", None)
        if kind == "sev-guest":
            if identifier is None:
                raise MachineDied(f"-object {value}: Parameter 'id' is missing")
            self._objects[identifier] = sev_guest(value, identifier, given)
        elif kind in _OBJECTS_IGNORED:
            if identifier is not None:
                self._objects[identifier] = None
        else:
            raise MachineDied(f"-object {value}: Parameter 'qom-type' does not accept value '{kind}'")


def memory_size(text: str, unit: str) -> int | None:
    """Bytes in a size as QEMU writes one (util/cutils.c, `do_strtosz`); None for what is none.

    Args:
        text: digits, perhaps with a fraction, and perhaps a unit; or hexadecimal digits behind `0x`.
        unit: what digits alone are counted in, `b` or `m`.
    """
    hexadecimal = _HEX_SIZE.match(text)
    found = hexadecimal or _SIZE.match(text)
    if found is None or len(found["digits"]) > _NUMBER_DIGITS:
        return None
    factor = _UNITS[found["unit"].lower() or unit]
    if hexadecimal:
        return int(found["digits"], 16) * factor
    return int(found["digits"]) * factor + int(factor * float(f"0.{found['fraction'] or 0}"))
