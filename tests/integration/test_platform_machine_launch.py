"""The stand-in machine on a served platform: whole launches by hand, and what of the guest they measure."""

from __future__ import annotations

import base64
import contextlib
from hashlib import sha256
from pathlib import Path

import pytest
from sevsnpmeasure import guest as outside
from sevsnpmeasure import vcpu_types
from sevsnpmeasure.sev_mode import SevMode

from common.sev.certs.sev import SevCertificate
from common.sev.measurement import MeasurementBlob
from common.sev.report import AttestationReport
from tests.support.platform import Platform
from tests.support.qmp import QmpClient, running_machine
from tests.support.sev_host import (
    GUID,
    TEXT,
    b64,
    blob_of,
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
