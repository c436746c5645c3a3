"""What must be measured of a definition, held against sev-snp-measure."""

from __future__ import annotations

from pathlib import Path

import pytest
from sevsnpmeasure import guest as outside
from sevsnpmeasure import vcpu_types
from sevsnpmeasure.sev_mode import SevMode

from common.errors import InvalidInput
from common.sev.digest.cpus import parse_cpu
from common.sev.digest.vmsa import Flavour
from emulator.firmware_image import build_image
from host_agent.hypervisors.base import GuestDefinition
from host_agent.selftest.expectation import Expectation, expect


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "OVMF.fd").write_bytes(build_image("one"))
    (tmp_path / "kernel").write_bytes(b"kernel")
    (tmp_path / "initrd").write_bytes(b"initrd")
    return tmp_path


def of(folder: Path, *args: str, es: bool = True, host_cpu: str | None = None) -> Expectation:
    definition = GuestDefinition(program=("qemu",), firmware=folder / "OVMF.fd", args=args)
    return expect(definition, es=es, host_cpu=None if host_cpu is None else parse_cpu(host_cpu))


def digests(expectation: Expectation) -> list[bytes]:
    return [each.shape.digest() for each in expectation.expected]


def boot(folder: Path) -> list[str]:
    return ["-kernel", str(folder / "kernel"), "-initrd", str(folder / "initrd"), "-append", "quiet"]


@pytest.mark.parametrize(("cpu", "vcpus"), [("EPYC-Rome", 1), ("EPYC-Milan", 4)])
def test_sev_snp_measure_agrees_on_a_guest_with_sev_es(folder: Path, cpu: str, vcpus: int) -> None:
    found = of(folder, "-smp", str(vcpus), "-cpu", cpu, *boot(folder))
    said = outside.calc_launch_digest(
        SevMode.SEV_ES,
        vcpus,
        vcpu_types.CPU_SIGS[cpu],
        str(folder / "OVMF.fd"),
        str(folder / "kernel"),
        str(folder / "initrd"),
        "quiet",
        0,
    )
    assert digests(found)[[*Flavour].index(Flavour.INIT2)] == said
    assert len(set(digests(found))) == len(Flavour) - (vcpus == 1)  # the two that differ in their APs only
    assert said not in digests(of(folder, "-smp", str(vcpus + 1), "-cpu", cpu, *boot(folder)))


@pytest.mark.parametrize("boots", [True, False])
def test_sev_snp_measure_agrees_on_a_guest_without(folder: Path, *, boots: bool) -> None:
    found = of(folder, "-smp", "4", *(boot(folder) if boots else []), es=False)
    parts = (str(folder / "kernel"), str(folder / "initrd"), "quiet") if boots else ("", "", "")
    said = outside.calc_launch_digest(SevMode.SEV, 4, 0, str(folder / "OVMF.fd"), *parts, 0)
    assert digests(found) == [said]


def test_the_hosts_processor_is_the_guests_where_the_definition_says_so(folder: Path) -> None:
    assert digests(of(folder, "-cpu", "host", host_cpu="23-49-0")) == digests(of(folder, "-cpu", "EPYC-Rome"))
    with pytest.raises(InvalidInput, match="cannot be read"):
        of(folder, "-cpu", "host")


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["-cpu", "Opteron_G5"], "Opteron_G5"),
        (["-smp", "some"], "-smp some"),
        (["-smp", "65"], "1 to 64 vCPUs"),
        (["-kernel", "/nowhere/vmlinuz"], "/nowhere/vmlinuz"),
    ],
)
def test_what_cannot_be_computed_is_refused(folder: Path, args: list[str], sentence: str) -> None:
    with pytest.raises(InvalidInput, match=sentence):
        of(folder, *args)
