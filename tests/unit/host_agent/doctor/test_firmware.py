"""The firmware's probes, on a device whose answers the test sets."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from common.amd.kds import FolderKeyService, KeyService
from common.errors import Reason, SevattestError, Unavailable
from common.sev.abi import PlatformState
from common.sev.certs.roots import Root, pinned_roots
from common.sev.floors import FLOORS
from common.sev.measurement import FirmwareVersion
from host_agent.devices import PlatformStatus
from host_agent.doctor.findings import Finding
from host_agent.doctor.firmware import probe
from tests.support.chains import SyntheticPlatform, fresh_ca, make_platform
from tests.support.hosts import outcomes
from verifier.documents.generations import GENERATIONS

CHIP_ID = bytes(range(64))


@dataclass(kw_only=True)
class FakeDevice:
    """A platform, and what was asked of it."""

    chains: list[bytes]
    status_now: PlatformStatus = field(
        default_factory=lambda: PlatformStatus(
            firmware=FirmwareVersion(1, 55, 21),
            state=PlatformState.INIT,
            externally_owned=False,
            es_enabled=True,
            guest_count=0,
        )
    )
    silent: SevattestError | None = None
    asked: list[str] = field(default_factory=list)

    async def status(self) -> PlatformStatus:
        self.asked.append("status")
        if self.silent:
            raise self.silent
        return self.status_now

    async def export_chain(self) -> bytes:
        self.asked.append("export")
        return self.chains.pop(0)

    async def chip_id(self) -> bytes:
        self.asked.append("chip_id")
        return CHIP_ID


@pytest.fixture(scope="module")
def platform() -> SyntheticPlatform:
    return make_platform()


@pytest.fixture
def device(platform: SyntheticPlatform) -> FakeDevice:
    return FakeDevice(chains=[platform.unsigned_chain.to_bytes()] * 3)


def look(
    device: FakeDevice,
    *,
    generation: str | None = "milan",
    es: bool = True,
    snp: bool = False,
    service: KeyService | None = None,
    roots: tuple[Root, ...] = (),
) -> list[Finding]:
    async def run() -> list[Finding]:
        answers = probe(device, generation=generation, es=es, snp=snp, key_service=service, roots=roots)
        return [finding async for finding in answers]

    return asyncio.run(run())


def with_status(device: FakeDevice, **changes: object) -> FakeDevice:
    device.status_now = replace(device.status_now, **changes)  # type: ignore[arg-type]
    return device


def test_a_platform_as_it_should_be_passes_everything_that_was_asked(device: FakeDevice) -> None:
    found = outcomes(look(device))
    assert found.pop("cek.obtainable") == "SKIP"
    assert set(found.values()) == {"PASS"}


def test_nobody_is_asked_for_the_cek_unless_a_key_service_is_named(device: FakeDevice) -> None:
    look(device)
    assert device.asked == ["status", "export", "export"]


@pytest.mark.parametrize(
    ("version", "outcome"),
    [
        ((1, 55, 21), "PASS"),
        ((1, 55, 20), "FAIL"),
        ((1, 54, 99), "FAIL"),
        ((1, 56, 0), "PASS"),
        ((0, 255, 255), "FAIL"),
    ],
)
def test_the_firmware_is_held_against_its_generations_floor(
    device: FakeDevice, version: tuple[int, int, int], outcome: str
) -> None:
    assert outcomes(look(with_status(device, firmware=FirmwareVersion(*version))))["firmware.floor"] == outcome


def test_the_floors_are_those_that_verifiers_refuse_by() -> None:
    assert {name: generation.floor for name, generation in GENERATIONS.items()} == {
        name: floor.version for name, floor in FLOORS.items()
    }
    assert FLOORS["naples"].version == FirmwareVersion(0, 17, 22)


@pytest.mark.parametrize("generation", ["turin", None])
def test_without_a_floor_there_is_nothing_to_hold_against(device: FakeDevice, generation: str | None) -> None:
    assert outcomes(look(device, generation=generation))["firmware.floor"] == "SKIP"


@pytest.mark.parametrize(("minor", "outcome"), [(16, "FAIL"), (17, "PASS")])
def test_an_api_whose_measurement_covers_no_version_fails(device: FakeDevice, minor: int, outcome: str) -> None:
    found = outcomes(look(with_status(device, firmware=FirmwareVersion(0, minor, 99)), generation="naples"))
    assert found["firmware.api"] == outcome


@pytest.mark.parametrize(("es", "outcome"), [(True, "FAIL"), (False, "WARN")])
def test_a_platform_without_sev_es_fails_for_sev_es_guests(device: FakeDevice, *, es: bool, outcome: str) -> None:
    assert outcomes(look(with_status(device, es_enabled=False), es=es))["firmware.es"] == outcome


@pytest.mark.parametrize("es", [True, False])
def test_what_the_device_does_not_tell_is_skipped_and_neither_good_nor_bad(device: FakeDevice, *, es: bool) -> None:
    with_status(device, firmware=None, externally_owned=None, es_enabled=None, guest_count=None)
    findings = look(device, es=es)
    found = outcomes(findings)
    assert {name for name, verdict in found.items() if verdict == "SKIP"} == {
        *("firmware.api", "firmware.floor", "firmware.es"),
        "cek.obtainable",  # no key service is named
    }
    assert "FAIL" not in found.values()
    assert "None" not in " ".join(line for finding in findings for line in finding.lines)


@pytest.mark.parametrize(
    ("minor", "es", "snp", "outcome"),
    [
        (58, True, True, "FAIL"),
        (57, True, True, "WARN"),
        (58, False, True, "WARN"),
        (58, True, False, "PASS"),
    ],
)
def test_sev_es_guests_beside_snp_are_refused_by_firmware_from_1_58_on(
    device: FakeDevice, *, minor: int, es: bool, snp: bool, outcome: str
) -> None:
    found = outcomes(look(with_status(device, firmware=FirmwareVersion(1, minor, 0)), es=es, snp=snp))
    assert found["firmware.snp"] == outcome


def test_a_platform_that_is_not_initialised_is_left_so(device: FakeDevice) -> None:
    found = outcomes(look(with_status(device, state=PlatformState.UNINIT)))
    assert device.asked == ["status"]
    assert (found["pdh.stable"], found["cek.obtainable"], found["firmware.es"]) == ("SKIP", "SKIP", "SKIP")


def test_a_device_that_does_not_answer_fails_and_its_advice_is_handed_on(device: FakeDevice) -> None:
    device.silent = Unavailable(Reason.PLATFORM_UNAVAILABLE, "the PSP is dead", hint="reboot the host")
    (only,) = look(device)
    assert (only.probe, str(only.outcome), only.seen) == ("firmware.answers", "FAIL", "the PSP is dead")
    assert only.advice == "reboot the host"


def test_a_pdh_that_changes_from_export_to_export_fails(device: FakeDevice) -> None:
    device.chains[1] = make_platform().unsigned_chain.to_bytes()
    assert outcomes(look(device))["pdh.stable"] == "FAIL"


def test_certificates_that_are_none_fail(device: FakeDevice) -> None:
    device.chains[0] = bytes(8336)
    assert outcomes(look(device))["pdh.stable"] == "FAIL"


def put_cek(folder: Path, platform: SyntheticPlatform) -> KeyService:
    (folder / f"{CHIP_ID.hex().upper()}.cert").write_bytes(platform.chain.cek.raw)
    return FolderKeyService(folder)


def test_the_signed_cek_is_found_and_verified(device: FakeDevice, platform: SyntheticPlatform, tmp_path: Path) -> None:
    found = look(device, service=put_cek(tmp_path, platform), roots=(platform.ca.root,))
    assert outcomes(found)["cek.obtainable"] == "PASS"


def test_a_cek_under_another_root_fails(device: FakeDevice, platform: SyntheticPlatform, tmp_path: Path) -> None:
    service = put_cek(tmp_path, platform)
    assert outcomes(look(device, service=service, roots=pinned_roots()))["cek.obtainable"] == "FAIL"
    assert (
        outcomes(look(_again(device, platform), service=service, roots=(fresh_ca().root,)))["cek.obtainable"] == "FAIL"
    )


def test_another_chips_cek_fails(device: FakeDevice, platform: SyntheticPlatform, tmp_path: Path) -> None:
    service = put_cek(tmp_path, make_platform())
    assert outcomes(look(device, service=service, roots=(platform.ca.root,)))["cek.obtainable"] == "FAIL"


def test_a_cek_that_nobody_has_fails(device: FakeDevice, platform: SyntheticPlatform, tmp_path: Path) -> None:
    found = look(device, service=FolderKeyService(tmp_path), roots=(platform.ca.root,))
    assert outcomes(found)["cek.obtainable"] == "FAIL"


def _again(device: FakeDevice, platform: SyntheticPlatform) -> FakeDevice:
    device.chains = [platform.unsigned_chain.to_bytes()] * 2
    return device
