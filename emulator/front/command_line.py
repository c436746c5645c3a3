"""QEMU's command line as the front reads it: what it must do itself, and the words that the real QEMU is left with.

Every word that has nothing to do with SEV, acceleration, control monitors or RAM passes as it is, known or not: the
real QEMU is the judge of it. Two passes, since an option may depend on a later one. Pure code. Sources: QEMU's
qemu-options.hx and softmmu/vl.c, 7.2 to 10.0.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from emulator.errors import MachineDied
from emulator.front.channel_spec import ON, ChannelSpec, from_chardev, from_legacy
from emulator.qemu_options import memory_size
from emulator.sev_object import SevGuest, object_properties, pairs, sev_guest

RAM_FD = "\0ram\0"  # stands for the number of a descriptor until there is one; no word of a line holds a NUL
DEFAULT_RAM = 128 << 20

# Options without a value. All others have one, and an option that QEMU does not know ends it anyway.
_FLAGS = frozenset(
    (
        *("S", "s", "alt-grab", "async-teardown", "audio-help", "ctrl-grab", "daemonize", "enable-fips", "enable-kvm"),
        *("enable-sync-profile", "full-screen", "h", "help", "jitdump", "mem-prealloc", "no-acpi", "no-fd-bootchk"),
        *("no-frame", "no-hpet", "no-kvm", "no-quit", "no-reboot", "no-shutdown", "no-user-config", "nodefaults"),
        *("nographic", "nouserconfig", "only-migratable", "perfmap", "portrait", "preconfig", "semihosting"),
        *("singlestep", "snapshot", "usb", "version", "win2k-hack", "xen-attach", "xen-domid-restrict"),
    )
)
# What no SEV launch can begin with, or the front cannot answer for; each with its sentence.
_REFUSED = {
    "incoming": "a SEV guest is measured when it starts and cannot come from a migration",
    "loadvm": "a SEV guest is measured when it starts and cannot come from a snapshot",
    "preconfig": "the front launches the machine, which -preconfig holds back",
    "runas": "the machine ends with the front, which another user's would not",
}
_MACHINE = frozenset({"machine", "M"})
_QMP = frozenset({"qmp", "qmp-pretty"})
_ACCELERATION = frozenset({"accel", "enable-kvm", "no-kvm"})
# RAM is the front's; `-id` is Proxmox VE's own, with which no other QEMU starts.
_DROPPED = _ACCELERATION | {"id", "mem-path", "mem-prealloc"}
_PVE_MACHINE = re.compile(r"\+pve[0-9]+$")
_LINKS = frozenset({"confidential-guest-support", "memory-encryption"})
_BACKENDS = frozenset({"memory-backend-file", "memory-backend-memfd", "memory-backend-ram"})
_HELP = frozenset({"help", "?"})
_SEV_SINCE_9_1 = frozenset({"legacy-vm-type"})


@dataclass(kw_only=True)
class Plan:
    """What a command line asks of the front.

    Attributes:
        sev: the sev-guest object that the machine uses.
        words: for the real QEMU; RAM_FD in them stands for the descriptor of guest RAM.
        monitors: the control monitors.
        machine: the machine type; empty where the line names none.
        ram: bytes of RAM that start at guest physical address 0.
        ram_named: whether `words` name that RAM already.
        total_ram: bytes of all RAM; more than `ram` where there are several NUMA nodes.
        low_ram_limit: `max-ram-below-4g`, where it is given.
        kernel: -kernel.
        initrd: -initrd.
        append: -append.
        cpu: model name and its flags; none where the line names none.
        paused: -S.
        daemonize: -daemonize.
        pid_file: -pidfile.
    """

    sev: SevGuest
    words: tuple[str, ...] = ()
    monitors: tuple[ChannelSpec, ...] = ()
    machine: str = ""
    ram: int = DEFAULT_RAM
    ram_named: bool = False
    total_ram: int = 0
    low_ram_limit: int | None = None
    kernel: Path | None = None
    initrd: Path | None = None
    append: str | None = None
    cpu: tuple[str, ...] = ()
    paused: bool = False
    daemonize: bool = False
    pid_file: Path | None = None


class LeftToQemu(Exception):
    """No SEV guest comes of these words; the real QEMU runs them, or says what is wrong with them and ends.

    Attributes:
        words: the line with TCG as its accelerator, all else as it was given.
    """

    def __init__(self, words: tuple[str, ...]) -> None:
        super().__init__()
        self.words = words


@dataclass(frozen=True)
class _Option:
    """One option of the line: its words as given, its name, its value."""

    given: tuple[str, ...]
    name: str
    value: str

    @property
    def is_whole(self) -> bool:
        """Whether it has the value that it wants; QEMU ends at one that has not."""
        return len(self.given) > 1 or self.name in _FLAGS


def read(words: Sequence[str]) -> Plan:
    """Understand a command line.

    Raises:
        LeftToQemu: the machine has no SEV guest, its SEV object is none, or its accelerator is not KVM; or the line
            asks for help.
        MachineDied: accelerators are named in two ways that exclude each other, or a control monitor is on a device
            that the front cannot stand before.
    """
    options = list(_split(words))
    line = _Line()
    for option in options:
        if look := _LOOKERS.get(option.name):
            look(line, option.value)
    if line.helps:
        raise LeftToQemu(tuple(words))
    if line.accelerators and line.machine_accelerators:
        raise MachineDied('The -accel and "-machine accel=" options are incompatible')
    sev = line.sev_guest()
    if sev is None:
        raise LeftToQemu((*(word for option in options for word in _under_tcg(option)), "-accel", "tcg"))
    return _Writer(sev, line).plan(options)


def ram_object(identifier: str, size: int) -> str:
    """The value of -object for RAM that lies behind a descriptor of ours."""
    return f"memory-backend-file,id={identifier},size={size},mem-path=/proc/self/fd/{RAM_FD},share=on"


def _split(words: Sequence[str]) -> Iterator[_Option]:
    """The line's options; a word that is none (a disk image), or lacks its value, stands alone."""
    at = 0
    while at < len(words):
        word = words[at]
        name = word.removeprefix("-").removeprefix("-") if word.startswith("-") else ""
        takes = 2 if name and name not in _FLAGS and at + 1 < len(words) else 1
        yield _Option(tuple(words[at : at + takes]), name, words[at + 1] if takes > 1 else "")
        at += takes


# ------------------------------------------------------------------------------------ first pass: what depends on what


@dataclass
class _Line:
    """What options say that others depend on."""

    objects: dict[str, tuple[str, Mapping[str, str]]] = field(default_factory=dict)
    link: str | None = None
    accelerators: list[str] = field(default_factory=list)
    machine_accelerators: list[str] = field(default_factory=list)
    backend: str | None = None
    chardevs: dict[str, tuple[str, Mapping[str, str]]] = field(default_factory=dict)
    helps: bool = False
    control: set[str] = field(default_factory=set)

    def look_object(self, value: str) -> None:
        with suppress(MachineDied):  # QEMU will say so itself
            kind, properties = object_properties(value)
            self.objects[properties.get("id", "")] = (kind, properties)

    def look_machine(self, value: str) -> None:
        self.helps |= value in _HELP
        for key, text in pairs(value, "type"):
            if key in _LINKS:
                self.link = text
            elif key == "accel":
                self.machine_accelerators = text.split(":")
            elif key == "memory-backend":
                self.backend = text

    def look_accel(self, value: str) -> None:
        self.helps |= value in _HELP
        self.accelerators.append(dict(pairs(value or "kvm", "accel")).get("accel", ""))

    def look_numa(self, value: str) -> None:
        given = dict(pairs(value, "type"))
        if given.get("type") == "node" and "memdev" in given:
            self.backend = self.backend or given["memdev"]  # the first node has the lowest addresses

    def look_chardev(self, value: str) -> None:
        given = dict(pairs(value, "backend"))
        self.chardevs[given.get("id", "")] = (f"-chardev {value}", given)

    def look_mon(self, value: str) -> None:
        given = dict(pairs(value, "chardev"))
        if given.get("mode") == "control":
            self.control.add(given.get("chardev", ""))

    def look_qmp(self, value: str) -> None:
        if value.startswith("chardev:"):
            self.control.add(value.removeprefix("chardev:"))

    def sev_guest(self) -> SevGuest | None:
        """The SEV object that the machine uses; None where there is none, or it is not in order."""
        # The first that works is taken, and both TCG and KVM do. A line that names none is run as by a program called
        # `kvm`, as Proxmox VE's is.
        accelerators = self.accelerators or self.machine_accelerators or ["kvm"]
        if self.link is None or accelerators[0] != "kvm":
            return None
        kind, properties = self.objects.get(self.link, ("", {}))
        if kind != "sev-guest":
            return None
        given = {key: text for key, text in properties.items() if key != "id"}
        try:
            return sev_guest("", self.link, given, extra=_SEV_SINCE_9_1)
        except MachineDied:
            return None


_LOOKERS: Mapping[str, Callable[[_Line, str], None]] = {
    "object": _Line.look_object,
    "machine": _Line.look_machine,
    "M": _Line.look_machine,
    "accel": _Line.look_accel,
    "enable-kvm": _Line.look_accel,
    "numa": _Line.look_numa,
    "chardev": _Line.look_chardev,
    "mon": _Line.look_mon,
    "qmp": _Line.look_qmp,
    "qmp-pretty": _Line.look_qmp,
}


def _refuse(option: _Option) -> None:
    why = _REFUSED.get(option.name)
    if option.name == "run-with" and "user" in dict(pairs(option.value, "")):
        why = _REFUSED["runas"]
    if why is not None:
        raise MachineDied(f"-{option.name}: {why}")


def _under_tcg(option: _Option) -> tuple[str, ...]:
    """The option without what asks for another accelerator."""
    if option.name in _ACCELERATION:
        return ()
    if option.name in _MACHINE:
        return _machine([pair for pair in pairs(option.value, "type") if pair[0] != "accel"])
    return option.given


# --------------------------------------------------------------------------------- second pass: what is left for QEMU


class _Writer:
    """From options to a plan, once it is known what the SEV guest is."""

    def __init__(self, sev: SevGuest, line: _Line) -> None:
        self._line = line
        self._monitors: list[ChannelSpec] = []
        self._plan = Plan(sev=sev, ram_named=line.backend is not None)
        self._rules: Mapping[str, Callable[[_Option], tuple[str, ...]]] = {
            **dict.fromkeys(_MACHINE, self._machine),
            **dict.fromkeys(_DROPPED, lambda _: ()),
            **dict.fromkeys(_QMP, self._qmp),
            **dict.fromkeys(("S", "daemonize", "pidfile", "cpu", "kernel"), self._ours),
            "append": self._kept,
            "chardev": self._chardev,
            "initrd": self._kept,
            "m": self._memory,
            "mon": self._mon,
            "object": self._object,
        }

    def plan(self, options: Sequence[_Option]) -> Plan:
        for option in options:
            _refuse(option)
            rule = self._rules.get(option.name) if option.is_whole else None
            self._plan.words += rule(option) if rule else option.given
        self._plan.monitors = tuple(self._monitors)
        self._plan.total_ram = self._plan.total_ram or self._plan.ram
        return self._plan

    def _note(self, name: str, value: str) -> None:
        plan = self._plan
        match name:
            case "S":
                plan.paused = True
            case "daemonize":
                plan.daemonize = True
            case "pidfile":
                plan.pid_file = Path(value)
            case "cpu":
                plan.cpu = tuple(value.split(","))
            case "kernel":
                plan.kernel = Path(value)
            case "initrd":
                plan.initrd = Path(value)
            case "append":
                plan.append = value

    def _ours(self, option: _Option) -> tuple[str, ...]:
        self._note(option.name, option.value)
        return ()

    def _kept(self, option: _Option) -> tuple[str, ...]:
        self._note(option.name, option.value)
        return option.given

    def _machine(self, option: _Option) -> tuple[str, ...]:
        given = list(pairs(option.value, "type"))
        kept = []
        for key, text in given:
            if key in {"kernel", "initrd", "append"}:
                self._note(key, text)
            if key == "max-ram-below-4g":
                self._plan.low_ram_limit = memory_size(text, "b")
            if key == "type":
                self._plan.machine = _PVE_MACHINE.sub("", text)
                kept.append((key, self._plan.machine))
            elif key not in _LINKS | {"accel", "kernel"}:
                kept.append((key, text))
        return option.given if kept == given else _machine(kept)

    def _memory(self, option: _Option) -> tuple[str, ...]:
        size = memory_size(dict(pairs(option.value, "size")).get("size", ""), "m")
        if size:
            self._plan.total_ram = size
            if not self._plan.ram_named:
                self._plan.ram = size
        return option.given

    def _object(self, option: _Option) -> tuple[str, ...]:
        try:
            kind, properties = object_properties(option.value)
        except MachineDied:
            return option.given
        identifier = properties.get("id")
        if identifier is None or identifier == self._line.link:
            return () if identifier else option.given
        size = memory_size(properties.get("size", ""), "b")
        if identifier == self._line.backend and kind in _BACKENDS and size:
            self._plan.ram = size
            return ("-object", ram_object(identifier, size))
        return option.given

    def _chardev(self, option: _Option) -> tuple[str, ...]:
        return () if dict(pairs(option.value, "backend")).get("id") in self._line.control else option.given

    def _qmp(self, option: _Option) -> tuple[str, ...]:
        pretty, given = option.name == "qmp-pretty", f"-{option.name} {option.value}"
        if option.value.startswith("chardev:"):
            self._monitors.append(self._on(given, option.value.removeprefix("chardev:"), pretty=pretty))
        elif channel := from_legacy(given, option.value, pretty=pretty):
            self._monitors.append(channel)
        return ()

    def _mon(self, option: _Option) -> tuple[str, ...]:
        given = dict(pairs(option.value, "chardev"))
        if given.get("mode") != "control" or "chardev" not in given:
            return option.given
        self._monitors.append(self._on(f"-mon {option.value}", given["chardev"], pretty=given.get("pretty") in ON))
        return ()

    def _on(self, option: str, identifier: str, *, pretty: bool) -> ChannelSpec:
        if identifier not in self._line.chardevs:
            raise MachineDied(f'{option}: chardev "{identifier}" not found')
        return from_chardev(*self._line.chardevs[identifier], pretty=pretty)


def _machine(kept: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    if not kept:
        return ()
    return ("-machine", ",".join(f"{key}={text.replace(',', ',,')}" for key, text in kept))
