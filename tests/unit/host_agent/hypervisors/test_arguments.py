"""QEMU's command line: what a definition may not say, and what the agent adds."""

from __future__ import annotations

from pathlib import PurePath

import pytest

from common.errors import InvalidInput, Reason
from host_agent.hypervisors.arguments import MachineOptions, check_definition, command_line

STATE = PurePath("/var/lib/sev-host-agent")
OPTIONS = MachineOptions(firmware=PurePath("/fw/OVMF.fd"), cbitpos=47, reduced_phys_bits=5, policy=0x1600000F)


def check(*args: str) -> None:
    check_definition("guests.web.args", args, state_dir=STATE)


SEV_GUEST = (
    "sev-guest,id=sevattest0,cbitpos=47,reduced-phys-bits=5,policy=0x1600000f,"
    "dh-cert-file=godh.b64,session-file=session.b64"
)

ACCEPTED = [
    (),
    ("-machine", "q35", "-m", "4G", "-smp", "4", "-cpu", "EPYC-Rome", "-nodefaults", "-no-user-config"),
    ("-S", "--S", "-no-reboot", "--display", "none"),
    ("-kernel", "/boot/vmlinuz", "-initrd", "/boot/initrd", "-append", "console=ttyS0 policy=1 -bios -S"),
    ("-append", "-daemonize"),
    ("-name", "-pflash"),
    ("-serial", "file:/var/log/guest.log", "-pidfile", "/run/guest.pid"),
    ("-qmp", "unix:/run/ops/guest.qmp,server=on,wait=off"),
    ("-chardev", "socket,id=mon,path=/run/ops/guest.mon,server=on,wait=off", "-mon", "chardev=mon,mode=control"),
    ("-drive", "if=virtio,file=/srv/disk,,1.qcow2", "-object", "rng-random,id=rng0,filename=/dev/urandom"),
    ("-object", '{"qom-type": "memory-backend-memfd", "id": "ram0", "size": 1024}'),
    ("-machine", "q35,kernel-irqchip=split,memory-backend=ram0"),
    ("-global", "kvm-pit.lost_tick_policy=discard", "-run-with", "async-teardown=on"),
    ("-monitor", "none", "-serial", "stdio"),
    ("-serial", "mon:stdio", "-machine", "q35,kernel_irqchip=split"),
]


@pytest.mark.parametrize("args", ACCEPTED)
def test_an_ordinary_definition_is_accepted(args: tuple[str, ...]) -> None:
    check(*args)


REFUSED = [
    (("-object", "sev-guest,id=sev0,policy=1"), "makes the guest's object itself"),
    (("--object", "sev-guest,id=sev0"), "makes the guest's object itself"),
    (("-object", "sev-snp-guest,id=sev0"), "makes the guest's object itself"),
    (("-object", "qom-type=sev-guest,id=sev0"), "makes the guest's object itself"),
    (("-object", "qom-type=rng-builtin,qom-type=sev-guest,id=sev0"), "makes the guest's object itself"),
    (("-object", '{"qom-type": "sev-guest", "id": "sev0"}'), "makes the guest's object itself"),
    (("-object", '{"qom-type": "rng-builtin", "id": "sevattest0"}'), "is the agent's own"),
    (("-object", "rng-builtin,id=sevattest0"), "is the agent's own"),
    (("-object", "{nonsense"), "not a JSON object"),
    (("-object", "{"), "not a JSON object"),
    (("-object", "iothread,id=x,session-file=/s"), "come from the owner"),
    (("-machine", "q35,confidential-guest-support=sev0"), "link to the sev-guest object"),
    (("-M", "memory-encryption=sev0"), "link to the sev-guest object"),
    (("-machine", "q35,confidential_guest_support=sev0"), "link to the sev-guest object"),
    (("-M", "memory_encryption=sev0"), "link to the sev-guest object"),
    (("-machine", "q35,kernel=/boot/vmlinuz"), "-kernel"),
    (("-machine", "q35,pflash0=node0"), "flash drive"),
    (("-machine", "q35,pflash1=node1"), "stateless"),
    (("-machine", "q35,firmware=OVMF.fd"), "not measured"),
    (("-machine", "q35,policy=1"), "come from the owner"),
    (("-machine", '{"type": "q35"}'), "key=value"),
    (("-global", "sev-guest.policy=1"), "the agent's own"),
    (("-global", "driver=sev-guest,property=policy,value=1"), "the agent's own"),
    (("-global", "x.dh-cert-file=/g"), "come from the owner"),
    (("-global", "driver=x,property=handle,value=1"), "come from the owner"),
    (("-bios", "OVMF.fd"), "not measured"),
    (("-pflash", "OVMF.fd"), "flash drive"),
    (("-drive", "file=/x,if=pflash,unit=1"), "not measured"),
    (("-drive", "if=pflash,format=raw,file=/x"), "not measured"),
    (("-daemonize",), "leave -daemonize out"),
    (("-readconfig", "/etc/qemu.cfg"), "hides"),
    (("-set", "object.sevattest0.policy=0"), "-set could change"),
    (("-incoming", "defer"), "migration"),
    (("-loadvm", "x"), "snapshot"),
    (("-preconfig",), "leave it out"),
    (("-chroot", "/x"), "reach"),
    (("-run-with", "chroot=/x"), "reach"),
    (("-qtest", "stdio"), "test"),
    (("-help",), "does not start"),
    (("-qmp", "unix:qmp.sock,server=on,wait=off"), "the agent's own monitor"),
    (("-qmp", f"unix:{STATE}/launches/x/qmp.sock,server"), "the agent's own monitor"),
    (("-monitor", "unix:other.sock,server"), "the agent's own monitor"),
    (("-qmp", f"unix:/run/../{STATE}/x,server"), "the agent's own monitor"),
    (("-chardev", "socket,id=a,path=qmp.sock,server=on"), "the agent's own monitor"),
    (("-serial", "file:record.json"), "the agent's own"),
    (("-serial", "mon:unix:qmp.sock,server=on"), "the agent's own monitor"),
    (("-D", f"{STATE}/lock"), "the agent's own"),
    (("-pidfile", "pid"), "the agent's own"),
    (("-kernel", "vmlinuz"), "absolute"),
    (("-initrd", "./initrd"), "absolute"),
    (("-frobnicate", "x"), "does not know this option"),
    (("---S",), "does not know this option"),
    (("-append",), "needs a value"),
    (("disk.img",), "no option"),
    (("-",), "no option"),
    (("-m", "1G\0"), "zero byte"),
    (("-S\0",), "zero byte"),
]


@pytest.mark.parametrize(("args", "words"), REFUSED, ids=[" ".join(args)[:50] for args, _ in REFUSED])
def test_a_definition_that_says_the_agents_part_is_refused_with_a_sentence(args: tuple[str, ...], words: str) -> None:
    with pytest.raises(InvalidInput, match=words) as refusal:
        check("-m", "1G", *args)
    assert refusal.value.reason is Reason.INVALID_CONFIGURATION
    assert refusal.value.message.startswith("guests.web.args[")


def test_the_refusal_names_the_argument() -> None:
    with pytest.raises(InvalidInput) as refusal:
        check("-m", "1G", "-S", "-bios", "x")
    assert refusal.value.fields["key"] == "guests.web.args[3]"


def test_the_agent_adds_session_firmware_pause_and_monitor() -> None:
    line = command_line(["/usr/bin/qemu"], ["-m", "1G"], OPTIONS)
    assert line == [
        "/usr/bin/qemu",
        "-m",
        "1G",
        "-machine",
        "q35,confidential-guest-support=sevattest0",
        "-drive",
        "if=pflash,format=raw,unit=0,readonly=on,file=/fw/OVMF.fd",
        "-object",
        SEV_GUEST,
        "-S",
        "-qmp",
        "unix:qmp.sock,server=on,wait=off",
    ]


@pytest.mark.parametrize("option", ["-machine", "-M", "--machine"])
def test_the_definitions_own_machine_is_linked_to_the_session(option: str) -> None:
    line = command_line(["qemu"], [option, "q35,smm=off", "-m", "1G"], OPTIONS)
    assert line[1:3] == [option, "q35,smm=off,confidential-guest-support=sevattest0"]
    assert not any("q35" in word for word in line[3:])


def test_a_machine_in_a_value_is_not_taken_for_the_option() -> None:
    line = command_line(["qemu"], ["-append", "-machine"], OPTIONS)
    assert line[1:3] == ["-append", "-machine"]
    assert "q35,confidential-guest-support=sevattest0" in line


def test_kernel_hashes_are_measured_where_there_is_a_kernel() -> None:
    with_kernel = command_line(["qemu"], ["-kernel", "/k"], OPTIONS)
    assert any(word.startswith("sev-guest,") and word.endswith(",kernel-hashes=on") for word in with_kernel)
    without = command_line(["qemu"], ["-append", "-kernel"], OPTIONS)
    assert not any("kernel-hashes" in word for word in without)


def test_a_comma_in_the_firmwares_path_is_doubled_as_qemu_wants_it() -> None:
    options = MachineOptions(firmware=PurePath("/fw/a,if=none"), cbitpos=1, reduced_phys_bits=1, policy=1)
    assert "if=pflash,format=raw,unit=0,readonly=on,file=/fw/a,,if=none" in command_line(["qemu"], [], options)
