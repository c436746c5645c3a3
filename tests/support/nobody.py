"""A user without privileges, where the tests are root's: a process that becomes it, and programs that it may run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

NOBODY = 65534
_REPOSITORY = Path(__file__).resolve().parents[2]
_OURS = ("common", "emulator", "host_agent", "orchestrator", "verifier", "tests/__init__.py", "tests/support")
_OLD_ENOUGH = "import sys; sys.exit(sys.version_info < (3, 11))"


def become_nobody() -> None:
    """Give up root's privileges for good; who is not root has none to give up."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)


@contextmanager
def public_folder() -> Iterator[Path]:
    """A folder that every user may enter, which pytest's own is not; nothing of it is left."""
    root = Path(tempfile.mkdtemp(prefix="sevattest-public-"))
    root.chmod(0o755)
    try:
        yield root
    finally:
        shutil.rmtree(root)


def nobodys_python() -> str:
    """An interpreter that every user may run; skips the test that asks where there is none."""
    for python in (sys.executable, "/usr/bin/python3"):
        try:
            tried = subprocess.run(
                [python, "-ISc", _OLD_ENOUGH], check=False, user=NOBODY, group=NOBODY, extra_groups=[], cwd="/"
            )
        except OSError:
            continue
        if tried.returncode == 0:
            return python
    pytest.skip(f"user {NOBODY} may run no Python 3.11 or newer here: install the package python3")


def copy_ours(folder: Path) -> None:
    """Copy our sources, and those that tests run, to where every user may read them; no package of others is there."""
    for name in _OURS:
        source, target = _REPOSITORY / name, folder / name
        target.parent.mkdir(exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "gen"))
        else:
            shutil.copy(source, target)
