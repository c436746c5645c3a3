"""libvirt's own daemon, as a test's: with every folder of its own, in namespaces of its own, gone when the test is.

A daemon that runs as root has its folders built in (/etc/libvirt, /var, /run); in a mount namespace of its own these
are the test's, so that it sees no machine, network or setting of the host's, and the host sees nothing of it. It loads
libvirt's driver for QEMU and no other: that for networks would write firewall rules. A process namespace makes its
end the end of every machine that it started.

Under `sevattest platform run` the daemon and the unmodified QEMUs that it starts find the software platform's SEV.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.platform import Platform
from tests.support.under import run_words, why_not_under

_LIBVIRTD = "/usr/sbin/libvirtd"
_DRIVER = "libvirt_driver_qemu.so"
_START_TIMEOUT = 40.0  # seconds; a second or two, and libvirt asks every QEMU that is installed what it can
# Debian's package for a whole host makes these; libvirt asks for the first even where another user is configured.
_USERS = "libvirt-qemu:x:64055:64055::/var:/bin/false\nkvm:x:64056:64056::/var:/bin/false\n"
_GROUPS = "libvirt-qemu:x:64055:\nkvm:x:64056:\n"
# Machines are root's, as the test is, and are not put into control groups or behind a /dev of their own.
_QEMU_CONF = """\
user = "root"
group = "root"
dynamic_ownership = 0
remember_owner = 0
namespaces = []
cgroup_controllers = []
security_driver = "none"
stdio_handler = "file"
"""


@dataclass(frozen=True, kw_only=True)
class Daemon:
    """A daemon that serves.

    Attributes:
        root: its folder.
        process: the one that holds its namespaces.
    """

    root: Path
    process: subprocess.Popen[bytes]

    @property
    def uri(self) -> str:
        """Where it is, for libvirt's clients."""
        return f"qemu+unix:///system?socket={self.root}/run/libvirt-sock"

    @property
    def log(self) -> str:
        """What it has complained of."""
        return (self.root / "log").read_text(errors="replace")

    def kill(self) -> None:
        """Kill the daemon itself; its machines go on, and another comes in its place."""
        mark = f"{self.root}/libvirtd.conf".encode()
        for entry in Path("/proc").iterdir():
            with suppress(OSError, ValueError):
                words = (entry / "cmdline").read_bytes().split(b"\0")
                if words[0] == _LIBVIRTD.encode() and mark in words:
                    os.kill(int(entry.name), signal.SIGKILL)

    def left_of_machines(self) -> list[str]:
        """Files that it keeps for machines while they are there."""
        folders = (self.root / "var/lib/libvirt/qemu", self.root / "run/libvirt/qemu")
        return [str(path) for folder in folders for path in folder.glob("*") if "web" in path.name]


def why_no_daemon() -> str:
    """Why no daemon can be run here; empty where one can."""
    if importlib.util.find_spec("libvirt") is None:
        return "no libvirt-python: pip install libvirt-python (needs libvirt-dev, pkg-config and gcc)"
    if not Path(_LIBVIRTD).exists() or _driver() is None:
        return "no libvirt daemon: install the packages libvirt-daemon and libvirt-daemon-driver-qemu"
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        return "a libvirt daemon in namespaces of its own needs root, and the program unshare"
    tried = subprocess.run(_unshare("true"), capture_output=True, text=True, check=False, timeout=20)
    return f"no namespaces here: {tried.stderr.strip()}" if tried.returncode else ""


@contextmanager
def libvirt_daemon(root: Path, platform: Platform | None = None) -> Iterator[Daemon]:
    """Run a daemon; at the end nothing of it is left but its folder. Skips the test where none can be run.

    Args:
        root: a short folder.
        platform: whose SEV it is to find; None leaves it with what the host has.
    """
    if why := why_no_daemon():
        pytest.skip(why)
    if platform is not None and (why := why_not_under(platform)):
        pytest.skip(f"system calls cannot be intercepted here (seccomp user notification): {why}")
    words = _unshare("/bin/sh", str(_set_up(root)))
    if platform is not None:
        words = run_words(platform, *words)
    with (root / "said").open("wb") as said:
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True)
    daemon = Daemon(root=root, process=process)
    try:
        _wait_until_it_serves(daemon)
        yield daemon
    finally:
        process.kill()
        process.wait()


def _unshare(*program: str) -> list[str]:
    return ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", *program]


def _driver() -> Path | None:
    return next(Path("/usr/lib").glob(f"**/libvirt/connection-driver/{_DRIVER}"), None)


def _set_up(root: Path) -> Path:
    """Write the daemon's files; returns the script that runs it."""
    for folder in ("var/lib", "var/log", "var/tmp", "run", "etc", "drivers"):
        (root / folder).mkdir(parents=True)
    driver = _driver()
    assert driver is not None
    (root / "drivers" / _DRIVER).symlink_to(driver)
    (root / "etc" / "qemu.conf").write_text(_QEMU_CONF)
    (root / "passwd").write_text(Path("/etc/passwd").read_text() + _USERS)
    (root / "group").write_text(Path("/etc/group").read_text() + _GROUPS)
    (root / "libvirtd.conf").write_text(
        f'log_outputs = "3:file:{root}/log"\nunix_sock_dir = "{root}/run"\nauth_unix_rw = "none"\n'
    )
    here = shlex.quote(str(root))
    script = root / "daemon.sh"
    # The shell stays, as its namespace's first process: it buries what the daemon's machines leave, and where a daemon
    # that has served ends it runs another, as a host's service manager does.
    script.write_text(
        "set -eu\n"
        f"cd {here}\n"
        "for to in /var /run; do mount --bind .$to $to; done\n"
        "mount --bind etc /etc/libvirt\n"
        "for file in passwd group; do mount --bind $file /etc/$file; done\n"
        f"export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME={here} LIBVIRT_DRIVER_DIR={here}/drivers\n"
        f"while {_LIBVIRTD} -f {here}/libvirtd.conf -p {here}/pid || [ -e run/libvirt-sock ]; do :; done\n"
    )
    return script


def _wait_until_it_serves(daemon: Daemon) -> None:
    """Wait for its socket, without asking it anything."""
    deadline = time.monotonic() + _START_TIMEOUT
    while not (daemon.root / "run" / "libvirt-sock").exists():
        said = (daemon.root / "said").read_text(errors="replace")
        assert daemon.process.poll() is None, f"the daemon ended: {said}"
        assert time.monotonic() < deadline, f"the daemon does not serve: {said}"
        time.sleep(0.02)
