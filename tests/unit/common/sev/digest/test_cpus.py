"""CPU types and their signatures, with sev-snp-measure's table as witness."""

from __future__ import annotations

import pytest
from sevsnpmeasure.vcpu_types import CPU_SIGS, cpu_sig

from common.sev.digest.cpus import CPU_TYPES, CpuType, parse_cpu
from common.sev.errors import ParseError


@pytest.mark.parametrize(("name", "signature"), CPU_SIGS.items())
def test_every_model_that_sev_snp_measure_knows_has_the_same_signature(name: str, signature: int) -> None:
    assert parse_cpu(name).signature == signature


@pytest.mark.parametrize(
    ("text", "signature"),
    [("25-1-1", 0x00A00F11), ("EPYC-v4", 0x00800F12), ("23-49-0", 0x00830F10), ("EPYC-Rome", 0x00830F10)],
)
def test_known_signatures_come_out(text: str, signature: int) -> None:
    assert parse_cpu(text).signature == signature


def test_the_numbers_of_the_known_case_are_those_of_epyc_rome() -> None:
    rome = parse_cpu("EPYC-Rome")
    assert (rome.family, rome.model, rome.stepping) == (23, 49, 0)


def test_signatures_agree_with_sev_snp_measure_for_all_families_and_models() -> None:
    for family in (0, 6, 14, 15, 16, 23, 25, 26, 270):
        for model in range(256):
            for stepping in (0, 1, 15):
                cpu = CpuType(name="any", family=family, model=model, stepping=stepping)
                assert cpu.signature == cpu_sig(family, model, stepping)


def test_numbers_make_a_type_of_their_own_name() -> None:
    cpu = parse_cpu("25-17-3")
    assert (cpu.family, cpu.model, cpu.stepping, str(cpu)) == (25, 17, 3, "25-17-3")
    assert str(parse_cpu("EPYC-Milan")) == "EPYC-Milan (25-1-1)"


def test_every_known_model_has_its_own_name() -> None:
    assert all(name == cpu.name for name, cpu in CPU_TYPES.items())


@pytest.mark.parametrize(
    "text", ["", "host", "epyc-rome", "EPYC-Rome-v9", "Skylake-Server", "23-49", "23-49-0-0", "-1-2-3", "0x17-49-0"]
)
def test_an_unknown_type_is_refused(text: str) -> None:
    with pytest.raises(ParseError, match="EPYC models"):
        parse_cpu(text)


@pytest.mark.parametrize("text", ["271-0-0", "25-256-0", "25-1-16"])
def test_a_number_out_of_range_is_refused(text: str) -> None:
    with pytest.raises(ParseError, match="not"):
        parse_cpu(text)
