"""What others can see of a verifier while it serves: neither its memory, nor messages in its log."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support.verifier_process import VerifierSite, proc

pytestmark = pytest.mark.slow


NOBODY = 65534
READ = """
import errno, sys
for name in ("mem", "maps", "environ"):
    try:
        with open(f"/proc/{sys.argv[1]}/{name}", "rb") as file:
            file.read(0 if name == "mem" else 1)
        print(name, "read")
    except OSError as error:
        print(name, errno.errorcode[error.errno])
"""


def as_nobody() -> Sequence[str]:
    """What runs a program as a user without rights; nothing where we are one."""
    if os.geteuid() != 0:
        return ()
    words = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups")
    if shutil.which("setpriv") is None or subprocess.run([*words, sys.executable, "-c", ""], check=False).returncode:
        pytest.skip("no setpriv, or a user without rights cannot run this Python")
    return words


def read_of(pid: int, under: Sequence[str]) -> dict[str, str]:
    """What another process of the same user may read of a process."""
    words = [*under, sys.executable, "-c", READ, str(pid)]
    said = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    pairs = (line.partition(" ") for line in said.splitlines())
    return {name: how for name, _, how in pairs}


def test_another_process_of_the_same_user_cannot_read_the_verifiers_memory() -> None:
    under = as_nobody()
    folder = Path(tempfile.mkdtemp(prefix="sevattest-m-"))
    try:
        site = VerifierSite.make(folder)
        if under:
            for path in (folder, *folder.rglob("*")):
                os.chown(path, NOBODY, NOBODY)
        with site.serve(as_nobody=bool(under)) as serving:
            pid = serving.process.pid
            user = NOBODY if under else os.getuid()
            assert f"Uid:\t{user}\t".encode() in proc(pid, "status")
            assert read_of(pid, under) == {"mem": "EACCES", "maps": "EACCES", "environ": "EACCES"}
            limits = proc(pid, "limits").decode().splitlines()
            (core,) = [line.split() for line in limits if line.startswith("Max core file size")]
            assert core[4:6] == ["0", "0"]
        # Any other program of that user's can be read.
        with subprocess.Popen([*under, sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
            seen = read_of(other.pid, under)
            other.communicate(b"\n")
        assert (seen["maps"], seen["environ"]) == ("read", "read")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_a_verifier_does_not_start_where_grpc_would_write_messages_into_the_log(tmp_path: Path) -> None:
    site = VerifierSite.make(tmp_path)
    words = [sys.executable, "-m", "verifier.cli", "serve", "--config", str(site.config)]
    done = subprocess.run(
        words, env={**os.environ, "GRPC_TRACE": "all"}, capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "sev-verifier: environment: GRPC_TRACE must not be set for a service\n"
