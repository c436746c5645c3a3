"""QEMU's command line: what a guest's definition may say, and what the agent adds to it.

The agent owns everything that decides what is measured and under which session: the sev-guest object, the machine's
link to it, the firmware's flash drive, the paused start and its own monitor. A definition that says any of this itself
is refused when the configuration is loaded, each with a sentence of its own. The list of options is closed: an option
that this module does not know could hide any of them.

Pure code. Options: QEMU's qemu-options.hx, 7.2 to 10.0. QEMU takes options with one hyphen or two, and an option's
value is always the next word, whatever it looks like.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from common.errors import InvalidInput, Reason

MONITOR = "qmp.sock"  # in the launch's folder, which is the machine's working directory
GODH_FILE = "godh.b64"
SESSION_FILE = "session.b64"
LAUNCH_FILE = "launch.cfg"
OBJECT_ID = "sevattest0"


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Options without a value.
_FLAGS = _words(
    """S s enable-kvm full-screen mem-prealloc no-acpi no-fd-bootchk no-hpet no-reboot no-shutdown no-user-config
    nodefaults nographic only-migratable portrait semihosting singlestep snapshot usb win2k-hack"""
)
# Options with a value, about which the agent has no opinion or a rule below.
_VALUES = _words(
    """D L M accel acpitable action add-fd append audio audiodev blockdev boot cdrom chardev compat cpu d debugcon
    device dfilter display drive dtb echr fda fdb fsdev fw_cfg gdb global hda hdb hdc hdd icount initrd iscsi k kernel m
    machine mem-path mon monitor msg name net netdev nic numa object overcommit parallel pidfile qmp qmp-pretty rtc
    run-with sandbox sd seed semihosting-config serial smbios smp spice tpmdev trace usbdevice uuid vga virtfs vnc
    watchdog watchdog-action"""
)
_REFUSED = {
    "bios": "-bios is not measured; name the image as the guest's firmware",
    "pflash": "the firmware's flash drive is the agent's; name the image as the guest's firmware",
    "daemonize": "the agent must keep its machine's process; leave -daemonize out",
    "readconfig": "-readconfig hides what it reads from the agent's checks; write its options out",
    "writeconfig": "-writeconfig does not start a machine",
    "set": "-set could change the agent's sev-guest object; write the option out where it belongs",
    "incoming": "a launch is measured when it starts; a migration cannot be attested",
    "loadvm": "a launch is measured when it starts; a snapshot cannot be attested",
    "preconfig": "-preconfig stops before the machine exists; leave it out",
    "qtest": "-qtest replaces the machine's processor by a test",
    "qtest-log": "-qtest-log replaces the machine's processor by a test",
    "chroot": "-chroot would take the agent's files out of the machine's reach",
    "version": "-version does not start a machine",
    "h": "-h does not start a machine",
    "help": "-help does not start a machine",
}
# Keys of the sev-guest object, wherever they are hidden.
_SESSION_KEYS = frozenset(
    {"policy", "session-file", "dh-cert-file", "handle", "kernel-hashes", "launch-secret", "sev-device", "cbitpos"}
)
_GUEST_OBJECTS = ("sev-", "tdx-", "s390-pv-", "pef-", "rme-")
_MACHINE_KEYS = {
    "confidential-guest-support": "the machine's link to the sev-guest object is the agent's",
    "memory-encryption": "the machine's link to the sev-guest object is the agent's",
    "kernel": "name the kernel with -kernel, or its hash would not be measured",
    "initrd": "name the initrd with -initrd",
    "append": "name the command line with -append",
    "shim": "a shim is not measured",
    "firmware": "-bios is not measured; name the image as the guest's firmware",
    "pflash0": "the firmware's flash drive is the agent's; name the image as the guest's firmware",
    "pflash1": "a second flash drive is not measured; the guest's firmware must be stateless",
}
# Options that make a socket, a pipe or a file, and how they name it.
_CHANNELS = _words("qmp qmp-pretty monitor chardev serial parallel debugcon gdb")
_CHANNEL_PREFIXES = ("unix:", "file:", "pipe:")
_OUTPUTS = _words("D pidfile")
_INPUTS = _words("kernel initrd dtb")
_CONFIG_PATH_MAX = 900


@dataclass(frozen=True, kw_only=True)
class MachineOptions:
    """What the agent adds for one launch.

    Attributes:
        firmware: the guest's firmware image.
        cbitpos: position of the encryption bit in guest page tables.
        reduced_phys_bits: physical address bits that encryption costs.
        policy: the guest policy, 32 bits.
    """

    firmware: PurePath
    cbitpos: int
    reduced_phys_bits: int
    policy: int


def check_definition(where: str, args: Sequence[str], *, state_dir: PurePath) -> None:
    """Check the arguments of a guest's definition.

    Args:
        where: the key in the configuration, for messages.
        args: QEMU's arguments.
        state_dir: the agent's own folder, in which a definition has nothing to look for.

    Raises:
        InvalidInput: `INVALID_CONFIGURATION`; names the argument and says why.
    """
    for index, name, value in _checked(where, args):

        def refuse(why: str, index: int = index) -> InvalidInput:
            return _refused(f"{where}[{index}]", why)

        if name in _CHANNELS:
            _check_outside(_channel_paths(value), state_dir, refuse)
        if name in _OUTPUTS:
            _check_outside([value], state_dir, refuse)
        if name in _INPUTS and not PurePath(value).is_absolute():
            raise refuse(f"-{name} {value}: must be an absolute path; a machine runs in its launch's own folder")


def check_options(
    where: str, args: Sequence[str], *, flags: frozenset[str], values: frozenset[str]
) -> list[tuple[str, str]]:
    """Check the arguments of a machine that somebody else starts; its files and sockets are its own business.

    Args:
        where: what they are, for messages.
        args: QEMU's arguments.
        flags: options without a value that are allowed here, whatever a definition may say.
        values: options with a value that are allowed here.

    Returns:
        Name and value of each option.

    Raises:
        InvalidInput: `INVALID_CONFIGURATION`; names the argument and says why.
    """
    return [(name, value) for _, name, value in _checked(where, args, flags, values)]


def command_line(program: Sequence[str], args: Sequence[str], options: MachineOptions) -> list[str]:
    """The whole command line of a paused machine.

    Args:
        program: the program and its own leading arguments.
        args: the definition's arguments, checked.
        options: what the agent adds.
    """
    words = list(args)
    machine = [i for i, name, _ in _options("args", args) if name in {"machine", "M"}]
    link = f"confidential-guest-support={OBJECT_ID}"
    if machine:
        words[machine[-1] + 1] += f",{link}"
    else:
        words += ["-machine", f"q35,{link}"]
    # Without this the hashes of kernel, initrd and command line are not measured.
    has_kernel = any(name == "kernel" for _, name, _ in _options("args", args))
    sev_guest = ",".join(
        [
            f"sev-guest,id={OBJECT_ID}",
            f"cbitpos={options.cbitpos}",
            f"reduced-phys-bits={options.reduced_phys_bits}",
            f"policy=0x{options.policy:x}",
            f"dh-cert-file={GODH_FILE}",
            f"session-file={SESSION_FILE}",
            *(["kernel-hashes=on"] if has_kernel else []),
        ]
    )
    firmware = str(options.firmware).replace(",", ",,")
    return [
        *program,
        *words,
        "-drive",
        f"if=pflash,format=raw,unit=0,readonly=on,file={firmware}",
        "-object",
        sev_guest,
        "-S",
        "-qmp",
        f"unix:{MONITOR},server=on,wait=off",
    ]


def launch_file(options: MachineOptions, inputs: PurePath) -> str:
    """The same for a machine that somebody else starts: a configuration file for QEMU's `-readconfig`.

    It holds the sev-guest object, the machine's link to it and the firmware's flash drive. What is left to whoever
    starts the machine is `-readconfig FILE`, `-S` and a monitor. `kernel-hashes=on` says nothing where there is no
    `-kernel`.

    Args:
        options: what the agent adds.
        inputs: absolute, the folder with the owner's files.

    Raises:
        InvalidInput: `INVALID_CONFIGURATION`; a path cannot be written into such a file.
    """
    sections = {
        f'object "{OBJECT_ID}"': {
            "qom-type": "sev-guest",
            "cbitpos": str(options.cbitpos),
            "reduced-phys-bits": str(options.reduced_phys_bits),
            "policy": f"0x{options.policy:x}",
            "dh-cert-file": str(inputs / GODH_FILE),
            "session-file": str(inputs / SESSION_FILE),
            "kernel-hashes": "on",
        },
        "machine": {"confidential-guest-support": OBJECT_ID},
        "drive": {"if": "pflash", "format": "raw", "unit": "0", "readonly": "on", "file": str(options.firmware)},
    }
    for path in (str(inputs), str(options.firmware)):
        # Its values stand in quotes, there is no escape for one, and a line ends at 1023 bytes (util/qemu-config.c).
        if '"' in path or not path.isprintable() or len(path.encode()) > _CONFIG_PATH_MAX:
            raise _refused(path, "this path cannot stand in a configuration file of QEMU's")
    return "\n".join(
        f"[{section}]\n" + "".join(f'  {key} = "{value}"\n' for key, value in keys.items())
        for section, keys in sections.items()
    )


def _checked(
    where: str, args: Sequence[str], flags: frozenset[str] = frozenset(), values: frozenset[str] = frozenset()
) -> Iterator[tuple[int, str, str]]:
    """The options, each by the rule that there is for it."""
    for index, name, value in _options(where, args, flags, values):

        def refuse(why: str, index: int = index) -> InvalidInput:
            return _refused(f"{where}[{index}]", why)

        rule = _RULES.get(name)
        if rule is not None:
            rule(value, refuse)
        yield index, name, value


def _options(
    where: str, args: Sequence[str], flags: frozenset[str] = frozenset(), values: frozenset[str] = frozenset()
) -> Iterator[tuple[int, str, str]]:
    """Index, name and value of each option, as QEMU reads the line."""
    index = 0
    while index < len(args):
        word, place = args[index], f"{where}[{index}]"
        if "\0" in word:
            raise _refused(place, "holds a zero byte")
        if not word.startswith("-") or word == "-":
            raise _refused(place, f"{word!r} is no option; name a disk with -drive")
        name = word.removeprefix("-").removeprefix("-")
        if name in _REFUSED and name not in flags | values:
            raise _refused(place, _REFUSED[name])
        if name in _FLAGS or name in flags:
            yield index, name, ""
            index += 1
            continue
        if name not in _VALUES and name not in values:
            raise _refused(place, f"{word}: the agent does not know this option, so it cannot check it")
        if index + 1 == len(args):
            raise _refused(place, f"{word} needs a value")
        if "\0" in args[index + 1]:
            raise _refused(f"{where}[{index + 1}]", "holds a zero byte")
        yield index, name, args[index + 1]
        index += 2


def _pairs(value: str) -> list[tuple[str, str]]:
    """QEMU's `first,key=value,…` with `,,` for a comma; the first may lack its key."""
    pairs: list[tuple[str, str]] = []
    for part in value.replace(",,", "\0").split(","):
        key, found, text = part.partition("=")
        pairs.append((key.strip(), text.replace("\0", ",")) if found else ("", part.replace("\0", ",")))
    return pairs


_Refuse = Callable[[str], InvalidInput]


def _check_object(value: str, refuse: _Refuse) -> None:
    if value.lstrip().startswith("{"):
        try:
            described = json.loads(value)
        except (ValueError, RecursionError):
            described = None
        if not isinstance(described, dict):
            raise refuse("-object: this is not a JSON object")
        pairs = [(str(key), str(text)) for key, text in described.items()]
    else:
        pairs = _pairs(value)
        pairs[:1] = [(key or "qom-type", text) for key, text in pairs[:1]]
    # Whichever of several QEMU takes.
    kinds = [text for key, text in pairs if key == "qom-type"]
    kind = next((kind for kind in kinds if kind.startswith(_GUEST_OBJECTS)), None)
    if kind is not None:
        raise refuse(f"-object {kind}: the agent makes the guest's object itself, from the owner's session")
    if ("id", OBJECT_ID) in pairs:
        raise refuse(f"-object: the id {OBJECT_ID} is the agent's own")
    _check_session_keys("-object", pairs, refuse)


def _check_machine(value: str, refuse: _Refuse) -> None:
    if value.lstrip().startswith("{"):
        raise refuse("-machine: write it as key=value")
    # QEMU takes an underscore for a hyphen here (util/keyval.c, keyval_dashify).
    pairs = [(key.replace("_", "-"), text) for key, text in _pairs(value)]
    for key, _ in pairs:
        if key in _MACHINE_KEYS:
            raise refuse(f"-machine {key}=: {_MACHINE_KEYS[key]}")
    _check_session_keys("-machine", pairs, refuse)


def _check_global(value: str, refuse: _Refuse) -> None:
    # `driver.property=value` or `driver=…,property=…,value=…`
    if any(kind in value for kind in _GUEST_OBJECTS):
        raise refuse("-global: the guest's object is the agent's own")
    pairs = [(key.rpartition(".")[2], text) for key, text in _pairs(value)]
    pairs += [(text, "") for key, text in pairs if key == "property"]
    _check_session_keys("-global", pairs, refuse)


def _check_run_with(value: str, refuse: _Refuse) -> None:
    if any(key == "chroot" for key, _ in _pairs(value)):
        raise refuse("-run-with chroot=: would take the agent's files out of the machine's reach")


def _check_drive(value: str, refuse: _Refuse) -> None:
    if ("if", "pflash") in _pairs(value):
        raise refuse(
            "-drive if=pflash: the firmware's flash drive is the agent's, and a second one is not measured; "
            "name the image as the guest's firmware"
        )


def _check_session_keys(option: str, pairs: Sequence[tuple[str, str]], refuse: _Refuse) -> None:
    for key, _ in pairs:
        if key in _SESSION_KEYS:
            raise refuse(f"{option} {key}=: policy, session and handle come from the owner, launch by launch")


def _channel_paths(value: str) -> list[str]:
    """Files and sockets that a character device makes."""
    pairs = _pairs(value)
    first_key, first = pairs[0]
    first = first.removeprefix("mon:")  # shared with a monitor
    paths = [text for key, text in pairs if key == "path"]
    return paths + [
        first.removeprefix(prefix) for prefix in _CHANNEL_PREFIXES if not first_key and first.startswith(prefix)
    ]


def _check_outside(paths: Sequence[str], state_dir: PurePath, refuse: _Refuse) -> None:
    """Refuse a path where the agent's own files are: its monitor's among them."""
    for path in map(PurePath, paths):
        if not path.is_absolute() or ".." in path.parts or path.is_relative_to(state_dir):
            raise refuse(
                f"{path}: the agent's own monitor and files are there; use an absolute path outside of state_dir"
            )


_RULES: dict[str, Callable[[str, _Refuse], None]] = {
    "object": _check_object,
    "machine": _check_machine,
    "M": _check_machine,
    "global": _check_global,
    "drive": _check_drive,
    "run-with": _check_run_with,
}


def _refused(place: str, why: str) -> InvalidInput:
    return InvalidInput(Reason.INVALID_CONFIGURATION, f"{place}: {why}", key=place)
