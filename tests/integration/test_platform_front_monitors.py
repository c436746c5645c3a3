"""Command lines of scripts before a real QEMU: monitors in every spelling, daemons, a whole Proxmox VE line."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.eventually import wait_until
from tests.support.platform import Platform
from tests.support.qmp import TIMEOUT, QmpClient, running_machine
from tests.support.real_qemu import EACH_QEMU, qemu, version_of
from tests.support.sev_host import Host, guests, make_bootable_host, make_host, wait_for_no_guest

__all__ = ["qemu"]  # a fixture
SAID = b'{"execute": "qmp_capabilities"}{"execute": "query-sev", "id": "sev"}'


@pytest.fixture
def host(tmp_path: Path, platform: Platform) -> Host:
    return make_host(tmp_path, platform, 0xB)


def without_monitor(host: Host, *more: str) -> list[str]:
    words = host.arguments("-display", "none", *more)
    at = words.index("-qmp")
    return [*words[:at], *words[at + 2 :]]


@contextlib.contextmanager
def process(words: list[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A machine, ended in any case."""
    started = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
    try:
        yield started
    finally:
        started.kill()
        started.communicate()


def connected(attempt: Callable[[], socket.socket], machine: subprocess.Popen[bytes]) -> socket.socket:
    """A connection, once the machine listens."""
    deadline = time.monotonic() + TIMEOUT
    while True:
        try:
            return attempt()
        except (FileNotFoundError, ConnectionRefusedError):
            if machine.poll() is not None or time.monotonic() > deadline:
                machine.kill()
                raise AssertionError(machine.communicate()) from None
            time.sleep(0.01)


def to(family: int, address: object) -> Callable[[], socket.socket]:
    def attempt() -> socket.socket:
        client = socket.socket(family, socket.SOCK_STREAM)
        try:
            client.connect(address)  # type: ignore[arg-type]  # of whichever family
        except OSError:
            client.close()
            raise
        return client

    return attempt


def speaks(client: socket.socket) -> None:
    """A client is greeted, and hears of a SEV guest."""
    with client:
        client.settimeout(TIMEOUT)
        client.sendall(SAID)
        heard = b""
        while b'"sev"}' not in heard:
            data = client.recv(1 << 16)
            assert data, heard
            heard += data
    messages = [json.loads(line) for line in heard.splitlines()]
    assert "QMP" in messages[0]
    assert messages[-1]["return"]["enabled"] is True


def free_port() -> int:
    """A port that nobody has: none of those that the kernel gives away, or it could be somebody's before it is used."""
    while True:
        port = random.randrange(20_000, 32_000)  # noqa: S311 -- any will do
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


SERVERS = {
    "short": ["-qmp", "unix:PATH,server=on,wait=off"],
    "as in older times": ["-qmp", "unix:PATH,server,nowait"],
    "yes and no": ["-qmp", "unix:path=PATH,server=yes,wait=no"],
    "a device": ["-chardev", "socket,id=a,path=PATH,server=on,wait=off", "-mon", "chardev=a,mode=control"],
    "a device, first word bare": ["-chardev", "socket,id=a,path=PATH,server,nowait", "-mon", "a,mode=control"],
    "a monitor before its device": [
        "-mon",
        "chardev=a,mode=control",
        "-chardev",
        "socket,id=a,path=PATH,server=on,wait=off",
    ],
    "a device by its name": ["-chardev", "socket,id=a,path=PATH,server=on,wait=off", "-qmp", "chardev:a"],
    "beside a human one": ["-qmp", "unix:PATH,server=on,wait=off", "-monitor", "unix:PATH.hmp,server=on,wait=off"],
    "beside one on nothing": ["-qmp", "none", "-qmp", "null", "-qmp", "unix:PATH,server=on,wait=off"],
    "two dashes": ["--qmp", "unix:PATH,server=on,wait=off"],
    "a comma in its name": ["-qmp", "unix:PATH,,x,server=on,wait=off"],
}


@EACH_QEMU
@pytest.mark.parametrize("name", SERVERS)
def test_a_socket_is_a_monitor_in_every_spelling(host: Host, qemu: str, name: str) -> None:
    path = host.folder / "monitor"
    words = [word.replace("PATH", str(path)) for word in SERVERS[name]]
    address = f"{path},x" if "comma" in name else str(path)
    with process([*host.platform.front(qemu), *without_monitor(host, *words)]) as machine:
        for _ in range(2):
            speaks(connected(to(socket.AF_UNIX, address), machine))
        machine.terminate()
        assert machine.wait(30) == 0
    assert not Path(address).exists()


@EACH_QEMU
def test_tcp_and_abstract_sockets_are_monitors(host: Host, qemu: str) -> None:
    ports = free_port(), free_port(), free_port()
    name = f"sevattest-test-{os.getpid()}-{ports[0]}"
    words = [
        *("-qmp", f"tcp:127.0.0.1:{ports[0]},server=on,wait=off"),
        *("-chardev", f"socket,id=a,host=127.0.0.1,port={ports[1]},server=on,wait=off", "-mon", "a,mode=control"),
        *("-qmp", f"tcp:localhost:{ports[2]},server,nowait,ipv4=on"),
        *("-qmp", f"unix:{name},abstract=on,server=on,wait=off"),
    ]
    with process([*host.platform.front(qemu), *without_monitor(host, *words)]) as machine:
        for port in ports:
            speaks(connected(to(socket.AF_INET, ("127.0.0.1", port)), machine))
        speaks(connected(to(socket.AF_UNIX, f"\0{name}"), machine))


@EACH_QEMU
def test_standard_streams_are_a_monitor(host: Host, qemu: str) -> None:
    for words in (["-qmp", "stdio"], ["-chardev", "stdio,id=a,signal=off", "-mon", "chardev=a,mode=control"]):
        line = [*host.platform.front(qemu), *without_monitor(host, *words)]
        ended = subprocess.run(
            line, input=SAID + b'{"execute": "quit"}', capture_output=True, check=False, timeout=TIMEOUT
        )
        messages = [json.loads(text) for text in ended.stdout.splitlines()]
        assert messages[2]["return"]["enabled"] is True
        assert messages[-2]["event"] == "SHUTDOWN"
        assert messages[-1] == {"return": {}}
        assert ended.returncode == 0


@EACH_QEMU
def test_inherited_descriptors_are_monitors(host: Host, qemu: str) -> None:
    path = host.folder / "listening"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen(1)
        ours, theirs = socket.socketpair()
        words = [
            *("-chardev", f"socket,id=a,fd={listener.fileno()},server=on,wait=off", "-mon", "chardev=a,mode=control"),
            *("-chardev", f"socket,id=b,fd={theirs.fileno()}", "-mon", "chardev=b,mode=control"),
        ]
        line = [*host.platform.front(qemu), *without_monitor(host, *words)]
        with ours, process(line, pass_fds=(listener.fileno(), theirs.fileno())) as machine:
            theirs.close()
            speaks(ours)
            speaks(connected(to(socket.AF_UNIX, str(path)), machine))


@EACH_QEMU
def test_a_monitor_goes_to_its_peer_again_and_again(host: Host, qemu: str) -> None:
    path = host.folder / "peer"
    spellings = ["reconnect=1"] if version_of(qemu) < (9, 2) else ["reconnect-ms=200"]
    for reconnect in spellings:
        chardev = f"socket,id=a,path={path},{reconnect}"
        words = without_monitor(host, "-chardev", chardev, "-mon", "chardev=a,mode=control")
        with process([*host.platform.front(qemu), *words]) as machine:
            deadline = time.monotonic() + TIMEOUT
            while not guests(host.platform):  # it has begun without its peer
                assert machine.poll() is None
                assert time.monotonic() < deadline
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
                listener.settimeout(TIMEOUT)
                listener.bind(str(path))
                listener.listen(1)
                for _ in range(2):
                    speaks(listener.accept()[0])
        path.unlink()


@EACH_QEMU
def test_a_peer_that_is_there_is_reached_at_once_and_only_once(host: Host, qemu: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.settimeout(TIMEOUT)
        listener.bind(str(host.folder / "peer"))
        listener.listen(1)
        words = without_monitor(host, "-qmp", f"unix:{host.folder}/peer", "-qmp", f"unix:{host.qmp},server=on,wait=off")
        with process([*host.platform.front(qemu), *words]) as machine:
            speaks(listener.accept()[0])
            speaks(connected(to(socket.AF_UNIX, str(host.qmp)), machine))
            listener.settimeout(0.3)
            with pytest.raises(TimeoutError):
                listener.accept()


@EACH_QEMU
def test_a_monitor_that_is_waited_for_keeps_the_guest_from_running(host: Host, qemu: str) -> None:
    words = [word for word in without_monitor(host, "-qmp", f"unix:{host.qmp},server=on") if word != "-S"]
    info = b"info: QEMU waiting for connection on: disconnected:unix:"
    with process([*host.platform.front(qemu), *words]) as machine:
        assert machine.stderr is not None
        said = machine.stderr.readline()
        at = words.index("-object")
        plain = [word.replace(",confidential-guest-support=sev0", "") for word in [*words[:at], *words[at + 2 :]]]
        with connected(to(socket.AF_UNIX, str(host.qmp)), machine) as client:
            client.settimeout(TIMEOUT)
            assert client.recv(1)  # a QEMU that is starting may die of who leaves before its greeting
        with process([qemu, *plain, "-accel", "tcg"]) as alone:
            assert alone.stderr is not None
            assert said == alone.stderr.readline()
        assert info in said


@EACH_QEMU
def test_several_monitors_speak_at_once_and_all_hear_events(host: Host, qemu: str) -> None:
    more = [
        "-qmp",
        f"unix:{host.folder}/b,server=on,wait=off",
        "-qmp-pretty",
        f"unix:{host.folder}/c,server=on,wait=off",
    ]
    words = [*host.platform.front(qemu), *host.arguments("-display", "none", *more)]
    with (
        running_machine(words, host.folder / "c"),
        QmpClient(host.qmp) as first,
        QmpClient(host.folder / "b") as second,
    ):
        for client in (first, second):
            client.negotiate()
        assert first.ask("query-sev-launch-measure") == second.ask("query-sev-launch-measure")
        second.ask("cont")
        assert first.ask("query-sev")["state"] == "running"
        assert [event["event"] for event in first.events] == ["RESUME"]
        refused = first.refusal("sev-inject-launch-secret", packet_header="AAAA", secret="AAAA")
        assert refused == "SEV: Not in correct state. (LSECRET) 3"


# ---------------------------------------------------------------------------------------------------- the rest of lines


def has_sev(host: Host, qemu: str, words: list[str]) -> dict[str, Any]:
    """What a machine with these words says of its RAM, and that it has a SEV guest."""
    host.qmp.unlink(missing_ok=True)
    with running_machine([*host.platform.front(qemu), *words], host.qmp), QmpClient(host.qmp) as client:
        client.negotiate()
        assert client.ask("query-sev")["enabled"] is True
        answer: dict[str, Any] = client.ask("query-memory-size-summary")
        assert client.ask("query-kvm")["enabled"] is False
        return answer


@EACH_QEMU
def test_a_line_may_say_the_same_in_other_words(host: Host, qemu: str) -> None:
    words = host.arguments("-display", "none")

    def changed(option: str, *instead: str) -> list[str]:
        at = words.index(option)
        return [*words[:at], *instead, *words[at + 2 :]]

    sev = host.sev_object().split(",")[1:]
    as_json: dict[str, object] = {**dict(pair.split("=") for pair in sev)}
    as_json |= {"qom-type": "sev-guest", "cbitpos": 51, "reduced-phys-bits": 1, "policy": 0xB, "kernel-hashes": True}
    link = "confidential-guest-support=sev0"
    for line in (
        changed("-object", "-object", json.dumps(as_json)),
        changed("-object", "-object", "qom-type=" + host.sev_object()),
        changed("-machine", "-machine", "q35", "-machine", link),
        changed("-machine", "-M", "q35,accel=kvm", "-M", "memory-encryption=sev0"),
        changed("-machine", "-machine", f"type=q35,accel=kvm:tcg,{link}"),
        changed("-machine", "-machine", f"pc,{link}"),
        changed("-machine", "-machine", link, "-M", "q35"),
        [*words, "-enable-kvm", "-cpu", "host"],
        [*words, "-accel", "kvm", "-cpu", "EPYC-Rome,+kvm_pv_eoi,-svm"],
        [*words, "-accel", "kvm", "-accel", "tcg"],
        [*words, "-mem-path", str(host.folder), "-mem-prealloc"],
        [*words, "-overcommit", "mem-lock=off", "-global", "kvm-pit.lost_tick_policy=discard", "-rtc", "base=utc"],
        [word.replace("policy=0xb", "policy=013") for word in words],
    ):
        assert has_sev(host, qemu, line)["base-memory"] == 256 << 20


@EACH_QEMU
def test_ram_is_as_large_as_the_line_says(host: Host, qemu: str) -> None:
    words = host.arguments("-display", "none")
    at = words.index("-m")
    rest = [*words[:at], *words[at + 2 :]]
    backend = ["-object", "memory-backend-memfd,id=ram,size=192M,share=on", "-machine", "memory-backend=ram"]
    nodes = [
        *(
            "-object",
            "memory-backend-ram,id=m0,size=64M",
            "-object",
            '{"qom-type": "memory-backend-ram", "id": "m1", "size": 67108864}',
        )
    ]
    for more, size in (
        ([], 128 << 20),
        (["-m", "200"], 200 << 20),
        (["-m", "size=1G,slots=4,maxmem=8G"], 1 << 30),
        (["-m", "300M"], 300 << 20),
        (["-m", "262144k"], 256 << 20),
        (["-m", "128", "-m", "160"], 160 << 20),
        (["-m", "192", *backend], 192 << 20),
        (backend, 192 << 20),
        ([*nodes, "-m", "128", "-numa", "node,memdev=m0", "-numa", "node,memdev=m1"], 128 << 20),
    ):
        assert has_sev(host, qemu, [*rest, *more])["base-memory"] == size, more


def daemon_is_ready(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a line that ends when its machine runs in the background; its streams must be let go of."""
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=TIMEOUT, cwd=folder)


def end_daemon(pid_file: Path) -> None:
    pid = int(pid_file.read_text())
    os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not Path(f"/proc/{pid}").exists())
    assert not pid_file.exists()


@EACH_QEMU
def test_a_daemon_lets_go_of_its_caller_and_leaves_nothing(host: Host, qemu: str) -> None:
    front = host.platform.front(qemu)
    # A folder's name that is right only where the command was given.
    state = front.index("--state") + 1
    front[state] = os.path.relpath(front[state], host.folder)
    pid_file = host.folder / "pid"
    words = [*front, *host.arguments("-display", "none", "-daemonize", "-pidfile", "pid", "-cpu", "EPYC-Milan")]
    done = daemon_is_ready(words, host.folder)
    try:
        assert (done.returncode, done.stdout) == (0, "")
        assert "TCG doesn't support requested feature" in done.stderr
        with QmpClient(host.qmp) as client:
            client.negotiate()
            assert client.ask("query-sev")["state"] == "launch-secret"
            assert client.ask("query-sev-capabilities")["cbitpos"] == 51
    finally:
        end_daemon(pid_file)
    assert not host.qmp.exists()
    wait_for_no_guest(host.platform)


@EACH_QEMU
def test_a_daemon_that_cannot_begin_says_why(host: Host, qemu: str) -> None:
    for more, why in (
        (["-device", "nosuch"], "nosuch"),
        (["-cpu", "NoSuch"], "NoSuch"),
        (["-machine", "nosuch=1"], "nosuch"),
    ):
        words = host.arguments("-display", "none", "-daemonize", "-pidfile", "pid", *more)
        done = daemon_is_ready([*host.platform.front(qemu), *words], host.folder)
        assert done.returncode == 1
        assert why in done.stderr
        assert not (host.folder / "pid").exists()
        assert not host.qmp.exists()
    (host.folder / "session").write_text("")
    words = host.arguments("-display", "none", "-daemonize", "-pidfile", "pid")
    done = daemon_is_ready([*host.platform.front(qemu), *words], host.folder)
    assert done.returncode == 1
    assert "LAUNCH_START" in done.stderr
    assert not (host.folder / "pid").exists()
    wait_for_no_guest(host.platform)


@EACH_QEMU
def test_a_whole_line_of_proxmox_ve_is_understood(host: Host, qemu: str, platform: Platform, tmp_path: Path) -> None:
    # What `qm showcmd` prints for a guest with q35 and OVMF, with the edits that a launch with SEV by hand needs.
    host = make_bootable_host(tmp_path, platform, 0x5)
    (tmp_path / "vars").write_bytes(bytes(528 << 10))
    with (tmp_path / "disk").open("wb") as disk:
        disk.truncate(1 << 20)
    folder = str(tmp_path)
    line = [
        *("-id", "100", "-name", "guest,debug-threads=on", "-no-shutdown"),
        *("-chardev", f"socket,id=qmp,path={folder}/q,server=on,wait=off", "-mon", "chardev=qmp,mode=control"),
        *("-chardev", f"socket,id=qmp-event,path={folder}/qmeventd.sock,reconnect=5"),
        *("-mon", "chardev=qmp-event,mode=control"),
        *("-pidfile", f"{folder}/100.pid", "-daemonize"),
        *("-smbios", "type=1,uuid=7b3e1f9a-9d7c-4f0a-8f4e-3a8f7f0f4a11"),
        *("-drive", f"if=pflash,unit=0,format=raw,readonly=on,file={folder}/firmware"),
        *("-drive", f"if=pflash,unit=1,id=drive-efidisk0,format=raw,file={folder}/vars,size=540672"),
        *("-smp", "8,sockets=1,cores=8,maxcpus=8", "-nodefaults"),
        *("-boot", f"menu=on,strict=on,reboot-timeout=1000,splash={folder}/none.jpg"),
        *("-vnc", f"unix:{folder}/vnc,password=on"),
        *("-cpu", "EPYC-Rome,enforce=off,+kvm_pv_eoi,+kvm_pv_unhalt,vendor=AuthenticAMD", "-m", "512"),
        *("-object", "iothread,id=iothread-virtioscsi0"),
        *("-device", "pcie-root-port,id=port1,multifunction=on,bus=pcie.0,addr=10.0,port=1,chassis=1"),
        *("-device", "vmgenid,guid=5e1a1b5b-93d5-4c5e-9a5e-b6a5b9f0d2a7"),
        *(
            "-device",
            "piix3-usb-uhci,id=uhci,bus=pcie.0,addr=0x1.0x2",
            "-device",
            "usb-tablet,id=tablet,bus=uhci.0,port=1",
        ),
        *("-device", "virtio-scsi-pci,id=virtioscsi0,bus=pcie.0,addr=0x5,iothread=iothread-virtioscsi0"),
        *("-drive", f"file={folder}/disk,if=none,id=drive-scsi0,format=raw,cache=none,aio=threads,detect-zeroes=on"),
        *("-device", "scsi-hd,bus=virtioscsi0.0,channel=0,scsi-id=0,lun=0,drive=drive-scsi0,id=scsi0,bootindex=100"),
        *("-netdev", "user,id=net0"),
        *("-device", "virtio-net-pci,mac=BC:24:11:00:00:01,netdev=net0,bus=pcie.0,addr=0x12,id=net0,rx_queue_size=256"),
        *("-rtc", "driftfix=slew,base=localtime", "-machine", "hpet=off,type=q35+pve0"),
        *("-global", "kvm-pit.lost_tick_policy=discard"),
        *("-object", host.sev_object(hashes=False), "-machine", "memory-encryption=sev0", "-S"),
    ]
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.settimeout(TIMEOUT)
        listener.bind(f"{folder}/qmeventd.sock")
        listener.listen(1)
        done = daemon_is_ready([*platform.front(qemu), *line], tmp_path)
        try:
            assert done.returncode == 0, done.stderr
            with QmpClient(host.qmp) as client:
                client.negotiate()
                assert client.ask("query-status")["status"] == "prelaunch"
                assert client.ask("query-sev")["policy"] == 5
                assert client.ask("query-sev-launch-measure")["data"]
                assert len(client.ask("query-cpus-fast")) == 8
                assert client.ask("query-name") == {"name": "guest"}
            speaks(listener.accept()[0])
        finally:
            end_daemon(tmp_path / "100.pid")
    wait_for_no_guest(platform)
