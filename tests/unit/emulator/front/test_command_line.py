"""QEMU's command line as the front reads it: what it takes for itself, and what is left for the real QEMU."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from emulator.errors import MachineDied
from emulator.front.channel_spec import Kind
from emulator.front.command_line import _FLAGS, DEFAULT_RAM, RAM_FD, LeftToQemu, Plan, read
from tests.support.real_qemu import installed_qemu, newer_qemu

SEV = ("-object", "sev-guest,id=sev0,cbitpos=51,reduced-phys-bits=1,policy=0x5,dh-cert-file=g,session-file=s")
LINK = ("-machine", "q35,confidential-guest-support=sev0")


def plan(*more: str) -> Plan:
    return read([*LINK, *SEV, *more])


def left(*words: str) -> tuple[str, ...]:
    with pytest.raises(LeftToQemu) as caught:
        read(words)
    return caught.value.words


def test_sev_is_taken_out_and_all_else_passes_as_it_stands() -> None:
    found = plan("-name", "x,process=y", "-nosuch", "disk.img", "--nodefaults", "-device", "-S", "-smp", "4")
    assert found.words == (
        *("-machine", "type=q35", "-name", "x,process=y", "-nosuch", "disk.img", "--nodefaults"),
        *("-device", "-S", "-smp", "4"),
    )
    assert not found.paused
    assert (found.sev.policy, found.sev.cbitpos, found.sev.godh_file) == (5, 51, Path("g"))


@pytest.mark.parametrize(
    "words",
    [
        [*LINK, *SEV],
        ["-M", "q35", "-M", "memory-encryption=sev0", *SEV],
        [*SEV, "-machine", "confidential-guest-support=nope", *LINK],
        [
            *LINK,
            "-object",
            '{"qom-type": "sev-guest", "id": "sev0", "cbitpos": 51, "reduced-phys-bits": 1, "policy": 5}',
        ],
        [*LINK, *SEV, "-accel", "kvm"],
        [*LINK, *SEV, "-accel", "kvm,kernel-irqchip=split", "-accel", "tcg"],
        [*LINK, *SEV, "-enable-kvm"],
        [*LINK, *SEV, "-machine", "accel=tcg", "-machine", "accel=kvm:tcg"],
        [*LINK, *(word.replace("0x5", "05") for word in SEV)],
        [*LINK, *(word.replace("0x5", "5") for word in SEV)],
    ],
)
def test_a_sev_guest_is_found_in_every_spelling(words: list[str]) -> None:
    found = read(words)
    assert (found.sev.policy, found.sev.cbitpos) == (5, 51)
    text = " ".join(found.words)
    assert not [word for word in ("sev", "kvm", "tcg", "confidential", "encryption") if word in text]


@pytest.mark.parametrize(
    "words",
    [
        ["-machine", "q35", *SEV],
        [*LINK],
        ["-machine", "q35,confidential-guest-support=other", *SEV],
        [*LINK, "-object", "sev-snp-guest,id=sev0,cbitpos=51,reduced-phys-bits=1"],
        [*LINK, "-object", "sev-guest,id=sev0,cbitpos=51"],
        [*LINK, *(word.replace("policy=0x5", "policy=0x5,launch-secret=x") for word in SEV)],
        [*LINK, *(word.replace("0x5", "five") for word in SEV)],
        [*LINK, *(word.replace("0x5", "1_5") for word in SEV)],
        [*LINK, *(word.replace("0x5", "08") for word in SEV)],
        [*LINK, *(word.replace("0x5", "-1") for word in SEV)],
        [*LINK, *SEV, "-accel", "tcg"],
        [*LINK, *SEV, "-accel", "tcg", "-accel", "kvm"],
        [*LINK, *SEV, "-machine", "accel=tcg:kvm"],
        [*LINK, *SEV, "-machine", "accel=kvm", "-machine", "accel=tcg"],
    ],
)
def test_a_line_without_one_is_qemus_own_but_for_the_accelerator(words: list[str]) -> None:
    found = left(*words)
    assert found[-2:] == ("-accel", "tcg")
    assert [word for word in words if word.startswith("sev-")] == [word for word in found if word.startswith("sev-")]
    assert found.count("-accel") == 1
    assert "accel=" not in " ".join(found)


@pytest.mark.parametrize("words", [["-accel", "help"], ["-machine", "help"], ["-M", "?"]])
def test_a_question_is_handed_on_as_it_stands(words: list[str]) -> None:
    line = (*LINK, *SEV, *words)
    assert left(*line) == line


def test_two_ways_to_name_the_accelerator_exclude_each_other() -> None:
    with pytest.raises(MachineDied, match="incompatible"):
        plan("-machine", "accel=kvm", "-accel", "kvm")


def test_what_the_front_does_itself_does_not_reach_qemu() -> None:
    found = plan(
        "-S", "-daemonize", "-pidfile", "p", "-cpu", "host,-svm", "-kernel", "k", "-initrd", "i", "-append", "a b"
    )
    assert (found.paused, found.daemonize, found.pid_file) == (True, True, Path("p"))
    assert (found.cpu, found.kernel, found.initrd, found.append) == (("host", "-svm"), Path("k"), Path("i"), "a b")
    assert found.words == ("-machine", "type=q35", "-initrd", "i", "-append", "a b")
    other = plan("-machine", "kernel=k,initrd=i,append=a,,b")
    assert (other.kernel, other.initrd, other.append) == (Path("k"), Path("i"), "a,b")
    assert other.words == ("-machine", "type=q35", "-machine", "initrd=i,append=a,,b")


def test_an_option_that_lacks_its_value_is_left_for_qemu_to_complain_of() -> None:
    for option in ("-kernel", "-m", "-cpu", "-qmp", "-machine", "-object", "-name"):
        assert plan(option).words[-1] == option


def test_proxmox_ves_own_words_are_dropped() -> None:
    found = read(["-id", "100", "-machine", "hpet=off,type=q35+pve0", *SEV, "-machine", "memory-encryption=sev0"])
    assert found.words == ("-machine", "hpet=off,type=q35")
    assert found.machine == "q35"


@pytest.mark.parametrize(
    ("words", "ram", "total"),
    [
        ([], DEFAULT_RAM, DEFAULT_RAM),
        (["-m", "256"], 256 << 20, 256 << 20),
        (["-m", "size=1G,slots=2,maxmem=4G"], 1 << 30, 1 << 30),
        (["-m", "1", "-m", "2k"], 2 << 10, 2 << 10),
        (["-m", "none"], DEFAULT_RAM, DEFAULT_RAM),
        (["-mem-path", "/x", "-mem-prealloc", "-m", "64"], 64 << 20, 64 << 20),
    ],
)
def test_ram_is_as_large_as_the_line_says(words: list[str], ram: int, total: int) -> None:
    found = plan(*words)
    assert (found.ram, found.total_ram, found.ram_named) == (ram, total, False)
    assert "mem-path" not in " ".join(found.words)


def test_ram_that_the_line_names_is_the_fronts_all_the_same() -> None:
    named = plan("-object", "memory-backend-file,id=m,size=64M,mem-path=/x,share=on", "-machine", "memory-backend=m")
    assert (named.ram, named.total_ram, named.ram_named) == (64 << 20, 64 << 20, True)
    assert f"memory-backend-file,id=m,size={64 << 20},mem-path=/proc/self/fd/{RAM_FD},share=on" in named.words
    nodes = plan(
        *("-object", "memory-backend-ram,id=a,size=64M", "-object", "memory-backend-ram,id=b,size=32M", "-m", "96"),
        *("-numa", "node,memdev=a", "-numa", "node,memdev=b"),
    )
    assert (nodes.ram, nodes.total_ram, nodes.ram_named) == (64 << 20, 96 << 20, True)
    assert "memory-backend-ram,id=b,size=32M" in nodes.words
    assert plan("-machine", "max-ram-below-4g=1G").low_ram_limit == 1 << 30


CHARDEV = ("-chardev", "socket,id=c,path=p,server=on,wait=off")


@pytest.mark.parametrize(
    ("words", "kind", "address", "facts"),
    [
        (["-qmp", "unix:p,server=on,wait=off"], Kind.UNIX, "p", (True, False, None, False)),
        (["-qmp", "unix:p,server,nowait"], Kind.UNIX, "p", (True, False, None, False)),
        (["-qmp", "unix:p,server"], Kind.UNIX, "p", (True, True, None, False)),
        (["-qmp", "unix:p"], Kind.UNIX, "p", (False, False, None, False)),
        (["-qmp", "unix:p,server=on,wait=off,abstract=on"], Kind.UNIX, "\0p", (True, False, None, False)),
        (["-qmp-pretty", "unix:p,,q,server=on,wait=off"], Kind.UNIX, "p,q", (True, False, None, True)),
        (["-qmp", "tcp:localhost:1,server=on,wait=off"], Kind.TCP, "localhost:1", (True, False, None, False)),
        (["-qmp", "tcp:[::1]:1,server=on"], Kind.TCP, "[::1]:1", (True, True, None, False)),
        (["-qmp", "stdio"], Kind.STDIO, "", (True, False, None, False)),
        ([*CHARDEV, "-mon", "chardev=c,mode=control"], Kind.UNIX, "p", (True, False, None, False)),
        (["-mon", "c,mode=control,pretty=on", *CHARDEV], Kind.UNIX, "p", (True, False, None, True)),
        ([*CHARDEV, "-mon", "c,mode=control,pretty=yes"], Kind.UNIX, "p", (True, False, None, True)),
        ([*CHARDEV, "-qmp", "chardev:c"], Kind.UNIX, "p", (True, False, None, False)),
        ([*CHARDEV, "-qmp-pretty", "chardev:c"], Kind.UNIX, "p", (True, False, None, True)),
        (["-chardev", "socket,id=c,path=p,reconnect=5", "-qmp", "chardev:c"], Kind.UNIX, "p", (False, False, 5, False)),
        (
            ["-chardev", "socket,id=c,path=p,reconnect-ms=250", "-qmp", "chardev:c"],
            Kind.UNIX,
            "p",
            (False, False, 0.25, False),
        ),
        (
            ["-chardev", "socket,id=c,path=p,reconnect=0", "-qmp", "chardev:c"],
            Kind.UNIX,
            "p",
            (False, False, None, False),
        ),
        (
            ["-chardev", "socket,id=c,fd=7,server=on,wait=off", "-qmp", "chardev:c"],
            Kind.FD,
            "7",
            (True, False, None, False),
        ),
        (["-chardev", "socket,id=c,host=h,port=1", "-qmp", "chardev:c"], Kind.TCP, "h:1", (False, False, None, False)),
        (["-chardev", "stdio,id=c", "-qmp", "chardev:c"], Kind.STDIO, "", (True, False, None, False)),
    ],
)
def test_a_control_monitor_is_the_fronts_in_every_spelling(
    words: list[str], kind: Kind, address: str, facts: tuple[bool, bool, float | None, bool]
) -> None:
    found = plan(*words)
    (channel,) = found.monitors
    assert (channel.kind, channel.address) == (kind, address)
    assert (channel.server, channel.wait, channel.reconnect, channel.pretty) == facts
    assert found.words == ("-machine", "type=q35")


@pytest.mark.parametrize(
    "words",
    [
        ["-monitor", "unix:p,server=on,wait=off"],
        [*CHARDEV, "-mon", "chardev=c,mode=readline"],
        [*CHARDEV, "-mon", "chardev=c"],
        [*CHARDEV, "-serial", "chardev:c"],
        ["-mon", "mode=control"],
    ],
)
def test_what_is_no_control_monitor_is_left_for_qemu(words: list[str]) -> None:
    found = plan(*words)
    assert found.monitors == ()
    assert list(found.words[2:]) == words


def test_monitors_on_nothing_and_several_of_them() -> None:
    assert plan("-qmp", "none", "-qmp", "null").monitors == ()
    assert [channel.kind for channel in plan("-qmp", "unix:p,server=on", "-qmp", "stdio").monitors] == [
        Kind.UNIX,
        Kind.STDIO,
    ]


@pytest.mark.parametrize(
    "words",
    [
        ["-qmp", "pty"],
        ["-qmp", "mon:stdio"],
        ["-qmp", "unix:,server=on"],
        ["-qmp", "tcp:h:1,server=on,telnet=on"],
        ["-qmp", "chardev:none"],
        ["-mon", "chardev=none,mode=control"],
        ["-chardev", "pipe,id=c,path=p", "-qmp", "chardev:c"],
        ["-chardev", "socket,id=c,path=p,websocket=on", "-qmp", "chardev:c"],
        ["-chardev", "socket,id=c,host=h,port=1,tls-creds=x", "-qmp", "chardev:c"],
    ],
)
def test_a_monitor_that_the_front_cannot_stand_before_ends_it_and_names_the_option(words: list[str]) -> None:
    with pytest.raises(MachineDied) as caught:
        plan(*words)
    assert caught.value.lines[0].startswith(f"{words[0]} {words[1]}: ")


@pytest.mark.parametrize("which", [installed_qemu, newer_qemu])
def test_the_options_without_a_value_are_those_of_the_real_qemu(which: Callable[[], str]) -> None:
    told = subprocess.run([which(), "-help"], capture_output=True, text=True, check=True).stdout
    flags: set[str] = set()
    others: set[str] = set()
    for line in told.splitlines():
        # What a flag does stands two blanks behind it, or in the next line.
        if found := re.match(r"--?([A-Za-z0-9_-]+)(\s{2,}\S.*$|$)?", line):
            (others if found[2] is None else flags).add(found[1])
    odd = {"dtb", "h", "async-teardown"}  # laid out otherwise
    assert {"S", "nodefaults", "daemonize", "enable-kvm", "no-reboot"} <= flags - odd <= _FLAGS
    assert {"m", "qmp", "object", "kernel"} <= others
    assert not (others - odd) & _FLAGS
