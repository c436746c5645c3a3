"""`platform run`: an unmodified QEMU on /dev/kvm goes through its own SEV and SEV-ES launch on the software PSP.

QEMU's target/i386/sev.c runs; who says what is right: sev-snp-measure, libvirt's virt-qemu-sev-validate, and QEMU's own
view of its memory. No guest is watched to run: what KVM makes of it after `cont` depends on the host.
"""

from __future__ import annotations

import base64
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.sev.certs.sev import SevCertificate
from common.sev.measurement import MeasurementBlob
from common.sev.report import AttestationReport
from emulator.firmware_image import HASHES_AREA, SECRET_AREA
from tests.support.fw_cfg import read_memory
from tests.support.kvm import needs_kvm
from tests.support.platform import Platform, running_platform
from tests.support.qmp import QmpClient, running_machine
from tests.support.real_qemu import EACH_QEMU, installed_qemu, qemu, version_of
from tests.support.sev_host import (
    TEXT,
    Host,
    ask_device,
    b64,
    blob_of,
    exported_pdh,
    guests,
    is_measured_as,
    make_bootable_host,
    packet_for,
    secret_table,
    wait_for_no_guest,
)
from tests.support.under import TIMEOUT, run_words
from tests.support.witnesses import ACCEPTED, REFUSED, expectation, launch_digest, verdicts

__all__ = ["qemu"]  # a fixture
pytestmark = [
    pytest.mark.skipif(
        sys.platform != "linux" or os.uname().machine != "x86_64", reason="seccomp filters are written for x86-64 Linux"
    ),
    needs_kvm,
]


@pytest.fixture(scope="module")
def cbitpos(platform: Platform, tmp_path_factory: pytest.TempPathFactory) -> int:
    """Position of the encryption bit, which QEMU asks the real processor: 0 where that has no SEV."""
    qmp = tmp_path_factory.mktemp("cbitpos") / "q"
    words = ["-nodefaults", "-S", "-accel", "kvm", "-display", "none", "-qmp", f"unix:{qmp},server=on,wait=off"]
    with (
        running_machine(run_words(platform, installed_qemu(), "-machine", "q35", *words), qmp),
        QmpClient(qmp) as client,
    ):
        client.negotiate()
        capabilities = client.ask("query-sev-capabilities")
    assert base64.b64decode(capabilities["pdh"]) == exported_pdh(platform).raw
    assert len(base64.b64decode(capabilities["cert-chain"])) == 6252
    assert base64.b64decode(capabilities["cpu0-id"]) == ask_device(platform, 8, b"\x40\0\0\0")[4:]
    return int(capabilities["cbitpos"])


def command(
    host: Host, qemu: str, cbitpos: int, *more: str, hashes: bool = True, own: tuple[str, ...] = ()
) -> list[str]:
    """The whole command: the program under `platform run`."""
    arguments = host.arguments("-accel", "kvm", "-display", "none", *more, hashes=hashes)
    arguments = [word.replace("cbitpos=51", f"cbitpos={cbitpos}") for word in arguments]
    return run_words(host.platform, qemu, *arguments, own=own)


@contextlib.contextmanager
def launched(words: list[str], host: Host) -> Iterator[tuple[subprocess.Popen[str], QmpClient]]:
    host.qmp.unlink(missing_ok=True)
    with running_machine(words, host.qmp) as machine, QmpClient(host.qmp) as client:
        client.negotiate()
        yield machine, client


@EACH_QEMU
@pytest.mark.parametrize(
    "case",
    [
        (0x1, 1, "EPYC-v3", False),
        (0xB, 2, "EPYC-Rome", True),
        (0xF, 1, "EPYC-v3", True),
        (0xF, 2, "EPYC-Milan", False),
        (0x5, 8, "EPYC-Rome", True),
    ],
)
def test_a_whole_launch_is_measured_as_sev_snp_measure_says_and_ends_with_the_secret_in_ram(
    tmp_path: Path, platform: Platform, cbitpos: int, qemu: str, case: tuple[int, int, str, bool]
) -> None:
    policy, vcpus, cpu, hashes = case
    host = make_bootable_host(tmp_path, platform, policy)
    kernel = host.kernel if hashes else []
    words = command(
        host, qemu, cbitpos, *kernel, "-smp", str(vcpus), "-cpu", cpu, hashes=hashes, own=("--vmsa", "init2")
    )
    with launched(words, host) as (machine, client):
        sev = client.ask("query-sev")
        assert (sev["enabled"], sev["state"], sev["policy"]) == (True, "launch-secret", policy)
        assert (sev["api-major"], sev["api-minor"], sev["build-id"]) == (1, 55, 24)
        assert ("sev-type" in sev) == (version_of(qemu) >= (9, 1))
        assert client.ask("query-status")["status"] == "prelaunch"

        blob = blob_of(client)
        assert is_measured_as(host, blob, launch_digest(host, vcpus, cpu, hashes=hashes))
        assert not is_measured_as(host, blob, launch_digest(host, vcpus, cpu, hashes=not hashes))
        if policy & 4:
            assert not is_measured_as(host, blob, launch_digest(host, vcpus + 1, cpu, hashes=hashes))
            assert not is_measured_as(host, blob, launch_digest(host, vcpus, "EPYC-Genoa", hashes=hashes))
        table = read_memory(client, *HASHES_AREA, tmp_path)
        assert any(table) == hashes

        raw = base64.b64decode(client.ask("query-sev-attestation-report", mnonce=b64(b"n" * 16))["data"])
        chain = base64.b64decode(client.ask("query-sev-capabilities")["cert-chain"])
        report = AttestationReport.parse(raw)
        report.verify(SevCertificate.parse(chain[:2084]))
        assert raw[:16] == b"n" * 16

        before = read_memory(client, *SECRET_AREA, tmp_path)
        other = packet_for(host, MeasurementBlob(measurement=bytes(32), nonce=blob.nonce))
        said = client.refusal("sev-inject-launch-secret", **other)
        assert said == "SEV: failed to inject secret ret=-5 fw_error=11 'Bad measurement'"
        assert read_memory(client, *SECRET_AREA, tmp_path) == before
        assert client.ask("sev-inject-launch-secret", **packet_for(host, blob)) == {}
        after = read_memory(client, *SECRET_AREA, tmp_path)
        assert TEXT in after
        assert after.startswith(secret_table())

        assert client.ask("cont") == {}
        assert client.ask("query-sev")["state"] == "running"
        late = client.refusal("sev-inject-launch-secret", **packet_for(host, blob))
        assert late == "SEV: Not in correct state. (LSECRET) 3"
        assert guests(platform) >= 1
        client.ask("quit")
        assert machine.wait(TIMEOUT) == 0
    wait_for_no_guest(platform)


@EACH_QEMU
@pytest.mark.parametrize("case", [(0xB, 4), (0xF, 1), (0xF, 8)], ids=["SEV", "SEV-ES 1", "SEV-ES 8"])
def test_libvirts_tool_accepts_the_measurement_and_no_other(
    tmp_path: Path, platform: Platform, cbitpos: int, qemu: str, case: tuple[int, int]
) -> None:
    policy, vcpus = case
    host = make_bootable_host(tmp_path, platform, policy)
    words = command(host, qemu, cbitpos, *host.kernel, "-smp", str(vcpus), "-cpu", "EPYC-Rome")
    with launched(words, host) as (_, client):
        expected = expectation(host, vcpus, client.ask("query-sev-launch-measure")["data"])
    other = tmp_path / "other"
    other.write_bytes(b"another file")
    changes: list[dict[str, object]] = [{"kernel": other}, {"initrd": other}, {"cmdline": "quieT"}]
    changes += [{"policy": policy ^ 2}, {"build-id": 23}]
    if policy & 4:
        changes += [{"num-cpus": vcpus + 1}, {"cpu-model": 1}]
    said = verdicts([expected, *(expected | change for change in changes)])
    assert said == [ACCEPTED, *(REFUSED for _ in changes)], changes


def test_one_launch_after_the_other_is_measured_right(tmp_path: Path, platform: Platform, cbitpos: int) -> None:
    # A command that a signal delivers twice shows in some launches only.
    host = make_bootable_host(tmp_path, platform, 0xF)
    words = command(
        host, installed_qemu(), cbitpos, *host.kernel, "-smp", "4", "-cpu", "EPYC-v3", own=("--vmsa", "init2")
    )
    expected = launch_digest(host, 4, "EPYC-v3")
    for _ in range(8):
        with launched(words, host) as (_, client):
            assert is_measured_as(host, blob_of(client), expected)


@pytest.mark.parametrize("victim", ["supervisor", "QEMU"])
def test_a_machine_that_is_killed_takes_its_guest_along(
    tmp_path: Path, platform: Platform, cbitpos: int, victim: str
) -> None:
    host = make_bootable_host(tmp_path, platform, 0xB)
    wait_for_no_guest(platform)
    with launched(command(host, installed_qemu(), cbitpos), host) as (machine, _):
        assert guests(platform) == 1
        children = Path(f"/proc/{machine.pid}/task/{machine.pid}/children").read_text().split()
        assert len(children) == 1
        os.kill(machine.pid if victim == "supervisor" else int(children[0]), signal.SIGKILL)
        assert machine.wait(TIMEOUT) == -signal.SIGKILL
        wait_for_no_guest(platform)


def died(words: list[str]) -> str:
    """What a machine says that ends by itself, and not well: QEMU 7.2 without SEV-ES complains and then crashes."""
    ended = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert ended.returncode in {1, -signal.SIGSEGV}
    return ended.stderr


def test_what_the_platform_refuses_ends_qemu_in_its_own_words(tmp_path: Path, platform: Platform, cbitpos: int) -> None:
    program = installed_qemu()
    host = make_bootable_host(tmp_path, platform, 0xF)
    host.policy = 0xB  # the owner has made the session for another
    assert "LAUNCH_START ret=1 fw_error=11 'Bad measurement'" in died(command(host, program, cbitpos))
    newer = make_bootable_host(tmp_path, platform, 0x1 | 1 << 16 | 56 << 24)
    assert "fw_error=7 'Policy is not allowed'" in died(command(newer, program, cbitpos))
    assert "cbitpos check failed" in died(command(host, program, cbitpos + 1))
    wait_for_no_guest(platform)


def test_a_platform_without_es_starts_no_es_guest(tmp_path: Path, cbitpos: int) -> None:
    with running_platform(tmp_path / "p", options=["--no-es"]) as served:
        host = make_bootable_host(tmp_path, served, 0xF)
        assert "host SEV-ES support unavailable" in died(command(host, installed_qemu(), cbitpos))
        plain = make_bootable_host(tmp_path, served, 0xB)
        with launched(command(plain, installed_qemu(), cbitpos), plain) as (_, client):
            assert client.ask("query-sev")["enabled"]


def test_without_the_supervisor_the_same_words_find_no_device(tmp_path: Path, platform: Platform, cbitpos: int) -> None:
    if Path("/dev/sev").exists():
        pytest.skip("this machine has a /dev/sev of its own")
    host = make_bootable_host(tmp_path, platform, 0xB)
    words = command(host, installed_qemu(), cbitpos)
    assert "Failed to open /dev/sev 'No such file or directory'" in died(words[words.index("--") + 1 :])
