"""`sev-host-agent selftest` with a real QEMU: behind the front, and unmodified on /dev/kvm under `platform run`."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.agent_site import REPOSITORY, Site
from tests.support.c_bit import c_bit_of_this_machine
from tests.support.kvm import needs_kvm
from tests.support.platform import Platform, give_chip
from tests.support.real_qemu import EACH_QEMU, qemu, small_kernel
from tests.support.selftest import (
    AGENT,
    STEPS,
    assert_nothing_is_left,
    dishonest,
    first_failure,
    rooted,
    run_selftest,
    selftest,
)
from tests.support.under import run_words

__all__ = ["qemu"]  # a fixture
pytestmark = pytest.mark.slow


@EACH_QEMU
@pytest.mark.parametrize("kind", ["es", "sev"])
def test_a_real_qemu_behind_the_front_passes(site: Site, platform: Platform, qemu: str, kind: str) -> None:
    site.kernel.write_bytes(small_kernel())
    site.program = platform.front(qemu, "--vmsa", "init2")
    code, found, out = selftest(site, "--for", kind, *rooted(site))
    assert (code, list(found), set(found.values())) == (0, STEPS, {"PASS"}), out
    assert ("VMSA init2\n" in out) == (kind == "es")
    assert_nothing_is_left(site)


@pytest.mark.parametrize(("option", "value"), [("-smp", "3"), ("-append", "quiet")])
def test_a_real_qemu_with_other_words_fails(site: Site, platform: Platform, qemu: str, option: str, value: str) -> None:
    site.kernel.write_bytes(small_kernel())
    site.program = dishonest(site, f"put({option!r}, {value!r})", platform.front(qemu))
    code, found, out = selftest(site, *rooted(site))
    assert (code, first_failure(found)) == (1, "measurement.matches"), out
    assert_nothing_is_left(site)


# ------------------------------------------------------------------------------- the whole path that a real host has


def under(site: Site, *words: str) -> tuple[int, dict[str, str], str]:
    """The selftest with the driver of /dev/sev, under `platform run`."""
    site.use_dev_sev()
    site.qemu["cbitpos"] = c_bit_of_this_machine()
    site.write_config()
    return run_selftest(run_words(site.platform, *AGENT, "selftest", "--config", str(site.config), *words))


@needs_kvm
@EACH_QEMU
@pytest.mark.parametrize("kind", ["es", "sev"])
def test_the_ioctl_driver_and_an_unmodified_qemu_on_kvm_pass(site: Site, qemu: str, kind: str) -> None:
    site.kernel.write_bytes(small_kernel())
    site.program = [qemu, "-accel", "kvm"]
    code, found, out = under(site, "--for", kind, *map(str, rooted(site)))
    assert (code, list(found), set(found.values())) == (0, STEPS, {"PASS"}), out
    assert_nothing_is_left(site)


@needs_kvm
def test_the_pages_lines_for_a_host_without_hardware_work_as_they_stand(qemu: str, tmp_path: Path) -> None:
    page = (REPOSITORY / "docs" / "selftest.md").read_text(encoding="utf-8")
    lines = page.partition("## Without hardware")[2].partition("```sh\n")[2].partition("```")[0]
    assert "cbitpos = 0," in lines
    lines = lines.replace("cbitpos = 0,", f"cbitpos = {c_bit_of_this_machine()},")
    give_chip(tmp_path / "p", "milan")  # made once a run of the tests
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, module in (("sevattest", "orchestrator.cli"), ("sev-host-agent", "host_agent.cli")):
        call = f"import sys; sys.path.insert(0, {str(REPOSITORY)!r}); from {module} import main; sys.exit(main())"
        (commands / name).write_text(f'#!/bin/sh\nexec {sys.executable} -c {shlex.quote(call)} "$@"\n')
        (commands / name).chmod(0o755)
    environ = {**os.environ, "PATH": f"{commands}:{Path(str(shutil.which(qemu))).parent}:{os.environ['PATH']}"}
    with subprocess.Popen(
        ["bash", "-e", "-c", lines],
        cwd=tmp_path,
        env=environ,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as shell:
        try:
            out, _ = shell.communicate(timeout=100)
        finally:
            with suppress(ProcessLookupError):  # where the lines stop early, the platform is still served
                os.killpg(shell.pid, signal.SIGKILL)
    found = re.findall(r"^(PASS|FAIL|SKIP) ([a-z_.]+): ", out, re.MULTILINE)
    assert (shell.returncode, found) == (0, [("PASS", step) for step in STEPS]), out


@needs_kvm
def test_an_unmodified_qemu_on_kvm_with_one_vcpu_more_fails(site: Site, qemu: str) -> None:
    site.kernel.write_bytes(small_kernel())
    site.program = dishonest(site, "put('-smp', '3')", [str(shutil.which(qemu)), "-accel", "kvm"])
    code, found, out = under(site)
    assert (code, first_failure(found)) == (1, "measurement.matches"), out
    assert "vCPU count 3 instead of 2" in out
    assert_nothing_is_left(site)
