"""Register pages in the five flavours."""

from __future__ import annotations

import hashlib

import pytest

from common.errors import InvalidInput
from common.sev.digest.cpus import parse_cpu
from common.sev.digest.vmsa import Flavour, ap_page, boot_page, vmsa_pages
from tests.support.vectors import vectors

_MILAN = parse_cpu("25-1-1")
_RESET = 0x80B004


def _differing(one: bytes, other: bytes) -> dict[int, int]:
    """Offsets at which two pages differ, with what the second has there."""
    return {at: other[at] for at in range(4096) if one[at] != other[at]}


def _page(flavour: Flavour, *, ap: bool) -> bytes:
    return ap_page(cpu=_MILAN, flavour=flavour, reset_address=_RESET) if ap else boot_page(cpu=_MILAN, flavour=flavour)


def test_legacy_pages_have_the_published_hashes() -> None:
    boot, ap = vmsa_pages(vcpus=2, cpu=_MILAN, flavour=Flavour.LEGACY, reset_address=_RESET)
    assert hashlib.sha256(boot).hexdigest() == "f8b52f775502472e5797d2674d9de21f6abc05dc05e9bc49cbb7b6a13688d5e7"
    assert hashlib.sha256(ap).hexdigest() == "bcee5cb289f72882da17abd8dca5e8a7e9f8e2033e7ad96b4db0ab1a383a6487"


def test_legacy_pages_are_those_that_sevctl_made() -> None:
    pages = list(vmsa_pages(vcpus=2, cpu=_MILAN, flavour=Flavour.LEGACY, reset_address=_RESET))
    assert pages == [(vectors() / "vmsa" / f"vmsa{number}.bin").read_bytes() for number in (0, 1)]


def test_an_ap_starts_at_the_firmwares_reset_address() -> None:
    page = _page(Flavour.LEGACY, ap=True)
    assert int.from_bytes(page[0x178:0x180], "little") == 0xB004
    assert int.from_bytes(page[0x018:0x020], "little") == 0x800000


@pytest.mark.parametrize("ap", [False, True])
def test_init2_sets_the_fpu_words_and_nothing_else(*, ap: bool) -> None:
    changed = _differing(_page(Flavour.LEGACY, ap=ap), _page(Flavour.INIT2, ap=ap))
    assert changed == {0x408: 0x80, 0x409: 0x1F, 0x410: 0x7F, 0x411: 0x03}


@pytest.mark.parametrize("ap", [False, True])
@pytest.mark.parametrize(
    ("plain", "swapped"),
    [(Flavour.LEGACY, Flavour.LEGACY_DEBUG_SWAP), (Flavour.INIT2, Flavour.INIT2_DEBUG_SWAP)],
)
def test_debug_swap_sets_one_feature_bit_and_nothing_else(plain: Flavour, swapped: Flavour, *, ap: bool) -> None:
    assert _differing(_page(plain, ap=ap), _page(swapped, ap=ap)) == {0x3B0: 0x20}


def test_init2_ap_zero_sets_the_fpu_words_on_the_boot_cpu_only() -> None:
    assert _page(Flavour.INIT2_AP_ZERO, ap=False) == _page(Flavour.INIT2, ap=False)
    assert _page(Flavour.INIT2_AP_ZERO, ap=True) == _page(Flavour.LEGACY, ap=True)


def test_the_cpu_type_is_in_rdx_and_nowhere_else() -> None:
    rome = boot_page(cpu=parse_cpu("EPYC-Rome"), flavour=Flavour.LEGACY)
    changed = _differing(boot_page(cpu=_MILAN, flavour=Flavour.LEGACY), rome)
    assert set(changed) <= set(range(0x310, 0x314))
    assert int.from_bytes(rome[0x310:0x318], "little") == 0x00830F10


@pytest.mark.parametrize("flavour", Flavour)
def test_every_other_cpu_has_the_same_page(flavour: Flavour) -> None:
    boot, *others = vmsa_pages(vcpus=64, cpu=_MILAN, flavour=flavour, reset_address=_RESET)
    assert len(boot) == 4096
    assert others == [_page(flavour, ap=True)] * 63


def test_the_five_flavours_have_their_names() -> None:
    assert [str(flavour) for flavour in Flavour] == [
        "legacy",
        "legacy+debug-swap",
        "init2",
        "init2+debug-swap",
        "init2-ap-zero",
    ]


def test_one_vcpu_needs_no_reset_address_and_two_do() -> None:
    assert len(list(vmsa_pages(vcpus=1, cpu=_MILAN, flavour=Flavour.LEGACY, reset_address=None))) == 1
    with pytest.raises(InvalidInput, match="no SEV-ES reset address"):
        vmsa_pages(vcpus=2, cpu=_MILAN, flavour=Flavour.LEGACY, reset_address=None)


@pytest.mark.parametrize("vcpus", [-1, 0, 65])
def test_a_number_of_vcpus_out_of_range_is_refused(vcpus: int) -> None:
    with pytest.raises(InvalidInput, match="1 to 64 vCPUs"):
        vmsa_pages(vcpus=vcpus, cpu=_MILAN, flavour=Flavour.LEGACY, reset_address=_RESET)
