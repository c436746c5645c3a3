"""The wheel, built from a copy of the checkout and installed into an environment of its own.

The dependencies are those of the environment that the tests run in; nothing is downloaded, and nothing of the checkout
is on the path.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.support.machine_kinds import REPOSITORY

HOOK = "host_agent/hookscript/sevattest-hookscript"
PACKAGES = ["common", "emulator", "host_agent", "orchestrator", "verifier"]
ENVIRON = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"}

pytestmark = pytest.mark.slow


def run(words: list[object], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in words], cwd=cwd, env=ENVIRON, capture_output=True, text=True, check=False, timeout=100
    )


def build(folder: Path) -> Path:
    """Build the wheel in a copy, since building writes to the checkout."""
    source = folder / "source"
    for name in [*PACKAGES, "proto"]:
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "gen"))
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    done = run([sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", folder], source)
    assert done.returncode == 0, done.stderr
    [wheel] = folder.glob("*.whl")
    return wheel


def install(wheel: Path, folder: Path) -> Path:
    """Install it; returns the folder of the programs."""
    made = run([sys.executable, "-m", "venv", "--without-pip", folder], wheel.parent)
    assert made.returncode == 0, made.stderr
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "--disable-pip-version-check"]
    done = run([*pip, "install", "--quiet", "--no-index", "--no-deps", "--no-compile", wheel], wheel.parent)
    assert done.returncode == 0, done.stderr
    # Folders that a .pth file names are searched, their own .pth files are not read: the checkout stays out.
    [packages] = folder.glob("lib/python3.*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "bin"


def test_who_has_installed_the_package_has_the_hookscript_and_can_set_it(tmp_path: Path) -> None:
    wheel = build(tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read(HOOK) == (REPOSITORY / HOOK).read_bytes()
        programs = archive.read(next(name for name in archive.namelist() if name.endswith("entry_points.txt"))).decode()
    assert "sev-host-agent = host_agent.cli:main" in programs

    programs_folder = install(wheel, tmp_path / "venv")
    command: list[object] = [programs_folder / "sev-host-agent", "proxmox-hookscript", "--install"]
    snippets = tmp_path / "snippets"
    refused = run([*command, snippets], tmp_path)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "no such folder" in refused.stderr
    snippets.mkdir()
    done = run([*command, snippets], tmp_path)
    assert done.returncode == 0, done.stderr
    [hook] = snippets.iterdir()
    assert os.access(hook, os.X_OK)
    # It runs the `sevattest` of this environment, which is the wheel's and not the checkout's.
    assert f":-{programs_folder}/sevattest}}" in hook.read_text()
    told = run([programs_folder / "sevattest", "--help"], tmp_path)
    assert told.returncode == 0, told.stderr
    where = run([programs_folder / "python", "-c", "import host_agent; print(host_agent.__file__)"], tmp_path)
    assert Path(where.stdout).is_relative_to(tmp_path / "venv")

    hook.write_text(f"{hook.read_text()}# a line of somebody's\n")
    refused = run([*command, snippets], tmp_path)
    assert refused.returncode == 2
    assert "there is another one" in refused.stderr
    assert hook.read_text().endswith("# a line of somebody's\n")
