"""Every refusal as an orchestrator meets it: the step, the reason, the exit code, and no guest left behind.

`sevattest launch` as a process of its own against real services; where the moment matters, the same flow in-process.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sqlite3
import subprocess
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from common.errors import Reason, exit_code
from common.rpc.identity import Role
from emulator.device_client import Device
from orchestrator.cli import pki
from orchestrator.demo.processes import script
from orchestrator.demo.site import GUEST, ORCHESTRATOR, WORKLOAD, HostPlay, Site
from orchestrator.demo.stack import Stack
from orchestrator.drivers.base import Measured
from orchestrator.flow import Launch, Step
from tests.cli.transcripts import Said, run
from tests.support.stack import Crash, Sides, order, running_stack, sides

pytestmark = pytest.mark.slow

PDH_GEN = 4  # linux/psp-sev.h: SEV_PDH_GEN
ODD, PLAIN, BROKEN, SLOW = "odd-kernel", "no-secret-area", "no-machine", "slow"
GUESTS = {name: HostPlay() for name in (GUEST, ODD, PLAIN, BROKEN, SLOW)}

# What each document changes in the demonstration's own.
WORKLOADS: dict[str, tuple[str, str]] = {
    "of-others": (f"orchestrator/{ORCHESTRATOR}", "orchestrator/another"),
    "on-milan-only": ("generations: [emulated]", "generations: [milan]"),
    "on-one-chip-only": ("chips: any", f'chips: ["{"ab" * 32}"]'),
    "on-new-firmware": ("  lifetime: 10m", '  floors: {emulated: "1.55.25"}\n  lifetime: 10m'),
    "secret-missing": ("disk-passphrase", "no-such-file"),
    "secret-too-large": ("disk-passphrase", "large"),
}


def edit(site: Site) -> None:
    """Documents for each refusal, and guests that a host gets wrong."""
    model = (site.owner / "documents" / f"{WORKLOAD}-2.yaml").read_text()
    for name, (before, after) in WORKLOADS.items():
        assert before in model
        text = model.replace(f"name: {WORKLOAD}", f"name: {name}").replace(before, after)
        (site.owner / "documents" / f"{name}.yaml").write_text(text)
    (site.owner / "large").write_bytes(b"x" * 0xC00)
    host = site.host / "artefacts"
    (host / "kernel-odd").write_bytes((host / "kernel-2").read_bytes()[:-1] + b"!")
    (host / "firmware-plain.fd").write_bytes(bytes(4 << 20))
    config = site.agent_config.read_text()
    tables = {name: config.index(f"[guests.{name}]") for name in GUESTS}
    ends = [*sorted(tables.values())[1:], len(config)]
    parts = {name: config[start : min(end for end in ends if end > start)] for name, start in tables.items()}
    parts[ODD] = parts[ODD].replace("/kernel-2", "/kernel-odd")
    parts[PLAIN] = parts[PLAIN].replace("/firmware-2.fd", "/firmware-plain.fd")
    parts[SLOW] = parts[SLOW].replace('&& exec "$@"'.replace('"', '\\"'), '&& sleep 1 && exec "$@"'.replace('"', '\\"'))
    parts[BROKEN] = parts[BROKEN].replace(script("sevattest")[0], "/bin/false")
    assert "sleep 1" in parts[SLOW]
    site.agent_config.write_text(config[: min(tables.values())] + "\n".join(parts.values()))
    pki.issue(site.pki, Role.ORCHESTRATOR, "intruder")
    pki.issue(site.pki, Role.OWNER, "alice")


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack(GUESTS, edit=edit) as running:
        yield running


@pytest.fixture
def idle(stack: Stack) -> Iterator[Stack]:
    yield stack
    for guest in GUESTS:
        stack.end_guest(guest)
        stack.site.serial(guest).unlink(missing_ok=True)


@pytest.fixture
async def both(idle: Stack) -> AsyncIterator[Sides]:
    async with sides(idle) as reached:
        yield reached


@dataclass(frozen=True)
class Cluster:
    """Runs `sevattest launch` against the stack."""

    stack: Stack

    def launch(
        self, guest: str = GUEST, workload: str = WORKLOAD, *more: str, who: str = f"orchestrator-{ORCHESTRATOR}"
    ) -> Said:
        return run(*self.words(guest, workload, who), *more)

    def words(self, guest: str, workload: str, who: str = f"orchestrator-{ORCHESTRATOR}") -> list[str]:
        site = self.stack.site
        return [
            *("launch", guest, "--workload", workload),
            *("--agent", self.stack.agent.where, "--verifier", self.stack.verifier.where),
            *("--tls-cert", str(site.pki / f"{who}.pem"), "--tls-key", str(site.pki / f"{who}.key")),
            *("--agent-ca", str(site.pki / "datacenter-ca.pem"), "--verifier-ca", str(site.pki / "owner-ca.pem")),
        ]

    def json(self, *words: str, **keywords: str) -> tuple[dict[str, Any], int]:
        said = self.launch(*words, "--json", **keywords)
        return json.loads(said.out), said.code


@pytest.fixture
def cluster(idle: Stack) -> Cluster:
    return Cluster(idle)


def test_a_launch_that_goes_well_prints_seven_lines_and_ends_with_0(cluster: Cluster) -> None:
    said = cluster.launch()
    assert said.code == 0, said.err
    assert said.err == ""
    lines = said.out.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == list(Step)
    assert all(line.split()[2] == "ms" for line in lines[:-1])
    assert lines[-1].startswith(f"running: {GUEST}, launch ")


def test_the_json_of_a_launch_that_goes_well_is_one_object(cluster: Cluster) -> None:
    told, code = cluster.json(GUEST, WORKLOAD)
    assert code == 0
    assert UUID(told["launch_id"]).version == 7
    assert told["state"] == "running"
    assert told["reason"] is None
    assert (told["platform"]["generation"], told["platform"]["api"], told["platform"]["build"]) == (
        "emulated",
        "1.55",
        24,
    )
    assert len(told["platform"]["fingerprint"]) == 64
    assert [step["name"] for step in told["steps"]] == list(Step)
    assert told["receipt"]


@pytest.mark.parametrize(
    ("guest", "workload", "expected"),
    [
        (GUEST, "of-others", (Step.BEGIN, Reason.CALLER_NOT_ALLOWED, 1)),
        (GUEST, "on-milan-only", (Step.BEGIN, Reason.GENERATION_NOT_ALLOWED, 1)),
        (GUEST, "on-one-chip-only", (Step.BEGIN, Reason.CHIP_NOT_ALLOWED, 1)),
        (GUEST, "on-new-firmware", (Step.RELEASE, Reason.FIRMWARE_TOO_OLD, 1)),
        (GUEST, "no-such-workload", (Step.BEGIN, Reason.NOT_FOUND, 2)),
        ("no-such-guest", WORKLOAD, (Step.START, Reason.NOT_FOUND, 2)),
        (ODD, WORKLOAD, (Step.RELEASE, Reason.MEASUREMENT_REFUSED, 1)),
        (PLAIN, WORKLOAD, (Step.START, Reason.NO_SECRET_AREA, 1)),
        (BROKEN, WORKLOAD, (Step.START, Reason.HYPERVISOR_FAILED, 3)),
    ],
)
def test_a_refusal_names_its_step_and_reason_and_leaves_no_machine(
    cluster: Cluster, guest: str, workload: str, expected: tuple[Step, Reason, int]
) -> None:
    told, ended = cluster.json(guest, workload)
    assert (told["steps"][-1]["name"], told["reason"], ended) == expected
    assert told["receipt"] is None
    assert not cluster.stack.machine_runs(guest)
    assert cluster.stack.serial(guest) == ""


@pytest.mark.parametrize(
    ("workload", "reason", "code"),
    [("secret-missing", Reason.SECRET_UNAVAILABLE, 3), ("secret-too-large", Reason.SECRET_TOO_LARGE, 1)],
)
def test_a_secret_that_cannot_be_had_or_does_not_fit_is_not_released(
    cluster: Cluster, workload: str, reason: Reason, code: int
) -> None:
    told, ended = cluster.json(GUEST, workload, "--timeout", "3")
    assert (told["reason"], ended) == (reason, code)
    assert not cluster.stack.machine_runs(GUEST)


def test_a_refusal_is_one_line_and_one_hint_on_stderr(cluster: Cluster) -> None:
    said = cluster.launch(ODD)
    assert said.code == 1
    first, second = said.err.splitlines()
    assert first.startswith(
        "sevattest: release: the measurement is not one that the owner expects (MEASUREMENT_REFUSED"
    )
    assert second == "hint: the guest owner's audit log has more under that id"


def test_an_artefact_that_is_not_on_file_matches_nothing_on_file(cluster: Cluster) -> None:
    told, code = cluster.json(ODD, WORKLOAD)
    assert code == 1
    config = str(cluster.stack.site.verifier_config)
    command = [*script("sev-verifier"), "audit", "--config", config, "--json", "--launch", told["launch_id"]]
    answer = subprocess.run(command, check=True, capture_output=True, text=True)
    records = [json.loads(line) for line in answer.stdout.splitlines()]
    record = next(record for record in records if record["audit_id"] == told["audit_id"])
    sentence = record["explanation"]["sentence"]
    assert sentence == "the measurement matches nothing on file: firmware, kernel, initrd or command line differ"
    assert record["explanation"]["differences"] == []


def test_an_orchestrator_that_the_workload_does_not_name_gets_nothing(cluster: Cluster) -> None:
    told, code = cluster.json(GUEST, WORKLOAD, who="orchestrator-intruder")
    assert (told["reason"], code) == ("CALLER_NOT_ALLOWED", 1)


def test_an_owners_certificate_opens_nothing_on_the_launch_listeners(cluster: Cluster) -> None:
    said = cluster.launch(GUEST, WORKLOAD, "--timeout", "5", who="owner-alice")
    assert said.code == 3
    first, second = said.err.splitlines()
    assert "it does not accept this client's certificate" in first
    assert second.startswith("hint: the client's certificate must come from the CA that the service trusts")


def test_the_wrong_ca_for_a_service_is_said_so_at_once(cluster: Cluster) -> None:
    site = cluster.stack.site
    said = cluster.launch(GUEST, WORKLOAD, "--agent-ca", str(site.pki / "owner-ca.pem"))
    assert said.code == 3
    first, second = said.err.splitlines()
    assert "was not issued by the CA given for it" in first
    assert second.startswith("hint: check that --agent-ca, --verifier-ca or --admin-ca names the right CA")


def test_a_guest_that_runs_is_busy(cluster: Cluster) -> None:
    assert cluster.launch().code == 0
    told, code = cluster.json(GUEST, WORKLOAD)
    assert (told["reason"], code) == ("GUEST_BUSY", 1)
    assert cluster.stack.machine_runs(GUEST)


def test_the_same_request_id_finds_the_launch_again_and_changes_nothing(cluster: Cluster) -> None:
    request_id = str(uuid4())
    first, _ = cluster.json(GUEST, WORKLOAD, "--request-id", request_id)
    again, code = cluster.json(GUEST, WORKLOAD, "--request-id", request_id)
    assert code == 0
    assert (again["launch_id"], again["state"]) == (first["launch_id"], "running")
    assert again["measurement"] == first["measurement"]
    assert again["receipt"] == first["receipt"]


def test_the_same_request_id_for_another_workload_is_refused(cluster: Cluster) -> None:
    request_id = str(uuid4())
    assert cluster.launch(GUEST, WORKLOAD, "--request-id", request_id).code == 0
    told, code = cluster.json(GUEST, "on-new-firmware", "--request-id", request_id)
    assert (told["reason"], code) == ("REQUEST_ID_REUSED", 2)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
async def test_an_interrupted_launch_is_given_up_on_both_sides(
    both: Sides, cluster: Cluster, number: signal.Signals, code: int
) -> None:
    begun, said = await asyncio.to_thread(interrupt_when_begun, cluster, number)
    launch_id = UUID(begun.split("launch ")[1][:36])
    assert (said.err, said.code) == ("sevattest: interrupted; the launch was given up\n", code)
    assert await both.owner.state(launch_id, within=20) == "abandoned"
    assert not both.stack.machine_runs(SLOW)


def interrupt_when_begun(cluster: Cluster, number: signal.Signals) -> tuple[str, Said]:
    """Send the signal while the machine is being started; the line of the begin step, and how it ended."""
    command = [*script("sevattest"), *cluster.words(SLOW, WORKLOAD)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        begun = next(line for line in process.stdout if line.startswith("begin "))
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    return begun, Said(out=out, err=err, code=process.returncode)


def test_a_reader_that_goes_away_does_not_end_the_launch(cluster: Cluster) -> None:
    command = [*script("sevattest"), *cluster.words(GUEST, WORKLOAD)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.readline().startswith("export ")
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0
    assert cluster.stack.machine_runs(GUEST)


def test_a_refused_launch_is_spent(cluster: Cluster) -> None:
    request_id = str(uuid4())
    first, _ = cluster.json(ODD, WORKLOAD, "--request-id", request_id)
    again, code = cluster.json(ODD, WORKLOAD, "--request-id", request_id)
    assert code == 1
    assert first["reason"] == Reason.MEASUREMENT_REFUSED
    assert (again["reason"], again["receipt"]) == (Reason.LAUNCH_REFUSED, None)


async def test_a_measurement_of_another_launch_is_refused_and_spends_the_launch(both: Sides) -> None:
    first = await both.launch(order(GUEST)).run()
    assert first.measured
    await both.end(first)
    session = await both.steps(order(GUEST), Step.MEASURE)
    assert session
    with pytest.raises(Exception, match="not one that the owner expects"):
        await both.owner.release(session.launch_id, first.measured, request_id=uuid4(), within=20)
    own = await both.host.measure(session.launch_id, within=20)
    with pytest.raises(Exception, match="refused before"):
        await both.owner.release(session.launch_id, own, request_id=uuid4(), within=20)
    await both.end(session)


async def test_a_launch_that_the_verifier_does_not_know_is_not_found(both: Sides) -> None:
    session = await both.steps(order(GUEST), Step.MEASURE)
    assert session
    measured = await both.host.measure(session.launch_id, within=20)
    unknown = replace(session, launch_id=uuid4())

    with pytest.raises(Exception, match="no such launch"):
        await both.owner.release(unknown.launch_id, measured, request_id=uuid4(), within=20)
    await both.end(session)


async def test_a_launch_whose_time_ran_out_is_refused_with_1(both: Sides) -> None:
    database = both.stack.site.owner / "state" / "sevattest.sqlite3"

    def run_out() -> None:
        expire(database)

    outcome = await both.launch(order(GUEST), crash=Crash(before={Step.RELEASE: run_out})).run()
    assert outcome.error
    assert outcome.error.reason is Reason.LAUNCH_EXPIRED
    assert outcome.state == "expired"
    assert exit_code(outcome.error) == 1
    assert not both.stack.machine_runs(GUEST)


def expire(database: Path) -> None:
    """Let every open launch's time have run out long ago, as the store sees it."""
    with contextlib.closing(sqlite3.connect(database, timeout=10)) as store, store:
        changed = store.execute("UPDATE launch SET expire_time = create_time + 1 WHERE state = 'open'").rowcount
    assert changed


async def test_a_platform_whose_pdh_changes_under_the_launch_makes_the_session_stale(both: Sides) -> None:
    def rotate() -> None:
        device = Device(both.stack.site.platform / "sev.sock")
        device.issue(PDH_GEN)
        device.close()

    outcome = await both.launch(order(GUEST), crash=Crash(before={Step.START: rotate})).run()
    assert outcome.error
    assert outcome.error.reason is Reason.SESSION_STALE
    assert exit_code(outcome.error) == 3
    assert not both.stack.machine_runs(GUEST)
    # A new launch, with a session for the new PDH, goes well.
    again = await both.launch(order(GUEST)).run()
    assert again.running
    await both.end(again)


async def test_a_measurement_with_another_firmware_version_is_refused(both: Sides) -> None:
    class Lying:
        def __init__(self, sides: Sides) -> None:
            self._host = sides.host

        def __getattr__(self, name: str) -> Any:
            return getattr(self._host, name)

        async def measure(self, launch_id: UUID, *, within: float) -> Measured:
            true = await self._host.measure(launch_id, within=within)
            return replace(true, firmware=true.firmware._replace(build=true.firmware.build + 1))

    host: Any = Lying(both)
    outcome = await Launch(host=host, owner=both.owner, order=order(GUEST)).run()
    assert outcome.error
    assert outcome.error.reason is Reason.MEASUREMENT_REFUSED
    assert not both.stack.machine_runs(GUEST)


async def test_a_policy_other_than_the_sessions_is_refused_by_the_platform(both: Sides) -> None:
    asked = order(GUEST)
    session = await both.steps(asked, Step.BEGIN)
    assert session
    lowered = replace(session, policy=session.policy & ~1)
    with pytest.raises(Exception, match=r"BAD_MEASUREMENT|bad measurement") as refusal:
        await both.host.start(lowered, GUEST, request_id=uuid4(), within=30)
    assert getattr(refusal.value, "reason", None) is Reason.FIRMWARE_BAD_MEASUREMENT
    assert not both.stack.machine_runs(GUEST)
