"""What `make e2e` says about packages that are missing, and when it may install them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e import packages, prerequisites


@pytest.fixture
def nothing_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine without QEMU on which no package can be had; the folder for the guest's parts."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(packages, "make", lambda _folder, **_options: {"firmware": "cannot get ovmf-amdsev"})
    monkeypatch.setattr("sys.argv", ["prerequisites", str(tmp_path)])
    return tmp_path


def test_every_missing_package_is_named_and_the_run_goes_on(
    nothing_there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prerequisites.main() == 0
    first, second, third = capsys.readouterr().err.splitlines()
    command = "apt-get install --no-install-recommends qemu-system-x86"
    assert first == f"e2e: missing: qemu-system-x86; install with: {command}"
    assert second == "e2e: no firmware: cannot get ovmf-amdsev"
    assert third.startswith("e2e: apt-get is not there")
    assert list(nothing_there.iterdir()) == []


def test_a_package_that_is_there_is_not_named(tmp_path: Path) -> None:
    assert prerequisites.lacking(str(tmp_path)) == ["qemu-system-x86"]
    program = tmp_path / "qemu-system-x86_64"
    program.touch(mode=0o755)
    assert prerequisites.lacking(str(tmp_path)) == []


@pytest.mark.parametrize(
    ("environ", "uid", "may"),
    [({"CI": "true"}, 0, True), ({"CI": "true"}, 1000, False), ({}, 0, False), ({"CI": "1"}, 0, False)],
)
def test_packages_are_installed_only_by_root_in_ci(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, environ: dict[str, str], uid: int, *, may: bool
) -> None:
    (tmp_path / "apt-get").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert prerequisites.may_install(environ, uid) is may


def test_a_package_that_cannot_be_installed_is_reported_and_not_hidden(
    nothing_there: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    apt = nothing_there / "apt-get"
    apt.write_text("#!/bin/sh\necho 'E: Unable to locate package qemu-system-x86' >&2\nexit 100\n")
    apt.chmod(0o755)
    monkeypatch.setenv("CI", "true")
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert prerequisites.main() == 0
    said = capsys.readouterr().err
    assert "missing: qemu-system-x86; could not be installed: E: Unable to locate package qemu-system-x86" in said
