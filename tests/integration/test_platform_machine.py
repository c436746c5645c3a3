"""The stand-in machine as a process on a served platform: whole launches by hand, and every way in which they fail."""

from __future__ import annotations

import base64
import contextlib
import json
import signal
import socket
import struct
import subprocess
import time
from hashlib import sha256
from pathlib import Path

import pytest
from sevsnpmeasure import guest as outside
from sevsnpmeasure import vcpu_types
from sevsnpmeasure.sev_mode import SevMode

from common.sev.certs.sev import SevCertificate
from common.sev.measurement import MeasurementBlob
from common.sev.report import AttestationReport
from emulator.firmware_image import build_image
from tests.support.agent import open_descriptors
from tests.support.platform import Platform, running_platform
from tests.support.qmp import QmpClient, running_machine
from tests.support.sev_host import (
    GUID,
    TEXT,
    ask_device,
    b64,
    blob_of,
    exported_pdh,
    guests,
    is_measured_as,
    make_host,
    packet_for,
    wait_for_no_guest,
)
from tests.support.vectors import vectors


@pytest.mark.parametrize(
    ("policy", "vcpus", "cpu", "hashes"),
    [(0xB, 1, "EPYC-Rome", True), (0xB, 4, "EPYC-v4", False), (0xF, 1, "EPYC-Milan", True), (0xF, 4, "EPYC-v4", False)],
)
def test_a_launch_by_hand_agrees_with_sev_snp_measure_and_ends_with_the_secret_read(
    tmp_path: Path, platform: Platform, policy: int, vcpus: int, cpu: str, *, hashes: bool
) -> None:
    host = make_host(tmp_path, platform, policy)
    kernel = host.kernel if hashes else []
    expected = outside.calc_launch_digest(
        SevMode.SEV_ES if policy & 4 else SevMode.SEV,
        vcpus,
        vcpu_types.CPU_SIGS[cpu],
        str(tmp_path / "firmware"),
        str(tmp_path / "kernel") if hashes else "",
        str(tmp_path / "initrd") if hashes else "",
        "quiet" if hashes else "",
        0,
    )
    words = host.words(*kernel, "-smp", str(vcpus), "-cpu", cpu, hashes=hashes, own=("--vmsa", "init2"))
    with running_machine(words, host.qmp) as machine, QmpClient(host.qmp) as client:
        assert client.negotiate()["QMP"]["version"]["qemu"] == {"micro": 22, "minor": 2, "major": 7}
        assert client.ask("query-status") == {"status": "prelaunch", "singlestep": False, "running": False}
        sev = client.ask("query-sev")
        assert sev | {"handle": 1} == {
            "enabled": True,
            "api-minor": 55,
            "handle": 1,
            "state": "launch-secret",
            "api-major": 1,
            "build-id": 24,
            "policy": policy,
        }
        blob = blob_of(client)
        assert blob_of(client) == blob
        assert is_measured_as(host, blob, expected)
        assert not is_measured_as(host, blob, sha256(expected).digest())
        assert client.ask("sev-inject-launch-secret", **packet_for(host, blob)) == {}
        assert host.serial.read_text() == ""
        assert client.ask("cont") == {}
        assert [event["event"] for event in client.events] == ["RESUME"]
        assert client.ask("query-status")["status"] == "running"
        assert client.ask("query-sev")["state"] == "running"
        assert blob_of(client) == blob
        assert host.said("\n") == f"secret {GUID} {len(TEXT)} {TEXT.hex()}\n"
        assert client.ask("quit") == {}
        assert client.events[-1]["event"] == "SHUTDOWN"
        assert client.events[-1]["data"] == {"guest": False, "reason": "host-qmp-quit"}
        assert client.line() == b""
        assert machine.wait(30) == 0
    assert not host.qmp.exists()
    wait_for_no_guest(platform)


@pytest.mark.parametrize("name", ["ovmf_AmdSev_suffix.bin", "ovmf_OvmfX64_suffix.bin"])
def test_the_ends_of_real_firmware_are_measured_as_published(tmp_path: Path, platform: Platform, name: str) -> None:
    # sev-snp-measure 0.0.13 on its own fixtures; kernel and initrd are empty files there (/dev/null).
    host = make_host(tmp_path, platform, 0xB)
    (tmp_path / "firmware").write_bytes((vectors() / "ovmf" / name).read_bytes())
    (tmp_path / "kernel").write_bytes(b"")
    (tmp_path / "initrd").write_bytes(b"")
    if name == "ovmf_AmdSev_suffix.bin":
        more = [*host.kernel[:-1], "console=ttyS0 loglevel=7"]
        digest = "82a3ee5d537c3620628270c292ae30cb40c3c878666a7890ee7ef2a08fb535ff"
    else:
        more = []
        digest = "b4c021e085fb83ceffe6571a3d357b4a98773c83c474e47f76c876708fe316da"
    with running_machine(host.words(*more), host.qmp), QmpClient(host.qmp) as client:
        client.negotiate()
        assert is_measured_as(host, blob_of(client), bytes.fromhex(digest))


@pytest.mark.parametrize(
    ("vcpus", "digest"),
    [
        (1, "13810ae661ea11e2bb205621f582fee268f0367c8f97bc297b7fadef3e12002c"),
        (4, "0dccbcaba8e90b261bd0d2e1863a2f9da714768b7b2a19363cd6ae35aa90de91"),
    ],
)
def test_save_areas_of_real_firmware_are_measured_as_published(
    tmp_path: Path, platform: Platform, vcpus: int, digest: str
) -> None:
    host = make_host(tmp_path, platform, 0xF)
    (tmp_path / "firmware").write_bytes((vectors() / "ovmf" / "ovmf_AmdSev_suffix.bin").read_bytes())
    (tmp_path / "kernel").write_bytes(b"")
    more = ["-kernel", str(tmp_path / "kernel"), "-smp", str(vcpus), "-cpu", "EPYC-v4"]
    with (
        running_machine(host.words(*more, own=("--vmsa", "init2")), host.qmp),
        QmpClient(host.qmp) as client,
    ):
        client.negotiate()
        assert is_measured_as(host, blob_of(client), bytes.fromhex(digest))


def test_packets_that_are_not_for_this_launch_are_refused_and_leave_it_open(tmp_path: Path, platform: Platform) -> None:
    host = make_host(tmp_path, platform)
    with running_machine(host.words(*host.kernel), host.qmp), QmpClient(host.qmp) as client:
        client.negotiate()
        blob = blob_of(client)
        good = packet_for(host, blob)
        other = packet_for(host, MeasurementBlob(measurement=bytes(32), nonce=blob.nonce))
        bad = "SEV: failed to inject secret ret=-5 fw_error=11 'Bad measurement'"
        raw = base64.b64decode(good["secret"])
        assert client.refusal("sev-inject-launch-secret", **other) == bad
        assert client.refusal("sev-inject-launch-secret", **good | {"secret": b64(raw[:-1] + b"\0")}) == bad
        inject = "sev-inject-launch-secret"
        short = "SEV: failed to inject secret ret=-5 fw_error=4 'Buffer too small'"
        assert client.refusal(inject, **good | {"packet_header": b64(bytes(51))}) == short
        assert client.refusal(inject, **good | {"secret": b64(raw[:-1])}) == short
        assert client.refusal(inject, **good, gpa=0x810008).endswith("fw_error=9 'Invalid address'")
        assert client.refusal(inject, **good | {"secret": b64(bytes(0x4010))}).endswith("ret=-22 fw_error=0 ''")
        assert client.refusal(inject, **good | {"packet_header": "!!"}) == "SEV: Failed to decode sequence header"
        assert client.refusal(inject, **good | {"secret": "="}) == "SEV: Failed to decode data"
        nowhere = "SEV: Failed to calculate guest address: No memory is mapped at address 0xffffffffffffffff"
        assert client.refusal(inject, **good, gpa=-1) == nowhere
        assert client.ask(inject, **good) == {}
        assert client.ask(inject, **good) == {}
        client.ask("cont")
        assert client.refusal(inject, **good) == "SEV: Not in correct state. (LSECRET) 3"
        assert TEXT.hex() in host.said("secret ")


def test_an_oversized_packet_overwrites_the_hashes_and_the_kernel_does_not_boot(
    tmp_path: Path, platform: Platform
) -> None:
    host = make_host(tmp_path, platform)
    with running_machine(host.words(*host.kernel), host.qmp), QmpClient(host.qmp) as client:
        client.negotiate()
        packet = packet_for(host, blob_of(client), data=bytes(0xC00), area=0x4000)
        assert client.ask("sev-inject-launch-secret", **packet) == {}
        client.ask("cont")
        assert host.said("\n").startswith('BdsDxe: failed to load Boot0002 "Grub Bootloader" from Fv(')
        assert client.ask("query-status")["status"] == "running"


def test_a_packet_beside_the_area_is_not_found_by_the_guest(tmp_path: Path, platform: Platform) -> None:
    host = make_host(tmp_path, platform)
    with running_machine(host.words(*host.kernel), host.qmp), QmpClient(host.qmp) as client:
        client.negotiate()
        client.ask("sev-inject-launch-secret", **packet_for(host, blob_of(client)), gpa=0x100000)
        client.ask("cont")
        assert host.said("\n") == "no secret area\n"


def test_without_hashes_amdsev_firmware_does_not_boot_the_kernel(tmp_path: Path, platform: Platform) -> None:
    host = make_host(tmp_path, platform)
    words = host.words(*host.kernel, hashes=False)
    with running_machine(words, host.qmp), QmpClient(host.qmp) as client:
        client.negotiate()
        client.ask("cont")
        assert host.said("\n").startswith("BdsDxe: failed to load")


def test_a_machine_that_was_not_paused_runs_at_once_and_takes_no_secret(tmp_path: Path, platform: Platform) -> None:
    host = make_host(tmp_path, platform)
    with running_machine(host.words(*host.kernel, paused=False), host.qmp), QmpClient(host.qmp) as client:
        client.negotiate()
        assert client.ask("query-status")["status"] == "running"
        assert client.ask("query-sev")["state"] == "running"
        packet = packet_for(host, blob_of(client))
        assert client.refusal("sev-inject-launch-secret", **packet) == "SEV: Not in correct state. (LSECRET) 3"
        assert host.said("\n") == "no secret area\n"


def test_a_report_is_the_peks(tmp_path: Path, platform: Platform) -> None:
    host = make_host(tmp_path, platform)
    with running_machine(host.words(*host.kernel), host.qmp), QmpClient(host.qmp) as client:
        client.negotiate()
        report = AttestationReport.parse(
            base64.b64decode(client.ask("query-sev-attestation-report", mnonce=b64(b"n" * 16))["data"])
        )
        chain = base64.b64decode(client.ask("query-sev-capabilities")["cert-chain"])
        report.verify(SevCertificate.parse(chain[:2084]))
        wrong = "SEV: mnonce must be 16 bytes (got 15)"
        assert client.refusal("query-sev-attestation-report", mnonce=b64(bytes(15))) == wrong


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


def died(words: list[str]) -> list[str]:
    """What a machine says that ends by itself, with rc 1."""
    ended = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout) == (1, "")
    return ended.stderr.splitlines()


NOT_STARTED = [
    "qemu-system-x86_64: -accel kvm: sev_kvm_init: failed to create encryption context",
    "qemu-system-x86_64: -accel kvm: failed to initialize kvm: Operation not permitted",
]


def launch_start(code: int, text: str) -> list[str]:
    line = f"qemu-system-x86_64: -accel kvm: sev_launch_start: LAUNCH_START ret=1 fw_error={code} '{text}'"
    return [line, *NOT_STARTED]


def test_a_launch_that_the_firmware_refuses_ends_before_the_socket_opens(tmp_path: Path, platform: Platform) -> None:
    host = make_host(tmp_path, platform, 0xF)
    session = (tmp_path / "session").read_text()
    bad = launch_start(11, "Bad measurement")
    flipped = bytearray(base64.b64decode(session))
    flipped[20] ^= 1
    (tmp_path / "session").write_text(b64(bytes(flipped)))
    assert died(host.words()) == bad
    (tmp_path / "session").write_text(session)
    host.policy = 0xB
    assert died(host.words()) == bad
    host.policy = 0xF
    # Raw where base64 is due; QEMU reads up to a NUL, and nothing before it would be another failure.
    (tmp_path / "session").write_bytes(base64.b64decode(session).replace(b"\0", b"\1"))
    assert died(host.words()) == launch_start(4, "Buffer too small")
    (tmp_path / "session").write_text("")
    assert died(host.words()) == launch_start(0, "")
    (tmp_path / "session").unlink()
    assert died(host.words())[0].startswith("qemu-system-x86_64: -accel kvm: failed to read ")
    assert not host.qmp.exists()
    newer = make_host(tmp_path, platform, 0xF | 1 << 16 | 56 << 24)
    assert died(newer.words()) == launch_start(7, "Policy is not allowed")
    wait_for_no_guest(platform)


def test_a_session_for_another_pdh_is_a_bad_measurement(tmp_path: Path) -> None:
    with running_platform(tmp_path / "p") as platform:
        host = make_host(tmp_path, platform)
        ask_device(platform, 4, b"")
        assert died(host.words()) == launch_start(11, "Bad measurement")


def test_what_the_processor_or_the_firmware_image_does_not_allow_ends_as_in_qemu(
    tmp_path: Path, platform: Platform
) -> None:
    host = make_host(tmp_path, platform, 0xF)
    kvm = "qemu-system-x86_64: -accel kvm: "
    wrong = [word.replace("cbitpos=51", "cbitpos=47") for word in host.words()]
    assert died(wrong)[0] == f"{kvm}sev_kvm_init: cbitpos check failed, host '51' requested '47'"
    reduced = [word.replace("phys-bits=1", "phys-bits=0") for word in host.words()]
    assert died(reduced)[0].startswith(f"{kvm}sev_kvm_init: reduced_phys_bits check failed")
    for image, more, first in (
        (build_image("x", size=4096)[:-16], [], "system firmware block device pflash0 has invalid size 4080"),
        (bytes((8 << 20) + 4096), [], "combined size of system firmware exceeds 8388608 bytes"),
        (bytes(4096), [], "SEV information block/Firmware GUID Table block not found in pflash rom"),
        (build_image("x", reset_address=0), [], "SEV-ES reset address is zero"),
        (
            build_image("x", hashes_area=(0, 0)),
            host.kernel,
            "SEV: guest firmware hashes table area is invalid (base=0x0 size=0x0)",
        ),
        (
            build_image("x", hashes_area=None),
            host.kernel,
            "SEV: kernel specified but guest firmware has no hashes table GUID",
        ),
        (
            build_image("x", hashes_area=(0xF0000000, 0x400)),
            host.kernel,
            "SEV: cannot map hashes table guest memory area",
        ),
        (build_image("x"), ["-kernel", "/nowhere"], "could not open kernel file '/nowhere': No such file or directory"),
        (build_image("x"), ["-cpu", "NoSuch"], "unable to find CPU model 'NoSuch'"),
    ):
        (tmp_path / "firmware").write_bytes(image)
        assert died(host.words(*more))[0] == f"qemu-system-x86_64: {first}"
    wait_for_no_guest(platform)


def test_files_that_cannot_be_used_end_the_machine_in_a_sentence(tmp_path: Path, platform: Platform) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").touch()
    here = f"-qmp unix:{tmp_path}/folder: Failed to unlink socket {tmp_path}/folder: Is a directory"
    assert died([*platform.machine("-S", "-qmp", f"unix:{tmp_path}/folder,server=on")]) == [
        f"qemu-system-x86_64: {here}"
    ]
    # A file without a size that cannot be read either, whoever asks.
    unreadable = ["-drive", "if=pflash,format=raw,file=/proc/self/mem"]
    assert "has invalid size 0" in died([*platform.machine("-S", *unreadable)])[0]
    sparse = tmp_path / "sparse"
    with sparse.open("wb") as file:
        file.truncate(1 << 40)
    sizes = died([*platform.machine("-S", "-drive", f"if=pflash,format=raw,file={sparse}")])
    assert sizes == ["qemu-system-x86_64: combined size of system firmware exceeds 8388608 bytes"]


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
            assert machine.wait(10) == 0
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
            deadline = time.monotonic() + 30
            # The question itself is a connection, which the platform must have time to close.
            while open_descriptors(platform.process.pid) > before[1] or guests(platform) > 1:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            while open_descriptors(machine.pid) > before[0]:
                assert time.monotonic() < deadline
                time.sleep(0.02)
    wait_for_no_guest(platform)


def test_several_machines_on_one_platform_have_their_own_launches(tmp_path: Path, platform: Platform) -> None:
    hosts = []
    for number in range(4):
        (tmp_path / str(number)).mkdir()
        hosts.append(make_host(tmp_path / str(number), platform))
    with contextlib.ExitStack() as stack:
        clients = []
        for host in hosts:
            stack.enter_context(running_machine(host.words(*host.kernel), host.qmp))
            clients.append(stack.enter_context(QmpClient(host.qmp)))
            clients[-1].negotiate()
        assert guests(platform) == 4
        assert len({client.ask("query-sev")["handle"] for client in clients}) == 4
        blobs = [blob_of(client) for client in clients]
        packets = [
            packet_for(host, blob, b"for %d" % at) for at, (host, blob) in enumerate(zip(hosts, blobs, strict=True))
        ]
        for at, client in enumerate(clients):
            other = packets[(at + 1) % 4]
            assert "Bad measurement" in client.refusal("sev-inject-launch-secret", **other)
        for client, packet in zip(clients, packets, strict=True):
            client.ask("sev-inject-launch-secret", **packet)
        for client in reversed(clients):
            client.ask("cont")
        for at, host in enumerate(hosts):
            assert host.said("\n") == f"secret {GUID} 5 {(b'for %d' % at).hex()}\n"
    wait_for_no_guest(platform)


def test_without_a_platform_there_is_no_device(tmp_path: Path) -> None:
    gone = Platform(state=tmp_path / "gone", generation="milan")
    lines = died([*gone.machine(), "-S"])
    assert lines[0].endswith("sev.sock 'No such file or directory'")


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
