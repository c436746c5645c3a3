"""The end-to-end run's own promises, each with what must break it: a harness that cannot fail proves nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import pytest

from common.sev.digest.ovmf import Footer
from orchestrator.demo.site import Site
from orchestrator.demo.stack import Stack
from tests.e2e import leftovers
from tests.e2e.bench import CMDLINES, Bench
from tests.e2e.dishonest import edited
from tests.e2e.guests import Guest
from tests.e2e.report import PROPERTY, Row, Table
from tests.e2e.scene import is_dead_loop
from tests.e2e.workloads import PLAIN, SEVERAL, Owner
from tests.support.eventually import wait_until

WORDS = [
    *("-object", "sev-guest,id=sev0,policy=0x1100000f,session-file=session.b64,kernel-hashes=on"),
    *("-drive", "if=pflash,format=raw,unit=0,file=/firmware.fd,readonly=on"),
    *("-smp", "1", "-cpu", "EPYC-Rome", "-kernel", "/kernel", "-append", "quiet", "-qmp", "unix:q,server=on,wait=off"),
]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """A bench without processes: what its guests said is what a test writes."""
    site = Site(root=tmp_path)
    site.make_folders()
    owner = Owner(site, CMDLINES)
    owner.write(passphrase=None, digest=bytes(32))
    guests = {name: Guest(name=name) for name in ("web", "second")}
    return Bench(stack=Stack(site), owner=owner, guests=guests, real=True, footer=cast("Footer", None), source="")


def say_secret(bench: Bench, guest: str, workload: str) -> None:
    lines = [
        f"secret {secret.guid} {len(secret.in_the_guest)} {secret.in_the_guest.hex()}\n"
        for secret in bench.owner.workloads[workload].secrets
    ]
    bench.site.serial(guest).write_text("".join(["guest: Linux 6.1, 1 CPUs\n", *lines, "guest: done\n"]))


def test_a_guest_that_reads_its_own_secrets_does_nothing_wrong(bench: Bench) -> None:
    bench.allowed["web"] = bench.owner.workloads[SEVERAL]
    say_secret(bench, "web", SEVERAL)
    assert bench.wrongs() == []


def test_a_guest_that_reads_another_workloads_secret_is_found(bench: Bench) -> None:
    bench.allowed["web"] = bench.owner.workloads[PLAIN]
    say_secret(bench, "web", SEVERAL)
    assert any("is not its own" in wrong for wrong in bench.wrongs())


def test_a_guest_that_may_run_without_a_secret_is_found_with_one(bench: Bench) -> None:
    bench.allowed["web"] = None
    bench.site.serial("web").write_text("guest: Linux 6.1, 1 CPUs\nno secret area\nguest: done\n")
    assert bench.wrongs() == []
    say_secret(bench, "web", PLAIN)
    assert any("is not its own" in wrong for wrong in bench.wrongs())


def test_a_secret_is_found_in_whatever_form_of_line(bench: Bench) -> None:
    bench.allowed["web"] = None
    (secret,) = bench.owner.workloads[PLAIN].secrets
    bench.site.serial("web").write_text(f"leaked: {secret.in_the_guest.hex()}")
    assert bench.wrongs() == ["web said a secret that is not its own"]


@pytest.mark.parametrize("said", ["[    0.000000] Linux version 6.1.0\n", "guest: Linux 6.1, 1 CPUs\n"])
def test_a_guest_that_boots_although_it_must_not_is_found(bench: Bench, said: str) -> None:
    bench.allowed["second"] = bench.owner.workloads[PLAIN]
    bench.site.serial("web").write_text(said)
    assert any(wrong.startswith("web was not to run") for wrong in bench.wrongs())


@pytest.mark.parametrize(
    ("edit", "word"),
    [
        ("smp=2", "2"),
        ("cpu=EPYC-Milan", "EPYC-Milan"),
        ("kernel=/other", "/other"),
        ("append=debug", "debug"),
        ("firmware=/stock.fd", "if=pflash,format=raw,unit=0,file=/stock.fd,readonly=on"),
        ("kernel-hashes=off", "sev-guest,id=sev0,policy=0x1100000f,session-file=session.b64,kernel-hashes=off"),
        ("policy-without=0x1", "sev-guest,id=sev0,policy=0x1100000e,session-file=session.b64,kernel-hashes=on"),
        ("monitor=/elsewhere", "unix:/elsewhere,server=on,wait=off"),
    ],
)
def test_a_dishonest_host_changes_one_word(edit: str, word: str) -> None:
    changed = [(old, new) for old, new in zip(WORDS, edited(WORDS, [edit]), strict=True) if old != new]
    assert [new for _, new in changed] == [word]


@pytest.mark.parametrize("edit", ["smp=1", "initrd=/initrd", "policy-without=0x20", "no-such-edit=1"])
def test_a_dishonest_host_that_would_change_nothing_is_refused(edit: str) -> None:
    with pytest.raises(ValueError, match=r"nothing was changed|no such edit"):
        edited(WORDS, [edit])


LOOP = 0x1EC73148
BOOTING = [0xFFFCCFBF, 0x1FEEA377, 0x1FEA17FA, 0x1EC73563, 0x1EC7349B]


@pytest.mark.parametrize("seen", [[LOOP] * 20, [*BOOTING[:1], *[LOOP, LOOP - 2] * 9, BOOTING[1]]])
def test_a_vcpu_that_stays_where_it_is_in_firmware_is_in_a_dead_loop(seen: list[int]) -> None:
    assert is_dead_loop(seen)


@pytest.mark.parametrize(
    "seen",
    [
        [],
        [LOOP] * 19,  # too few looks
        BOOTING * 4,
        [*BOOTING[:3], *[LOOP] * 17],
        [0xFFFFFFFF980178A0] * 20,  # a kernel that has nothing to do
    ],
)
def test_a_vcpu_that_boots_or_idles_is_in_no_dead_loop(seen: list[int]) -> None:
    assert not is_dead_loop(seen)


@pytest.fixture
def run_folder(monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in (leftovers.MARK, "TMPDIR"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # what it was comes back
    monkeypatch.delenv("TMPDIR")
    return leftovers.begin()


def test_a_run_that_left_nothing_leaves_not_even_its_folder(run_folder: Path) -> None:
    assert leftovers.end(run_folder) == []
    assert not run_folder.exists()


def test_a_file_that_a_run_left_is_found_and_removed(run_folder: Path) -> None:
    (run_folder / "forgotten").touch()
    assert leftovers.end(run_folder) == [f"file {run_folder / 'forgotten'}"]
    assert not run_folder.exists()


def test_a_process_that_a_run_left_is_found_by_its_mark(run_folder: Path) -> None:
    # Its session and its parent say nothing about where it comes from; the environment does.
    command = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as process:
        # Its environment can be read a moment after its start.
        wait_until(lambda: process.pid in leftovers.processes(run_folder))
        assert process.pid not in leftovers.processes(run_folder.with_name("another"))
        process.kill()
        process.communicate()
    assert leftovers.end(run_folder) == []


def test_a_process_that_a_run_left_is_named_and_ended(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leftovers, "_WAIT_SECONDS", 0.0)
    command = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as process:
        wait_until(lambda: process.pid in leftovers.processes(run_folder))
        (found,) = leftovers.end(run_folder)
        assert found.startswith(f"process {process.pid}: ")
        assert process.wait(30) == -signal.SIGKILL


def report(when: str, outcome: str, row: Row) -> Any:
    properties = [(PROPERTY, row.properties())] if when == "teardown" else []
    location = ("file", 1, "test")
    return pytest.TestReport(
        nodeid=row.name, location=location, keywords={}, outcome=cast("Any", outcome), longrepr=None,
        when=cast("Any", when), user_properties=properties, duration=2.0,
    )  # fmt: skip


def test_the_table_counts_what_went_as_expected_and_shouts_what_did_not() -> None:
    table = Table()
    for name, verdict, outcomes in (
        ("one", "accepted", ("passed", "passed")),
        ("two", "refused", ("passed", "passed")),
        ("three", "refused", ("failed", "passed")),
        ("four", "refused", ("passed", "failed")),
        ("five", "accepted", ("skipped", "passed")),
    ):
        row = Row(name=name, verdict=verdict, saw=f"saw {uuid4()}")
        for when, outcome in zip(("call", "teardown"), outcomes, strict=True):
            table.pytest_runtest_logreport(report(when, outcome, row))
    lines = table.lines()
    assert lines[-1] == "5 scenarios, 1 accepted as expected, 1 refused as expected, 2 failed, 1 skipped"
    said = {line.split()[0]: line for line in lines[2:-2]}
    assert [name for name, line in said.items() if "FAILED" in line] == ["four", "three"]
    assert "SKIPPED" in said["five"]
    assert said["one"].endswith("2.0")
