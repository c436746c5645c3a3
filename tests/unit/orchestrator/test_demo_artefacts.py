"""Which firmware the demonstration measures, and that two versions of the artefacts differ."""

from __future__ import annotations

from pathlib import Path

import pytest

from emulator.firmware_image import build_image
from orchestrator.demo import artefacts
from orchestrator.demo.artefacts import CURRENT, OLD, Artefacts, installed_ovmf


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "OVMF.amdsev.fd"
    monkeypatch.setattr(artefacts, "OVMF_PATHS", (tmp_path / "elsewhere.fd", path))
    return path


def test_an_installed_amdsev_build_is_taken(place: Path) -> None:
    place.write_bytes(build_image("x"))
    assert installed_ovmf() == place


def test_a_build_without_a_place_for_secrets_is_not(place: Path) -> None:
    place.write_bytes(build_image("x", secret_area=(0, 0)))
    assert installed_ovmf() is None


@pytest.mark.parametrize("data", [b"", b"short", bytes(8192)])
def test_what_is_no_firmware_is_not(place: Path, data: bytes) -> None:
    place.write_bytes(data)
    assert installed_ovmf() is None


def test_nothing_installed_is_nothing_taken(place: Path) -> None:
    assert not place.exists()
    assert installed_ovmf() is None


def test_versions_differ_in_every_artefact_and_copies_do_not(tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    versions = [Artefacts(folder=tmp_path, version=version) for version in (OLD, CURRENT)]
    for version in versions:
        version.write_kernel_and_initrd()
        version.firmware.write_bytes(version.version.encode())
    old, new = versions
    assert old.kernel.read_bytes() != new.kernel.read_bytes()
    assert old.initrd.read_bytes() != new.initrd.read_bytes()
    assert old.cmdline != new.cmdline
    copy = new.copy_to(tmp_path / "copy")
    for ours, theirs in ((new.firmware, copy.firmware), (new.kernel, copy.kernel), (new.initrd, copy.initrd)):
        assert ours != theirs
        assert ours.read_bytes() == theirs.read_bytes()
