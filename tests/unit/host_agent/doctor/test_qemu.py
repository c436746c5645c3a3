"""What a program says of itself: the QEMU on this machine, and programs that say something else."""

from __future__ import annotations

from pathlib import Path

import pytest

from host_agent.doctor.captured import CapturedMachine
from host_agent.doctor.qemu import probe
from host_agent.doctor.this_machine import ThisMachine
from tests.support.hosts import outcomes
from tests.support.real_qemu import EACH_QEMU, qemu

__all__ = ["qemu"]  # a fixture
OBJECTS = "List of user creatable objects:\n  secret\n  sev-guest\n"
PROPERTIES = "sev-guest options:\n  kernel-hashes=<bool>\n"


def saying(folder: Path, version: str, objects: str = OBJECTS, properties: str = PROPERTIES) -> dict[str, str]:
    lines = [
        "memlock = [0, 0]",
        "[programs]",
        f'"qemu -version" = """{version}"""',
        f'"qemu -object help" = """{objects}"""',
        f'"qemu -object sev-guest,help" = """{properties}"""',
    ]
    (folder / "machine.toml").write_text("\n".join(lines))
    return outcomes([*probe(CapturedMachine(folder), ["qemu"], of="")])


@EACH_QEMU
def test_a_real_qemu_is_known(qemu: str) -> None:
    found = outcomes([*probe(ThisMachine(), [qemu], of="web")])
    assert found["qemu.web.version"] in {"PASS", "WARN"}
    assert found["qemu.web.sev_guest"] == "PASS"


@pytest.mark.parametrize(
    ("version", "outcome"),
    [
        ("7.2.0 (pve-qemu-kvm_7.2.0-8)", "PASS"),
        ("10.0.11", "PASS"),
        ("6.1.0", "FAIL"),
        ("6.2.0", "WARN"),
        ("11.0.0", "WARN"),
    ],
)
def test_its_version_decides(tmp_path: Path, version: str, outcome: str) -> None:
    assert saying(tmp_path, f"QEMU emulator version {version}\n")["qemu.version"] == outcome


def test_a_qemu_without_sev_fails(tmp_path: Path) -> None:
    found = saying(tmp_path, "QEMU emulator version 7.2.0\n", objects="  secret\n")
    assert found == {"qemu.version": "PASS", "qemu.sev_guest": "FAIL"}


def test_a_qemu_that_hashes_no_kernel_fails(tmp_path: Path) -> None:
    found = saying(tmp_path, "QEMU emulator version 7.2.0\n", properties="  policy=<int>\n")
    assert found["qemu.sev_guest"] == "FAIL"


def test_another_program_is_skipped(tmp_path: Path) -> None:
    assert saying(tmp_path, "invalid option\n") == {"qemu.version": "SKIP"}


def test_a_program_that_is_not_there_fails() -> None:
    assert outcomes([*probe(ThisMachine(), ["/nowhere/qemu"], of="")]) == {"qemu.version": "FAIL"}
