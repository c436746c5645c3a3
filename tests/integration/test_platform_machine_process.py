"""The stand-in machine on a served platform, as others meet it: a QMP server, and a process that comes and goes."""

from __future__ import annotations

import base64
import json
import signal
import socket
import struct
import subprocess
import time
from pathlib import Path

from tests.support.agent import open_descriptors
from tests.support.eventually import wait_until
from tests.support.platform import Platform, running_platform
from tests.support.qmp import QmpClient, running_machine
from tests.support.sev_host import ask_device, blob_of, exported_pdh, guests, make_host, packet_for, wait_for_no_guest


def test_capabilities_are_the_platforms(tmp_path: Path, platform: Platform) -> None:
    host = make_host(tmp_path, platform)
    with running_machine(host.words(), host.qmp), QmpClient(host.qmp) as client:
        client.negotiate()
        capabilities = client.ask("query-sev-capabilities")
        assert base64.b64decode(capabilities["pdh"]) == exported_pdh(platform).raw
        assert len(base64.b64decode(capabilities["cert-chain"])) == 6252
        assert base64.b64decode(capabilities["cpu0-id"]) == ask_device(platform, 8, struct.pack("<I", 64))[4:]
        assert (capabilities["cbitpos"], capabilities["reduced-phys-bits"]) == (51, 1)


def test_a_newer_qemu_has_another_shape(tmp_path: Path, platform: Platform) -> None:
    host = make_host(tmp_path, platform)
    words = host.words(own=("--qemu-version", "10.0"))
    with running_machine(words, host.qmp), QmpClient(host.qmp) as client:
        assert client.negotiate()["QMP"]["version"]["qemu"] == {"micro": 2, "minor": 0, "major": 10}
        assert client.ask("query-status") == {"status": "prelaunch", "running": False}
        assert client.ask("query-sev")["sev-type"] == "sev"


def test_a_second_client_waits_for_the_first_to_leave(tmp_path: Path, platform: Platform) -> None:
    host = make_host(tmp_path, platform)
    with running_machine(host.words(), host.qmp), QmpClient(host.qmp) as first:
        first.negotiate()
        second = QmpClient(host.qmp)
        second.send(b'{"execute": "qmp_capabilities"}')
        assert second.is_silent(0.3)
        assert first.ask("query-status")["running"] is False
        first.close()
        assert b'"QMP"' in second.line()
        assert second.reply() == {"return": {}}
        second.close()


def test_no_event_goes_to_a_client_that_has_not_negotiated(tmp_path: Path, platform: Platform) -> None:
    host = make_host(tmp_path, platform)
    with running_machine(host.words(), host.qmp) as machine, QmpClient(host.qmp) as client:
        assert b'"QMP"' in client.line()
        machine.send_signal(signal.SIGTERM)
        assert client.line() == b""
        assert machine.wait(30) == 0


def test_a_signal_is_told_as_an_event(tmp_path: Path, platform: Platform) -> None:
    host = make_host(tmp_path, platform)
    with running_machine(host.words(), host.qmp) as machine, QmpClient(host.qmp) as client:
        client.negotiate()
        machine.send_signal(signal.SIGTERM)
        event = json.loads(client.line())
        assert (event["event"], event["data"]) == ("SHUTDOWN", {"guest": False, "reason": "host-signal"})
        assert client.line() == b""
        assert machine.wait(30) == 0
        assert machine.stderr is not None
        assert machine.stderr.read() == "qemu-system-x86_64: terminating on signal 15\n"
    assert not host.qmp.exists()
    wait_for_no_guest(platform)


def test_a_killed_machine_leaves_no_guest_behind(tmp_path: Path, platform: Platform) -> None:
    host = make_host(tmp_path, platform)
    wait_for_no_guest(platform)
    with running_machine(host.words(), host.qmp) as machine:
        assert guests(platform) == 1
        machine.kill()
        machine.wait(30)
        wait_for_no_guest(platform)


def test_stop_and_cont_pause_a_running_guest_without_booting_it_again(tmp_path: Path, platform: Platform) -> None:
    host = make_host(tmp_path, platform)
    with running_machine(host.words(), host.qmp), QmpClient(host.qmp) as client:
        client.negotiate()
        for command in ("stop", "cont", "cont", "stop", "stop"):
            client.ask(command)
        assert client.ask("query-status")["status"] == "paused"
        client.ask("cont")
        assert [event["event"] for event in client.events] == ["RESUME", "STOP", "RESUME"]
        assert host.said("\n") == "no secret area\n"


def test_a_machine_without_sev_says_so(tmp_path: Path, platform: Platform) -> None:
    words = [*platform.machine(), "-S", "-qmp", f"unix:{tmp_path / 'q'},server=on,wait=off"]
    with running_machine(words, tmp_path / "q"), QmpClient(tmp_path / "q") as client:
        client.negotiate()
        assert client.ask("query-sev")["enabled"] is False
        assert client.refusal("query-sev-launch-measure") == "SEV launch measurement is not available"
        assert client.refusal("sev-inject-launch-secret", packet_header="", secret="") == "SEV not enabled for guest"
        assert client.refusal("query-sev-attestation-report", mnonce="") == "SEV is not enabled"


def test_a_client_that_never_pauses_cannot_keep_the_machine_from_its_end(tmp_path: Path, platform: Platform) -> None:
    host = make_host(tmp_path, platform)
    with running_machine(host.words(), host.qmp) as machine:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.connect(str(host.qmp))
            # Two processes, each as fast as it can: one writes commands, the other throws the replies away.
            flood = [
                subprocess.Popen(["yes", '{"execute":"query-status"}'], stdout=client.fileno()),
                subprocess.Popen(["cat"], stdin=client.fileno(), stdout=subprocess.DEVNULL),
            ]
        try:
            time.sleep(0.5)  # until they are at full speed
            machine.send_signal(signal.SIGTERM)
            assert machine.wait(60) == 0
        finally:
            for process in flood:
                process.kill()
                process.wait()


def test_machines_and_connections_that_come_and_go_leave_nothing_behind(tmp_path: Path, platform: Platform) -> None:
    assert platform.process is not None
    wait_for_no_guest(platform)
    host = make_host(tmp_path, platform)
    with running_machine(host.words(), host.qmp) as machine:
        with QmpClient(host.qmp) as client:
            client.negotiate()  # from here on the machine has all that it opens
            before = open_descriptors(machine.pid), open_descriptors(platform.process.pid)
        for number in range(500):
            with QmpClient(host.qmp) as client:
                if number % 3:
                    client.line()
                if number % 3 == 2:
                    client.send(b'{"execute": "qmp_cap')
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as device:
                device.connect(str(platform.socket))
                if number % 2:
                    device.sendall(struct.pack("<III", 0xFFFF0000, 4, 1))
                    device.recv(12, socket.MSG_WAITALL)
                    device.sendall(struct.pack("<IIIIII", 0x100, 16, 0, 1, 0, 0)[: 24 if number % 4 == 1 else 17])
        with QmpClient(host.qmp) as client:
            client.negotiate()
            pid = platform.process.pid
            # The question itself is a connection, which the platform must have time to close.
            wait_until(lambda: open_descriptors(pid) <= before[1] and guests(platform) <= 1)
            wait_until(lambda: open_descriptors(machine.pid) <= before[0])
    wait_for_no_guest(platform)


def test_a_platform_that_goes_away_is_an_error_not_an_end(tmp_path: Path) -> None:
    with running_platform(tmp_path / "p") as platform:
        host = make_host(tmp_path, platform)
        with running_machine(host.words(), host.qmp) as machine, QmpClient(host.qmp) as client:
            client.negotiate()
            packet = packet_for(host, blob_of(client))
            assert platform.process is not None
            platform.process.kill()
            platform.process.wait()
            assert client.refusal("sev-inject-launch-secret", **packet).startswith("SEV: failed to inject secret ret=-")
            assert "Failed to open" in client.refusal("query-sev-capabilities")
            client.send(b'{"execute": "cont"}')
            assert client.line() == b""
            assert machine.wait(30) == 1
            assert machine.stderr is not None
            assert "sev_launch_finish: LAUNCH_FINISH ret=-" in machine.stderr.read()
