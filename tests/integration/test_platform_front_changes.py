"""Machines that become another after their measurement, or cannot be measured at all: none gets a secret, none runs."""

from __future__ import annotations

import subprocess

import pytest

from tests.support.qmp import TIMEOUT, QmpClient, running_machine
from tests.support.real_qemu import EACH_QEMU, qemu, version_of
from tests.support.sev_host import Host, blob_of, packet_for

__all__ = ["qemu"]  # a fixture
INJECT = "sev-inject-launch-secret"
CPU = {"driver": "EPYC-Rome-x86_64-cpu", "id": "late", "socket-id": 0, "core-id": 1, "thread-id": 0}
RUNNING = "SEV: Not in correct state. (LSECRET) 3"
HASHES_AT = 0x810C00


def words(host: Host, program: str, *more: str) -> list[str]:
    return [*host.platform.front(program), *host.arguments("-display", "none", *more)]


def died(host: Host, program: str, *more: str) -> str:
    """The last sentence of a machine that ends with exit code 1 before its monitor opens."""
    done = subprocess.run(words(host, program, *more), capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1, done.stderr
    assert not host.qmp.exists()
    return done.stderr.splitlines()[-1]


def saved(client: QmpClient, host: Host, address: int, size: int) -> bytes:
    file = host.folder / "saved"
    client.ask("pmemsave", val=address, size=size, filename=str(file))
    return file.read_bytes()


@EACH_QEMU
@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["-incoming", "defer"], "-incoming: a SEV guest is measured when it starts and cannot come from a migration"),
        (["-loadvm", "x"], "-loadvm: a SEV guest is measured when it starts and cannot come from a snapshot"),
        (["-preconfig"], "-preconfig: the front launches the machine, which -preconfig holds back"),
        (["-runas", "nobody"], "-runas: the machine ends with the front, which another user's would not"),
        (["-run-with", "user=nobody"], "-run-with: the machine ends with the front, which another user's would not"),
    ],
    ids=["incoming", "loadvm", "preconfig", "runas", "run-with"],
)
def test_a_machine_that_could_not_be_launched_honestly_is_not_started(
    host: Host, qemu: str, more: list[str], sentence: str
) -> None:
    assert died(host, qemu, *more) == f"qemu-system-x86_64: {sentence}"


@EACH_QEMU
def test_an_accelerator_in_a_file_that_the_front_does_not_read_is_not_used(host: Host, qemu: str) -> None:
    (host.folder / "config").write_text('[accel]\n  accel = "kvm"\n')
    line = words(host, qemu, "-readconfig", str(host.folder / "config"))
    with running_machine(line, host.qmp), QmpClient(host.qmp) as client:
        client.negotiate()
        assert client.ask("query-kvm")["enabled"] is False


@EACH_QEMU
def test_a_processor_that_was_plugged_in_after_the_measurement_never_runs(host: Host, qemu: str) -> None:
    line = words(host, qemu, "-cpu", "EPYC-Rome", "-smp", "1,maxcpus=2")
    with running_machine(line, host.qmp) as machine, QmpClient(host.qmp) as client:
        client.negotiate()
        client.send(b"%s" % _device_add())
        assert client.reply() == {"return": {}}
        client.send(b'{"execute": "cont"}')
        assert client.line() == b""
        _, err = machine.communicate(timeout=TIMEOUT)
        assert machine.returncode == 1
        assert err.splitlines()[-1] == "qemu-system-x86_64: the machine has 2 vCPUs, of which 1 were measured"
        assert "RESUME" not in [event["event"] for event in client.events]


@EACH_QEMU
def test_as_many_processors_as_were_measured_run(host: Host, qemu: str) -> None:
    line = words(host, qemu, "-cpu", "EPYC-Rome", "-smp", "2,maxcpus=2")
    with running_machine(line, host.qmp), QmpClient(host.qmp) as client:
        client.negotiate()
        assert client.ask("cont") == {}
        assert client.ask("query-sev")["state"] == "running"


@EACH_QEMU
def test_a_machine_that_is_being_migrated_takes_no_secret(host: Host, qemu: str) -> None:
    with running_machine(words(host, qemu), host.qmp), QmpClient(host.qmp) as client:
        client.negotiate()
        packet = packet_for(host, blob_of(client))
        client.ask("migrate", uri=f"exec:cat > {host.folder / 'stream'}")
        assert client.refusal(INJECT, **packet) == RUNNING
        assert not any(saved(client, host, 0x810000, 0xC00))


@EACH_QEMU
def test_a_protected_guest_that_is_reset_all_the_same_ends(host: Host, qemu: str) -> None:
    with running_machine(words(host, qemu), host.qmp) as machine, QmpClient(host.qmp) as client:
        client.negotiate()
        client.ask("set-action", reboot="reset")
        client.send(b'{"execute": "system_reset"}')
        while client.line():
            pass
        _, err = machine.communicate(timeout=TIMEOUT)
        assert machine.returncode == 1
        assert err.splitlines()[-1] == "qemu-system-x86_64: cpus are not resettable, terminating"


@EACH_QEMU
@pytest.mark.parametrize("size", ["268435456", "0x10000000", "0.25G", "256M"])
def test_ram_of_a_backend_is_the_fronts_however_its_size_is_written(host: Host, qemu: str, size: str) -> None:
    more = ["-object", f"memory-backend-ram,id=m0,size={size}", "-machine", "memory-backend=m0", *host.kernel]
    with running_machine(words(host, qemu, *more), host.qmp), QmpClient(host.qmp) as client:
        client.negotiate()
        assert any(saved(client, host, HASHES_AT, 176))
        client.ask(INJECT, **packet_for(host, blob_of(client)))
        assert any(saved(client, host, 0x810000, 0xC00))


@EACH_QEMU
@pytest.mark.parametrize("size", ["256", "0.25G", "256M", "size=262144k"])
def test_the_size_of_ram_is_read_as_qemu_reads_it(host: Host, qemu: str, size: str) -> None:
    with running_machine(words(host, qemu, "-m", size), host.qmp), QmpClient(host.qmp) as client:
        client.negotiate()
        assert client.ask("query-memory-size-summary")["base-memory"] == 256 << 20


@EACH_QEMU
def test_ram_that_the_front_cannot_reach_is_refused_and_not_written_past(host: Host, qemu: str) -> None:
    # QEMU takes this file for RAM; the front has no way to know of it.
    (host.folder / "config").write_text('[object "m0"]\n  qom-type = "memory-backend-ram"\n  size = "268435456"\n')
    more = ["-readconfig", str(host.folder / "config"), "-machine", "memory-backend=m0"]
    said = died(host, qemu, *more)
    assert "cannot reach the machine's RAM" in said


@EACH_QEMU
def test_words_that_look_like_the_fronts_own_are_left_alone(host: Host, qemu: str) -> None:
    with running_machine(words(host, qemu, "-name", "a{ram}b"), host.qmp), QmpClient(host.qmp) as client:
        client.negotiate()
        assert client.ask("query-name") == {"name": "a{ram}b"}


@EACH_QEMU
def test_a_property_of_a_newer_qemu_is_refused_by_an_older_one(host: Host, qemu: str) -> None:
    line = words(host, qemu)
    at = line.index("-object") + 1
    line[at] += ",legacy-vm-type=on"
    if version_of(qemu) >= (9, 1):
        with running_machine(line, host.qmp), QmpClient(host.qmp) as client:
            client.negotiate()
            assert client.ask("query-sev")["enabled"] is True
    else:
        done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1].endswith("Invalid parameter 'legacy-vm-type'")


def _device_add() -> bytes:
    pairs = ", ".join(
        f'"{key}": "{value}"' if isinstance(value, str) else f'"{key}": {value}' for key, value in CPU.items()
    )
    return b'{"execute": "device_add", "arguments": {%s}}' % pairs.encode()
