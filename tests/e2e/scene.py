"""One scenario: launches that it drives, what it may see of a guest, and the row that it leaves in the table."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

from common.audit.jws import untrusted_claims
from common.errors import Reason
from common.sev.digest.ovmf import Area
from orchestrator.demo.processes import machine_pid
from orchestrator.demo.story import read_secrets
from orchestrator.drivers.base import Host, Measured, Packet, Session
from orchestrator.flow import Launch, Order, Outcome, Patience, Step
from tests.e2e.bench import BOOTED, Bench
from tests.e2e.report import Row
from tests.support.eventually import until
from tests.support.qmp import QmpClient
from tests.support.stack import PATIENCE, Crash, CrashingHost, CrashingOwner, Sides

BOOT_SECONDS = 60.0
# Where a service stays away for good, asking twice shows it.
IMPATIENT = Patience(first=0.05, attempts=2)
# What an AmdSev firmware before edk2 2025 says when it was handed something else than it vouches for. A newer one says
# nothing and stays where it is for ever (edk2, OvmfPkg/AmdSev/BlobVerifierLibSevHashes: CpuDeadLoop).
_NOT_BOOTED = "BdsDxe: failed to load"
_LOOKS, _LOOK_SECONDS = 20, 0.05
_LOOP_BYTES = 64
_LOOP_SECONDS = 0.2  # of processor time between the first look and the last
_FOUR_GIB = 1 << 32


@dataclass
class Scene:
    """One scenario.

    Attributes:
        bench: the worker's stack.
        sides: both services as the orchestrator sees them.
        row: what the table will say.
        outcomes: of the launches so far.
    """

    bench: Bench
    sides: Sides
    row: Row
    outcomes: list[Outcome] = field(default_factory=list)

    # -------------------------------------------------------------------------------------------------- the launches

    async def launch(
        self,
        guest: str,
        workload: str,
        *,
        host: Callable[[Host], Host] | None = None,
        crash: Crash | None = None,
        patience: Patience = PATIENCE,
    ) -> Outcome:
        """Take the seven steps, as `sevattest launch` does.

        Args:
            guest: name of the guest.
            workload: name of the workload.
            host: puts a meddling host before the honest one.
            crash: what happens between the steps.
            patience: how often a step is repeated.
        """
        crash = crash or Crash()
        honest: Host = CrashingHost(self.sides.host, crash)
        launch = Launch(
            host=host(honest) if host else honest,
            owner=CrashingOwner(self.sides.owner, crash),
            order=order(guest, workload),
            patience=patience,
        )
        outcome = await launch.run()
        self.outcomes.append(outcome)
        return outcome

    async def begun(self, guest: str, workload: str, last: Step) -> Session:
        """A launch that was taken up to `last` and is left there."""
        session = await self.sides.steps(order(guest, workload), last)
        assert session is not None
        self.outcomes.append(Outcome(order=order(guest, workload), session=session))
        return session

    async def measured(self, session: Session) -> Measured:
        """The measurement of a launch that is paused."""
        return await self.sides.host.measure(session.launch_id, within=20)

    async def released(self, session: Session, request_id: UUID) -> Packet:
        """The owner's answer to the launch's own measurement."""
        measured = await self.measured(session)
        return await self.sides.owner.release(session.launch_id, measured, request_id=request_id, within=20)

    async def end(self) -> None:
        """End every launch of the scenario."""
        for outcome in self.outcomes:
            await self.sides.end(outcome)

    # ----------------------------------------------------------------------------------------------- what was to come

    def allow(self, guest: str, workload: str | None) -> None:
        """Say that this guest may run, and read the secrets of that workload or none; nobody else may."""
        self.bench.allowed[guest] = None if workload is None else self.bench.owner.workloads[workload]

    async def reads(self, outcome: Outcome) -> str:
        """Wait until the guest has read its secrets, which must be exactly those on file.

        Returns:
            What it wrote to its serial line.
        """
        assert outcome.error is None, outcome.error
        guest, workload = outcome.order.guest, outcome.order.workload
        self.allow(guest, workload)
        said = await self.waits_for(guest, "guest: done" if self.bench.real else "secret ")
        rightful = [(str(secret.guid), secret.in_the_guest) for secret in self.bench.owner.workloads[workload].secrets]
        assert sorted((secret.guid, secret.data) for secret in read_secrets(said)) == sorted(rightful)
        assert not self.bench.real or f"guest: secrets from {self.bench.source}\n" in said, said
        sizes = " + ".join(str(len(data)) for _, data in rightful)
        cpus = re.search(r"guest: Linux \S+, (\d+) CPUs?", said)
        self.saw(f"read {sizes} bytes, as on file" + (f" ({cpus[1]} vCPU)" if cpus else ""))
        return said

    async def waits_for(self, guest: str, text: str) -> str:
        """Wait until the guest has said `text`, with the rest of that line; returns all that it said."""

        def said() -> bool:
            return "\n" in self.bench.stack.serial(guest).partition(text)[2]

        try:
            await until(said, BOOT_SECONDS)
        except TimeoutError:
            tail = self.bench.stack.serial(guest)[-600:]
            raise AssertionError(
                f"{guest} never said {text!r}; the last of what it said: {tail!r}; its vCPUs: {self._vcpus(guest)}"
            ) from None
        return self.bench.stack.serial(guest)

    def _vcpus(self, guest: str) -> str:
        """Where a guest's vCPUs stand, at three looks: whether it loops, waits or was never scheduled."""
        session = next((each.session for each in self.outcomes if each.order.guest == guest), None)
        if session is None or self.pid_below(guest) is None:
            return "none"
        looks = []
        with self.monitor(session.launch_id) as machine:
            for _ in range(3):
                registers = machine.ask("human-monitor-command", command_line="info registers -a")
                stand = re.findall(r"[RE]IP=[0-9a-f]+ [RE]FL=\S+|HLT=\d", registers)
                looks.append(f"{' '.join(stand)}, {_cpu_seconds(self.pid_below(guest)):.1f} s of CPU")
                time.sleep(_LOOK_SECONDS)
        return "; ".join(looks)

    def refused(self, outcome: Outcome, step: Step, reason: Reason) -> None:
        """The launch must have been refused at this step for this reason, before its guest ran, and be ended."""
        assert outcome.error is not None, "the launch was accepted"
        assert (outcome.steps[-1].step, outcome.error.reason) == (step, reason), outcome.error
        self.row.reason = reason.value
        self.never_ran(outcome.order.guest)

    def never_ran(self, guest: str) -> None:
        """The guest must not have executed an instruction, and its machine must be gone."""
        assert self.bench.stack.serial(guest) == ""
        assert not self.bench.stack.machine_runs(guest)
        self.saw("never ran")

    async def firmware_refuses(self, outcome: Outcome) -> None:
        """Wait until the guest's own firmware has refused what it was handed."""
        assert outcome.error is None, outcome.error
        assert outcome.session is not None
        guest = outcome.order.guest
        self.allow(guest, None)
        seen: deque[int] = deque(maxlen=_LOOKS)
        worked: deque[float] = deque(maxlen=_LOOKS)
        with self.monitor(outcome.session.launch_id) as machine:
            async with asyncio.timeout(BOOT_SECONDS):
                while _NOT_BOOTED not in self.bench.stack.serial(guest) and not (
                    is_dead_loop(seen) and worked[-1] - worked[0] > _LOOP_SECONDS
                ):
                    # A vCPU that stands still is in no loop: somebody has stopped it.
                    assert machine.ask("query-status")["running"] is True
                    seen.append(_instruction(machine))
                    worked.append(_cpu_seconds(self.pid_below(guest)))
                    await asyncio.sleep(_LOOK_SECONDS)
        said = self.bench.stack.serial(guest)
        assert not any(word in said for word in BOOTED), said
        self.saw("its firmware refused to boot")

    async def was_killed_as_it_ran(self, guest: str) -> None:
        """The guest's machine must be gone; what it did until then is for the central check."""
        await self.sees_no_machine(guest)
        said = self.bench.stack.serial(guest)
        self.saw("killed as it booted" if "guest: done" not in said else "killed after it had booted")

    def saw(self, text: str) -> None:
        """Note what was seen of the guest."""
        self.row.saw = text if self.row.saw in {"", text} else f"{self.row.saw}; {text}"

    def explained(self, outcome: Outcome) -> str:
        """The owner's explanation of the refusal, from its audit log."""
        assert outcome.session is not None
        assert outcome.error is not None
        records = self.bench.audit(outcome.session.launch_id)
        record = next(record for record in records if record["audit_id"] == outcome.error.fields["audit_id"])
        assert record["reason"] == outcome.error.reason
        sentence: str = record["explanation"]["sentence"]
        return sentence

    @staticmethod
    def receipt(outcome: Outcome) -> dict[str, Any]:
        """The facts in the owner's receipt, by their names without `sevattest.`."""
        assert outcome.receipt is not None
        claims = untrusted_claims(outcome.receipt)["submods"]["sev"]["ear_verifier_claims"]
        return {name.removeprefix("sevattest."): value for name, value in claims.items()}

    # ----------------------------------------------------------------------------------------------------- the machine

    @contextlib.contextmanager
    def monitor(self, launch_id: UUID) -> Iterator[QmpClient]:
        """The machine's own QMP socket, which the agent holds only while it takes a step."""
        with QmpClient(self.bench.monitor(launch_id)) as client:
            client.negotiate()
            yield client

    def ram(self, launch_id: UUID, area: Area | None) -> bytes:
        """What is in the guest's RAM there, read by the machine into a file that only we can read."""
        assert area is not None
        file = self.bench.site.host / f"ram-{launch_id}"
        try:
            with self.monitor(launch_id) as client:
                client.ask("pmemsave", val=area.base, size=area.size, filename=str(file))
            return file.read_bytes()
        finally:
            file.unlink(missing_ok=True)

    def pid(self, guest: str) -> int | None:
        """The process that the agent has started for the guest, None when there is none."""
        return machine_pid(self.bench.site.pid_file(guest), str(self.bench.site.root))

    def pid_below(self, guest: str) -> int | None:
        """The real QEMU below it, None when there is none."""
        above = self.pid(guest)
        return None if above is None else next(_children(above), None)

    def kill(self, guest: str, *, below: bool) -> None:
        """Kill the guest's machine, or the real QEMU below it."""
        pid = self.pid_below(guest) if below else self.pid(guest)
        assert pid is not None, f"{guest} has no machine to kill"
        os.kill(pid, signal.SIGKILL)
        # Until it is gone the agent could still be answered.
        ends = time.monotonic() + 10
        while _alive(pid):
            assert time.monotonic() < ends, f"process {pid} does not end"
            time.sleep(0.005)

    async def sees_no_machine(self, guest: str) -> None:
        """Wait until nothing of the guest's machine is left."""
        await until(lambda: self.pid(guest) is None)


def order(guest: str, workload: str) -> Order:
    """A launch under a request id of its own."""
    return Order(guest=guest, workload=workload, request_id=uuid4(), timeout=60.0)


def _instruction(machine: QmpClient) -> int:
    """Where the first vCPU is: its RIP."""
    registers = machine.ask("human-monitor-command", command_line="info registers")
    found = re.search(r"\b[RE]IP=([0-9a-f]+)", registers)
    assert found, registers
    return int(found[1], 16)


def is_dead_loop(seen: Sequence[int]) -> bool:
    """Whether a vCPU was found in the same few bytes, below the kernel's addresses, in nearly all of the last looks.

    Nearly: an interrupt's handler may be met on the way.
    """
    here = [address for address in seen if abs(address - sorted(seen)[len(seen) // 2]) < _LOOP_BYTES]
    return len(seen) == _LOOKS and len(here) >= _LOOKS - 2 and here[0] < _FOUR_GIB


def _cpu_seconds(pid: int | None) -> float:
    """The processor time that a process has used; proc(5), fields 14 and 15."""
    fields = None if pid is None else _stat(pid)
    assert fields is not None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _children(parent: int) -> Iterator[int]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))) and int(fields[1]) == parent:
            yield int(entry.name)


def _alive(pid: int) -> bool:
    return (fields := _stat(pid)) is not None and fields[0] not in {b"Z", b"X"}


def _stat(pid: int) -> list[bytes] | None:
    """The fields of /proc/PID/stat from the state on; proc(5)."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    return None
