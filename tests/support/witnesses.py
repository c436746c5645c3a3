"""Who else says what a launch's measurement must be: sev-snp-measure, and libvirt's virt-qemu-sev-validate.

libvirt's tool runs as it stands, by the system's Python, which has its libraries. Several verdicts cost one start: the
tool is loaded once and forks for each.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from functools import cache

import pytest
from sevsnpmeasure import guest as outside
from sevsnpmeasure import vcpu_types
from sevsnpmeasure.sev_mode import SevMode

from common.sev.digest.cpus import parse_cpu
from tests.support.sev_host import FIRMWARE, Host

ACCEPTED, REFUSED = 0, 1
_TIMEOUT = 60.0  # seconds
_VERDICTS = """
import json, os, sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
path = sys.argv[1]
loader = SourceFileLoader("tool", path)
tool = module_from_spec(spec_from_loader("tool", loader))
loader.exec_module(tool)
codes = []
for words in json.load(sys.stdin):
    child = os.fork()
    if child == 0:
        os.dup2(2, 1)
        sys.argv = [path, *words]
        tool.main()
        os._exit(99)  # it always exits by itself
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(codes))
"""


def launch_digest(host: Host, vcpus: int, cpu: str, *, hashes: bool = True) -> bytes:
    """The digest that sev-snp-measure computes for a host's guest; without `hashes` its boot files are not measured."""
    files = [str(host.folder / name) if hashes else "" for name in ("kernel", "initrd")]
    mode = SevMode.SEV_ES if host.policy & 4 else SevMode.SEV
    firmware, signature = str(host.folder / "firmware"), vcpu_types.CPU_SIGS[cpu]
    digest: bytes = outside.calc_launch_digest(mode, vcpus, signature, firmware, *files, "quiet" if hashes else "", 0)
    return digest


@cache
def _tool() -> tuple[str, str] | None:
    """The system's Python and libvirt's tool; None where it cannot run."""
    tool, python = shutil.which("virt-qemu-sev-validate"), shutil.which("python3", path="/usr/bin:/bin")
    if tool is None or python is None:
        return None
    works = subprocess.run([python, tool, "--help"], check=False, capture_output=True).returncode == 0
    return (python, tool) if works else None


def verdicts(launches: Sequence[Mapping[str, object]]) -> list[int]:
    """What libvirt's tool says of each launch, `ACCEPTED` or `REFUSED`, from its options by their names."""
    return judged([[f"--{name}={value}" for name, value in options.items()] for options in launches])


def judged(lines: Sequence[Sequence[str]]) -> list[int]:
    """The exit code of libvirt's tool for each command line, `ACCEPTED` or `REFUSED`; skips where it cannot run."""
    found = _tool()
    if found is None:
        pytest.skip(
            "virt-qemu-sev-validate not found or not able to run, install the Debian packages"
            " libvirt-clients-qemu, python3-lxml and python3-libvirt"
        )
    python, tool = found
    done = subprocess.run(
        [python, "-B", "-c", _VERDICTS, tool],
        input=json.dumps(lines),
        check=False,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT,
    )
    assert done.returncode == 0, done.stderr
    codes: list[int] = json.loads(done.stdout)
    assert set(codes) <= {ACCEPTED, REFUSED}, done.stderr
    return codes


def expectation(host: Host, vcpus: int, measurement: str) -> dict[str, object]:
    """The owner's expectation of a host's guest that boots its kernel on EPYC-Rome, as options of libvirt's tool."""
    (host.folder / "tik").write_bytes(host.keys.tik)
    (host.folder / "tek").write_bytes(host.keys.tek)
    options: dict[str, object] = {name: host.folder / name for name in ("firmware", "kernel", "initrd", "tik", "tek")}
    options |= {"measurement": measurement, "cmdline": "quiet", "policy": host.policy}
    options |= dict(zip(("api-major", "api-minor", "build-id"), FIRMWARE, strict=True))
    if host.policy & 4:
        cpu = parse_cpu("EPYC-Rome")
        options |= {"num-cpus": vcpus, "cpu-family": cpu.family, "cpu-model": cpu.model, "cpu-stepping": cpu.stepping}
    return options
