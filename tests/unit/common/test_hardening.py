"""What a service does to itself first; each in a process of its own, because nothing of it can be undone."""

from __future__ import annotations

import subprocess
import sys

import pytest

from common.errors import InvalidInput
from common.hardening import harden_process

_REPORT = """
import ctypes, os, resource, tempfile
from common.hardening import PR_GET_DUMPABLE, harden_process
harden = {harden}
if harden:
    harden_process()
with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, "file")
    open(path, "w").close()
    mode = os.stat(path).st_mode & 0o777
print(ctypes.CDLL(None).prctl(PR_GET_DUMPABLE, 0, 0, 0, 0), resource.getrlimit(resource.RLIMIT_CORE), oct(mode))
"""


def _report(*, harden: bool) -> str:
    command = [sys.executable, "-c", _REPORT.format(harden=harden)]
    return subprocess.run(command, check=True, capture_output=True, text=True, umask=0o022).stdout.strip()


def test_a_hardened_process_leaves_no_core_shows_no_memory_and_makes_private_files() -> None:
    assert _report(harden=True) == "0 (0, 0) 0o600"


def test_an_ordinary_process_shows_its_memory_to_its_neighbours() -> None:
    report = _report(harden=False)
    assert report.startswith("1 ")
    assert report.endswith("0o644")


_OWNER = """
import ctypes, os
from common.hardening import PR_SET_DUMPABLE, harden_process
if os.getuid() == 0:
    os.setresuid(65534, 65534, 65534)
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)
if {harden}:
    harden_process()
print("root" if os.stat("/proc/self/mem").st_uid == 0 else "the user")
"""


@pytest.mark.parametrize(("harden", "owner"), [(True, "root"), (False, "the user")])
def test_the_memory_of_a_hardened_process_belongs_to_root_alone(*, harden: bool, owner: str) -> None:
    """Root reads everything, so this asks for the owner that the kernel checks an ordinary reader against."""
    command = [sys.executable, "-c", _OWNER.format(harden=harden)]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() == owner


def test_a_service_refuses_to_start_with_grpcs_tracing_on() -> None:
    with pytest.raises(InvalidInput, match="GRPC_TRACE must not be set"):
        harden_process({"GRPC_TRACE": "all"})
