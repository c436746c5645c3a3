"""The doctor on whole hosts: the good one passes, each of its evil twins fails where it differs, and nowhere else."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from host_agent.doctor.captured import CapturedMachine
from host_agent.doctor.examination import Question, examine
from host_agent.doctor.findings import Finding, Outcome, stops_launches
from tests.support.hosts import HOSTS, changed, host, outcomes

UNASKED = {"firmware.answers": "SKIP"}  # a host that was written down has no firmware
UNCOUNTED = {"kvm.asids_free": "SKIP"}


def look(machine: CapturedMachine, *, es: bool = True) -> list[Finding]:
    question = Question(machine=machine, config_file=None, environ={}, captured=True, es=es, key_service=None, roots=())
    return asyncio.run(examine(question))


def not_passed(findings: list[Finding]) -> dict[str, str]:
    return {probe: outcome for probe, outcome in outcomes(findings).items() if outcome != "PASS"}


# What does not pass on each host, where SEV-ES guests are to be launched.
EXPECTED = {
    "rome-sev-es": UNASKED,
    "rome-asid-limit-1": {**UNASKED, **UNCOUNTED, "cpu.asids": "FAIL", "kvm.sev_es": "FAIL"},
    "rome-kernel-off": {
        **UNASKED,
        **UNCOUNTED,
        "kernel.command_line": "FAIL",
        "kvm.sev": "FAIL",
        "kvm.sev_es": "FAIL",
    },
    "rome-no-device": {
        **UNASKED,
        **UNCOUNTED,
        "kvm.sev": "FAIL",
        "kvm.sev_es": "FAIL",
        "device.present": "FAIL",
        "device.writable": "SKIP",
    },
    "rome-sme-off": {
        **UNASKED,
        **UNCOUNTED,
        "cpu.sme": "FAIL",
        "kvm.sev": "FAIL",
        "kvm.sev_es": "FAIL",
        "device.present": "FAIL",
        "device.writable": "SKIP",
    },
    "rome-unprivileged": {
        **UNASKED,
        **UNCOUNTED,
        "cpu.asids": "SKIP",
        "cpu.c_bit": "SKIP",
        "device.present": "FAIL",
        "device.writable": "FAIL",
        "clock.sane": "SKIP",
        "memlock": "FAIL",
    },
    "naples-sev": {**UNASKED, **UNCOUNTED, "cpu.sev_es": "FAIL", "kvm.sev_es": "FAIL"},
    "milan-snp": {**UNASKED, "kvm.asids_free": "FAIL", "firmware.snp": "WARN"},
    "intel": {
        **UNASKED,
        **UNCOUNTED,
        "cpu.vendor": "FAIL",
        "kvm.sev": "FAIL",
        "kvm.sev_es": "FAIL",
        "device.present": "FAIL",
        "device.writable": "SKIP",
        "memlock": "FAIL",
    },
    "virtual-machine": {
        **UNASKED,
        **UNCOUNTED,
        "cpu.sme": "FAIL",
        "cpu.sev": "FAIL",
        "cpu.sev_es": "FAIL",
        "kvm.sev": "FAIL",
        "kvm.sev_es": "FAIL",
        "device.present": "FAIL",
        "device.writable": "SKIP",
        "clock.sane": "WARN",
        "qemu.version": "FAIL",
        "memlock": "FAIL",
    },
}


def test_every_host_that_was_written_down_is_looked_at() -> None:
    assert {folder.name for folder in HOSTS.iterdir() if folder.is_dir()} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_host_fails_where_it_lacks_something_and_nowhere_else(name: str) -> None:
    assert not_passed(look(host(name))) == EXPECTED[name]


@pytest.mark.parametrize("name", EXPECTED)
def test_whatever_fails_or_warns_comes_with_advice(name: str) -> None:
    for finding in look(host(name)):
        if finding.outcome in {Outcome.FAIL, Outcome.WARN}:
            assert finding.advice, finding.probe
            assert not finding.advice.endswith("."), finding.probe


def test_only_the_hosts_that_are_ready_let_guests_be_launched() -> None:
    assert {name for name in EXPECTED if not stops_launches(look(host(name)))} == {"rome-sev-es"}


def test_a_host_without_sev_es_is_good_for_sev_guests() -> None:
    findings = look(host("naples-sev"), es=False)
    assert not stops_launches(findings)
    assert not_passed(findings) == {**UNASKED, **UNCOUNTED, "cpu.sev_es": "WARN", "kvm.sev_es": "WARN"}


def test_a_host_whose_split_leaves_no_asid_for_sev_guests_fails_for_those_only(tmp_path: Path) -> None:
    root = changed(
        tmp_path,
        "rome-sev-es",
        {},
        facts={"0x8000001f": "0x8000001f = [0x0001000f, 0x0000016f, 0x000001fd, 0x000001fe]"},
    )
    assert outcomes(look(CapturedMachine(root), es=False))["cpu.asids"] == "FAIL"
    assert outcomes(look(CapturedMachine(root), es=True))["cpu.asids"] == "PASS"


def advice_of(findings: list[Finding], probe: str) -> str:
    return next(finding.advice for finding in findings if finding.probe == probe)


@pytest.mark.parametrize(
    ("name", "probe", "word"),
    [
        ("rome-asid-limit-1", "cpu.asids", "SEV-ES ASID Space Limit"),
        ("rome-asid-limit-1", "kvm.sev_es", "SEV-ES ASID Space Limit"),
        ("rome-kernel-off", "kernel.command_line", "kvm_amd.sev=0"),
        ("rome-kernel-off", "kvm.sev", "kvm_amd.sev=0"),
        ("rome-sme-off", "cpu.sme", "SMEE"),
        ("rome-sme-off", "kvm.sev", "SMEE"),
        ("rome-no-device", "device.present", "ccp"),
        ("rome-unprivileged", "device.present", "udev"),
        ("rome-unprivileged", "memlock", "LimitMEMLOCK"),
        ("virtual-machine", "cpu.sev", "virtual machine"),
        ("milan-snp", "firmware.snp", "kvm_amd.sev_snp=0"),
        ("naples-sev", "kvm.sev_es", "Linux 5.11"),
    ],
)
def test_the_advice_names_the_cause(name: str, probe: str, word: str) -> None:
    assert word in advice_of(look(host(name)), probe)


@pytest.mark.parametrize("word", ["kvm_amd.sev=0", "kvm_amd.sev_es=0", "kvm_amd.sev_es=N"])
def test_a_kernel_that_was_told_to_leave_sev_off_is_noticed(tmp_path: Path, word: str) -> None:
    root = changed(tmp_path, "rome-sev-es", {"proc/cmdline": f"ro quiet {word}\n"})
    assert outcomes(look(CapturedMachine(root)))["kernel.command_line"] == "FAIL"


def test_a_kernel_that_was_told_nothing_is_left_alone(tmp_path: Path) -> None:
    root = changed(tmp_path, "rome-sev-es", {"proc/cmdline": "ro quiet\n"})
    assert outcomes(look(CapturedMachine(root)))["kernel.command_line"] == "PASS"


def test_a_device_that_cannot_be_written_to_stops_qemu(tmp_path: Path) -> None:
    root = changed(tmp_path, "rome-sev-es", {}, facts={'"/dev/sev"': '"/dev/sev" = "r"'})
    assert not_passed(look(CapturedMachine(root))) == {**UNASKED, "device.writable": "FAIL"}


def test_a_node_without_its_driver_is_no_device(tmp_path: Path) -> None:
    root = changed(tmp_path, "rome-sev-es", {}, facts={'"/dev/sev"': '"/dev/sev" = "ENXIO"'})
    assert not_passed(look(CapturedMachine(root))) == {
        **UNASKED,
        "device.present": "FAIL",
        "device.writable": "SKIP",
    }


def test_the_last_free_asid_passes_and_none_fails(tmp_path: Path) -> None:
    last = changed(tmp_path / "last", "rome-sev-es", {"sys/fs/cgroup/misc.current": "sev 0\nsev_es 98\n"})
    none = changed(tmp_path / "none", "rome-sev-es", {"sys/fs/cgroup/misc.current": "sev 0\nsev_es 99\n"})
    assert outcomes(look(CapturedMachine(last)))["kvm.asids_free"] == "PASS"
    assert outcomes(look(CapturedMachine(none)))["kvm.asids_free"] == "FAIL"


def test_a_machine_of_which_nothing_can_be_read_is_described_and_not_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "machine.toml").write_text("memlock = [65536, 65536]\n")
    found = outcomes(look(CapturedMachine(tmp_path)))
    assert found["cpu.vendor"] == "FAIL"
    assert "PASS" not in {found[probe] for probe in ("kvm.device", "kvm.sev", "device.present", "qemu.version")}


DOCTOR = (Path(__file__).parents[4] / "docs" / "doctor.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", EXPECTED)
def test_every_probe_is_on_the_page(name: str) -> None:
    assert [probe for probe in outcomes(look(host(name))) if f"`{probe}`" not in DOCTOR] == []
