"""A guest's definition: its firmware's footer, what spoils a launch, its memory and its monitors."""

from __future__ import annotations

from pathlib import Path

import pytest

from emulator.firmware_image import build_image
from host_agent.doctor.captured import CapturedMachine
from host_agent.doctor.guests import probe, probe_foreign
from host_agent.hypervisors.options import Options
from tests.support.hosts import changed, host, outcomes

KERNEL = ["-kernel", "/k", "-append", "quiet"]
GOOD = ["-machine", "q35", "-smp", "4", "-m", "4G", *KERNEL]
UNIX = "Num       RefCount Protocol Flags    Type St Inode Path\n"


@pytest.fixture
def firmware(tmp_path: Path) -> Path:
    path = tmp_path / "OVMF.fd"
    path.write_bytes(build_image("one"))
    return path


def look(firmware: Path, args: list[str], *, es: bool = True, machine: CapturedMachine | None = None) -> dict[str, str]:
    findings = [*probe(machine or host("rome-sev-es"), "web", firmware, args, es=es)]
    return {name.removeprefix("guest.web."): outcome for name, outcome in outcomes(findings).items()}


def test_a_guest_as_it_should_be_passes_everything(firmware: Path) -> None:
    assert set(look(firmware, GOOD).values()) == {"PASS"}


def test_a_distributions_ovmf_has_no_room_for_secrets(tmp_path: Path) -> None:
    path = tmp_path / "OVMF_CODE.fd"
    path.write_bytes(build_image("plain", secret_area=(0, 0), hashes_area=(0, 0)))
    found = look(path, GOOD)
    assert (found["secret_area"], found["hashes_area"]) == ("FAIL", "FAIL")


def test_an_area_for_hashes_is_needed_by_a_kernel_only(tmp_path: Path) -> None:
    path = tmp_path / "OVMF.fd"
    path.write_bytes(build_image("no hashes", hashes_area=None))
    assert look(path, GOOD)["hashes_area"] == "FAIL"
    assert look(path, ["-m", "1G"])["hashes_area"] == "PASS"


@pytest.mark.parametrize(
    ("smp", "es", "outcome"),
    [("4", True, "FAIL"), ("1", True, "PASS"), ("4", False, "PASS"), ("cores=2", True, "FAIL")],
)
def test_a_reset_block_is_needed_by_a_second_vcpu_with_sev_es(
    tmp_path: Path, *, smp: str, es: bool, outcome: str
) -> None:
    path = tmp_path / "OVMF.fd"
    path.write_bytes(build_image("no reset block", reset_address=None))
    assert look(path, ["-smp", smp], es=es)["reset_block"] == outcome


@pytest.mark.parametrize("size", [0, 40, 4096 + 16])
def test_what_is_no_flash_image_fails(tmp_path: Path, size: int) -> None:
    path = tmp_path / "OVMF.fd"
    path.write_bytes(bytes(size))
    assert look(path, GOOD)["firmware"] == "FAIL"


def test_a_firmware_that_is_not_there_fails_and_the_rest_is_looked_at(tmp_path: Path) -> None:
    assert look(tmp_path / "none", GOOD) == {"firmware": "FAIL", "nvram": "PASS", "memlock": "PASS", "monitor": "PASS"}


@pytest.mark.parametrize(
    "args",
    [
        ["-drive", "if=pflash,format=raw,unit=1,file=/var/lib/vm/OVMF_VARS.fd"],
        ["-drive", "file=/var/lib/vm/OVMF_VARS.fd,format=raw,if=pflash"],
        ["-machine", "q35,pflash1=vars"],
        ["-pflash", "/var/lib/vm/OVMF_VARS.fd"],
    ],
)
def test_a_drive_for_nvram_is_found(firmware: Path, args: list[str]) -> None:
    assert look(firmware, [*GOOD, *args])["nvram"] == "FAIL"


@pytest.mark.parametrize(
    "args",
    [
        ["-drive", "if=pflash,format=raw,unit=0,readonly=on,file=OVMF.fd"],
        ["-drive", "if=virtio,format=qcow2,file=disk"],
    ],
)
def test_the_measured_drive_and_disks_are_none(firmware: Path, args: list[str]) -> None:
    assert look(firmware, [*GOOD, *args])["nvram"] == "PASS"


def limited(folder: Path, limit: int, capabilities: str = "0000000000000000") -> CapturedMachine:
    root = changed(
        folder,
        "rome-sev-es",
        {"proc/self/status": f"CapEff:\t{capabilities}\n"},
        facts={"memlock": f"memlock = [{limit}, {limit}]"},
    )
    return CapturedMachine(root)


def test_a_guest_that_is_larger_than_what_may_be_locked_fails(firmware: Path, tmp_path: Path) -> None:
    machine = limited(tmp_path, 8 << 20)
    assert look(firmware, ["-m", "4G"], machine=machine)["memlock"] == "FAIL"
    assert look(firmware, ["-m", "4G"], machine=limited(tmp_path / "more", 5 << 30))["memlock"] == "PASS"


def test_a_guest_that_leaves_no_room_for_small_roms_warns(firmware: Path, tmp_path: Path) -> None:
    exact = (4 << 30) + firmware.stat().st_size
    assert look(firmware, ["-m", "4G"], machine=limited(tmp_path, exact))["memlock"] == "WARN"
    assert look(firmware, ["-m", "4G"], machine=limited(tmp_path / "less", exact - 1))["memlock"] == "FAIL"


def test_the_right_to_lock_memory_lifts_the_limit(firmware: Path, tmp_path: Path) -> None:
    machine = limited(tmp_path, 65536, capabilities="0000000000004000")  # CAP_IPC_LOCK alone
    assert look(firmware, ["-m", "4G"], machine=machine)["memlock"] == "PASS"


def test_a_memory_size_that_is_not_understood_is_skipped(firmware: Path) -> None:
    assert look(firmware, ["-m", "much"])["memlock"] == "SKIP"


@pytest.mark.parametrize(
    ("line", "outcome"),
    [
        ("0: 00000002 00000000 00010000 0001 01 1 /run/web.qmp", "WARN"),
        ("0: 00000003 00000000 00000000 0001 03 2 /run/web.qmp", "FAIL"),
        ("0: 00000002 00000000 00010000 0001 01 1 /run/other.qmp", "PASS"),
    ],
)
@pytest.mark.parametrize(
    "args",
    [
        ["-qmp", "unix:/run/web.qmp,server=on,wait=off"],
        ["-chardev", "socket,id=q,path=/run/web.qmp,server=on", "-mon", "chardev=q,mode=control"],
    ],
    ids=["qmp", "mon"],
)
def test_a_monitor_that_somebody_holds_is_found(
    firmware: Path, tmp_path: Path, args: list[str], line: str, outcome: str
) -> None:
    machine = CapturedMachine(changed(tmp_path, "rome-sev-es", {"proc/net/unix": f"{UNIX}{line}\n"}))
    assert look(firmware, [*GOOD, *args], machine=machine)["monitor"] == outcome


@pytest.mark.parametrize(
    ("text", "vcpus"),
    [
        ("4", 4),
        ("cpus=8", 8),
        ("8,sockets=2,cores=4", 8),
        ("sockets=2,cores=3,threads=2", 12),
        ("maxcpus=6", 6),
        ("cores=4,maxcpus=8", 8),
        ("sockets=2,cores=2,maxcpus=8", 8),
        ("1,maxcpus=8", 1),
        ("cpus=2,maxcpus=8", 2),
        ("many", None),
        ("cores=x", None),
    ],
)
def test_the_number_of_vcpus_is_read_as_qemu_reads_it(text: str, vcpus: int | None) -> None:
    assert Options(["-smp", text]).vcpus == vcpus


@pytest.mark.parametrize(
    ("text", "mebibytes"),
    [("512", 512), ("4G", 4096), ("size=2g,slots=2", 2048), ("1T", 1 << 20), ("1048576K", 1024)],
)
def test_the_memory_is_read_as_qemu_reads_it(text: str, mebibytes: int) -> None:
    assert Options(["-m", text]).memory == mebibytes << 20


def test_the_last_of_an_option_counts_and_the_first_of_a_cpu_is_its_model() -> None:
    options = Options(["-smp", "2", "-cpu", "EPYC-Rome,+x2apic", "-smp", "3"])
    assert (options.vcpus, options.cpu, Options([]).vcpus, Options([]).memory) == (3, "EPYC-Rome", 1, 128 << 20)


@pytest.mark.parametrize(
    ("line", "outcome"),
    [
        ("0: 00000002 00000000 00010000 0001 01 1 /run/other.qmp", "PASS"),
        ("0: 00000002 00000000 00010000 0001 01 1 /run/web.qmp", "WARN"),
        ("0: 00000003 00000000 00000000 0001 03 2 /run/web.qmp", "FAIL"),
    ],
)
def test_the_monitor_of_a_guest_that_somebody_else_starts_must_be_free(
    firmware: Path, tmp_path: Path, line: str, outcome: str
) -> None:
    machine = CapturedMachine(changed(tmp_path, "rome-sev-es", {"proc/net/unix": f"{UNIX}{line}\n"}))
    found = outcomes([*probe_foreign(machine, "web", firmware, "/run/web.qmp", es=True)])
    assert found.pop("guest.web.monitor") == outcome
    assert set(found.values()) == {"PASS"}


def test_of_a_guest_that_somebody_else_starts_less_is_known(tmp_path: Path) -> None:
    path = tmp_path / "OVMF.fd"
    path.write_bytes(build_image("secrets alone", hashes_area=None, reset_address=None))
    found = outcomes([*probe_foreign(host("rome-sev-es"), "web", path, None, es=True)])
    assert (found["guest.web.hashes_area"], found["guest.web.reset_block"]) == ("WARN", "WARN")
