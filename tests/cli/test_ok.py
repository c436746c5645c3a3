"""`sevattest ok`: sevctl's lines, its exit code, and sevctl itself where it is at hand."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from orchestrator.cli import main
from tests.support.hosts import HOSTS, changed

FAILED = "sevattest: One or more tests in sevctl-ok reported a failure\n"
READY = """\
[ PASS ] - AMD CPU
[ PASS ]   - Microcode support
[ PASS ]   - Secure Memory Encryption (SME)
[ PASS ]   - Secure Encrypted Virtualization (SEV)
[ PASS ]     - Encrypted State (SEV-ES)
[ SKIP ]     - Secure Nested Paging (SEV-SNP)
[ SKIP ]       - VM Permission Levels
[ SKIP ]         - Number of VMPLs
[ PASS ]     - Physical address bit reduction: 5
[ PASS ]     - C-bit location: 47
[ PASS ]     - Number of encrypted guests supported simultaneously: 509
[ PASS ]     - Minimum ASID value for SEV-enabled, SEV-ES disabled guest: 100
[ PASS ]     - SEV enabled in KVM: enabled
[ PASS ]     - SEV-ES enabled in KVM: enabled
[ PASS ]     - Reading /dev/sev: /dev/sev readable
[ PASS ]     - Writing /dev/sev: /dev/sev writable
[ PASS ]   - Page flush MSR: ENABLED
[ PASS ] - KVM supported: API version: 12
[ PASS ] - Memlock resource limit: Soft: 18446744073709551615 | Hard: 18446744073709551615
"""


def ok(*words: object) -> int:
    return main(["ok", *map(str, words)])


def test_a_host_that_is_ready_passes_in_sevctls_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert ok("--root", HOSTS / "rome-sev-es") == 0
    assert capsys.readouterr() == (READY, "")


def test_a_later_generation_that_is_asked_for_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert ok("snp", "--root", HOSTS / "rome-sev-es") == 1
    out, err = capsys.readouterr()
    assert out == READY.replace("SKIP ]     - Secure Nested", "FAIL ]     - Secure Nested")
    assert err.startswith(FAILED)


def test_an_earlier_generation_leaves_the_later_ones_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert ok("sev", "--root", HOSTS / "rome-asid-limit-1") == 0
    out = capsys.readouterr().out
    assert "[ SKIP ]     - Encrypted State (SEV-ES)\n" in out
    assert "[ SKIP ]     - SEV-ES enabled in KVM\n" in out
    assert ok("es", "--root", HOSTS / "rome-asid-limit-1") == 1


def test_the_processors_own_generation_is_looked_for_when_none_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert ok("--root", HOSTS / "naples-sev") == 0
    assert "[ SKIP ]     - Encrypted State (SEV-ES)\n" in capsys.readouterr().out
    assert ok("es", "--root", HOSTS / "naples-sev") == 1


@pytest.mark.parametrize(("name", "code"), [("virtual-machine", 1), ("milan-snp", 0)])
def test_the_lines_are_those_that_sevctl_printed(capsys: pytest.CaptureFixture[str], name: str, code: int) -> None:
    assert ok("--root", HOSTS / name) == code
    recorded = (HOSTS / name / "sevctl-ok.txt").read_text().splitlines()
    assert capsys.readouterr().out.splitlines()[: len(recorded)] == recorded


def test_what_is_not_there_is_named_as_sevctl_names_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert ok("es", "--root", HOSTS / "rome-no-device") == 1
    out = capsys.readouterr().out
    parameters = "/sys/module/kvm_amd/parameters"
    assert f"[ FAIL ]     - SEV enabled in KVM: Error - contents read from {parameters}/sev: N\n" in out
    for verb, adjective in (("Reading", "readable"), ("Writing", "writable")):
        why = f"/dev/sev not {adjective}: No such file or directory (os error 2)"
        assert f"[ FAIL ]     - {verb} /dev/sev: {why}\n" in out


def test_no_kvm_is_named_as_sevctl_names_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    root = changed(
        tmp_path,
        "rome-sev-es",
        {"sys/module/kvm_amd/parameters/sev": None},
        facts={"kvm_api": None, '"/dev/kvm"': None},
    )
    assert ok("--root", root) == 1
    out = capsys.readouterr().out
    assert "[ FAIL ] - KVM supported: Error reading /dev/kvm: (No such file or directory (os error 2))\n" in out
    assert "- SEV enabled in KVM: Error - /sys/module/kvm_amd/parameters/sev does not exist\n" in out


def test_what_cannot_be_read_is_skipped_and_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert ok("--root", HOSTS / "rome-unprivileged") == 1
    out = capsys.readouterr().out
    assert "[ SKIP ]     - C-bit location: the system forbids executable memory" in out
    assert "[ SKIP ]   - Page flush MSR" in out
    # The kernel's flags tell the rest.
    assert "[ PASS ]     - Encrypted State (SEV-ES)\n" in out


def test_quiet_says_nothing_and_the_exit_code_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-q", "ok", "--root", str(HOSTS / "rome-sev-es")]) == 0
    assert main(["-q", "ok", "--root", str(HOSTS / "intel")]) == 1
    assert capsys.readouterr() == ("", "")


def test_another_generation_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert ok("tdx") == 2
    assert capsys.readouterr().err.startswith("sevattest: ")


def test_this_machine_is_looked_at_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert ok() in {0, 1}
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 19
    assert all(re.match(r"\[ (PASS|SKIP|FAIL) \] (  )*- ", line) for line in lines)


@pytest.mark.parametrize("words", [[], ["sev"], ["es"], ["snp"]], ids=lambda words: " ".join(words) or "own")
def test_sevctl_itself_prints_the_same_on_this_machine(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    sevctl = os.environ.get("SEVATTEST_SEVCTL")
    if not sevctl:
        pytest.skip("set SEVATTEST_SEVCTL to the real sevctl (0.6.2)")
    theirs = subprocess.run([sevctl, "ok", *words], capture_output=True, text=True, check=False, timeout=60)
    code = ok(*words)
    out = capsys.readouterr().out
    assert out == re.sub(r"\x1b\[[0-9;]*m", "", theirs.stdout)
    assert code == theirs.returncode
