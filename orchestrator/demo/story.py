"""What happens in a demonstration, in order, and what is to be seen of it; how it is told is the command's business."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import subprocess
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import uuid4

from common.errors import PlatformFailed, Reason, SevattestError
from common.rpc.client import open_channel
from common.rpc.tls import ClientTls
from orchestrator.demo import console
from orchestrator.demo.processes import script
from orchestrator.demo.site import GUEST, ORCHESTRATOR, WORKLOAD, Site
from orchestrator.demo.stack import Stack
from orchestrator.demo.tamper import HONEST, PLAYS, ImpostorHost, ReplayingHost, Tamper
from orchestrator.drivers.agent import AgentHost
from orchestrator.drivers.base import Evidence, Host
from orchestrator.drivers.verifier import VerifierOwner
from orchestrator.flow import Launch, Order, Outcome, StepResult

# The honest launch whose measurement is replayed.
EARLIER_GUEST = f"{GUEST}-before"
_QUERY_SECONDS = 10.0
# A stand-in's guest speaks at once; a real one boots first, without help from the processor.
_GUEST_SECONDS = 10.0
_BOOT_SECONDS = 120.0


@dataclass(frozen=True, kw_only=True)
class GuestSecret:
    """A secret as the guest wrote it to its serial line after it had read it from its own memory."""

    guid: str
    size: int
    data: bytes = field(repr=False)

    @property
    def text(self) -> str:
        """The secret's bytes as text."""
        return self.data.decode(errors="replace")


class Telling:
    """Who is told of the story; says nothing itself."""

    def progress(self, text: str) -> None:
        """Something begins that takes a while."""

    def heading(self, text: str) -> None:
        """A chapter begins."""

    def block(self, text: str) -> None:
        """Lines to be read as they are."""

    def step(self, result: StepResult, outcome: Outcome) -> None:
        """A step of the launch has ended."""

    def refused(self, outcome: Outcome) -> None:
        """The launch was refused."""


@dataclass
class Story:
    """One demonstration.

    Attributes:
        stack: the processes.
        telling: who is told.
        tamper: what the dishonest host does, None for an honest one.
        tree: the platform's certificates as `sevattest verify` prints them.
        outcome: of the launch that it is about.
        secrets: what the guest read.
        explanation: the owner's audit record of the refusal.
        evidence: what shows that no secret left.
    """

    stack: Stack
    telling: Telling
    tamper: Tamper | None = None
    tree: str = ""
    secrets: list[GuestSecret] = field(default_factory=list)
    explanation: dict[str, Any] | None = None
    evidence: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        order = Order(guest=GUEST, workload=WORKLOAD, request_id=uuid4())
        self.outcome = Outcome(order=order)

    @property
    def site(self) -> Site:
        """The folders."""
        return self.stack.site

    def run(self) -> None:
        """Set up, launch, look at what came of it."""
        impostor = self.tamper is Tamper.CHAIN
        self.stack.prepare(progress=self.telling.progress, impostor=impostor)
        guests = {GUEST: PLAYS[self.tamper] if self.tamper else HONEST, EARLIER_GUEST: HONEST}
        self.site.write_host(guests, self.site.impostor if impostor else self.site.platform)
        self.telling.progress("starting verifier and agent")
        self.stack.start_services(guests)
        asyncio.run(self._launches())

    # -------------------------------------------------------------------------------------------------- the launches

    async def _launches(self) -> None:
        async with self._sides() as (agent, verifier):
            host: Host = agent
            if self.tamper is Tamper.CHAIN:
                host = ImpostorHost(agent, self.site.impostor / "kds")
            evidence = await host.export_chain(within=_QUERY_SECONDS)
            # In a thread: the command has an event loop of its own.
            await asyncio.to_thread(self._verify, evidence)
            if self.tamper is Tamper.REPLAY:
                host = await self._replaying(agent, verifier)
            self.telling.heading("The launch, step by step:")
            order = self.outcome.order
            launch = Launch(host=host, owner=verifier, order=order, on_step=self.telling.step)
            self.outcome = await launch.run()
            if self.outcome.error is None:
                self._look_at_guest()
            else:
                self.telling.refused(self.outcome)
                self._explain()
                await self._gather_evidence(agent, verifier)
            await self._end(agent, self.outcome)

    async def _replaying(self, agent: AgentHost, verifier: VerifierOwner) -> Host:
        """The host after an honest launch whose measurement it has kept."""
        self.telling.heading("Before it, an honest launch of another guest, whose measurement the host keeps:")
        order = Order(guest=EARLIER_GUEST, workload=WORKLOAD, request_id=uuid4())
        earlier = await Launch(host=agent, owner=verifier, order=order, on_step=self.telling.step).run()
        if earlier.error is not None:
            raise earlier.error
        await self._end(agent, earlier)
        if earlier.measured is None:
            raise PlatformFailed(Reason.INTERNAL, "a launch without a measurement has run")
        return ReplayingHost(agent, earlier.measured)

    async def _end(self, agent: AgentHost, outcome: Outcome) -> None:
        """End the guest as its host may, running or not."""
        if outcome.session is not None:
            with contextlib.suppress(SevattestError):
                await agent.abort(outcome.session.launch_id, request_id=uuid4(), within=_QUERY_SECONDS)

    @contextlib.asynccontextmanager
    async def _sides(self) -> AsyncIterator[tuple[AgentHost, VerifierOwner]]:
        pki = self.site.pki
        name = f"orchestrator-{ORCHESTRATOR}"
        tls = ClientTls(cert=pki / f"{name}.pem", key=pki / f"{name}.key", server_ca=pki / "datacenter-ca.pem")
        async with (
            open_channel(self.stack.agent.where, tls) as agent,
            open_channel(self.stack.verifier.where, replace(tls, server_ca=pki / "owner-ca.pem")) as verifier,
        ):
            yield AgentHost(agent), VerifierOwner(verifier)

    # ------------------------------------------------------------------------------------------ what is to be seen

    def _verify(self, evidence: Evidence) -> None:
        """Show the platform's certificates as the owner would see them: `sevattest verify` on what the host exports."""
        from orchestrator.cli import main  # noqa: PLC0415 -- the command above us

        site = self.site
        exported = site.host / "platform.cert"
        exported.write_bytes(evidence.chain)
        words = ["verify", "--sev", str(exported), "--ca", str(site.platform / "ask_ark.cert")]
        if self.tamper is not Tamper.CHAIN:
            # The firmware exports its CEK unsigned; the impostor has brought a signature of its own making.
            words += ["--kds", str(site.platform / "kds"), "--chip-id", evidence.chip_id.hex()]
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            verdict = main(words)
        self.tree = out.getvalue().rstrip()
        self.telling.heading(
            "The platform's certificates, verified to the root that the owner's configuration names:"
            if verdict == 0
            else "The platform's certificates; they do not lead to the root that the owner's configuration names:"
        )
        self.telling.block(self.tree)

    def _look_at_guest(self) -> None:
        """Watch the guest until it has said what it found in its memory."""
        real = self.site.parts is not None
        if real:
            self.telling.heading("The guest's console, from power-on:")
        ends = time.monotonic() + (_BOOT_SECONDS if real else _GUEST_SECONDS)
        told = 0
        while True:
            said = self.stack.serial(GUEST)
            if real:
                story = console.telling(said)
                self.telling.block("\n".join(story[told:]))
                told = len(story)
            if _is_done(said, real=real) or time.monotonic() > ends:
                break
            time.sleep(0.02)
        self.secrets = read_secrets(said)
        expected = self.site.secret.read_bytes()
        self.telling.heading("The guest has read, in its own memory:")
        for secret in self.secrets:
            self.telling.block(f'{secret.guid}  {secret.size} bytes  "{secret.text}"')
        if [secret.data for secret in self.secrets] != [expected]:
            raise PlatformFailed(Reason.INTERNAL, f"the guest did not read its secret; it said {said[-500:]!r}")
        self.telling.block("which is what the guest owner has on file")

    def _explain(self) -> None:
        """Ask the owner's own log, on the owner's side, why."""
        command = [*script("sev-verifier"), "audit", "--config", str(self.site.verifier_config), "--json"]
        if self.outcome.session is not None:
            command += ["--launch", str(self.outcome.session.launch_id)]
        answer = subprocess.run(command, check=False, capture_output=True, text=True)  # noqa: S603 -- our own script
        if answer.returncode:
            raise PlatformFailed(Reason.INTERNAL, f"sev-verifier audit: {answer.stderr.strip()}")
        error = self.outcome.error
        audit_id = error.fields.get("audit_id") if error else None
        records = [json.loads(line) for line in answer.stdout.splitlines()]
        self.explanation = next((record for record in records if record["audit_id"] == audit_id), None)
        self.telling.heading("The guest owner's log under that id (sev-verifier audit):")
        self.telling.block(_record_text(self.explanation))

    async def _gather_evidence(self, agent: AgentHost, verifier: VerifierOwner) -> None:
        """What shows that no secret left: the launch's state on both sides, the guest's serial line, its machine."""
        session = self.outcome.session
        self.evidence = {
            "verifier": await verifier.state(session.launch_id, within=_QUERY_SECONDS) if session else "never begun",
            "agent": await agent.state(session.launch_id, within=_QUERY_SECONDS) if session else "never started",
            "machine": "running" if self.stack.machine_runs(GUEST) else "ended" if session else "never started",
            "packets": 0 if self.outcome.receipt is None else 1,
            "secrets_read": len(read_secrets(self.stack.serial(GUEST))),
        }
        self.telling.heading("No secret left:" if _nothing_left(self.evidence) else "SOMETHING IS WRONG:")
        self.telling.block(_evidence_text(self.evidence))


def _is_done(said: str, *, real: bool) -> bool:
    return "guest: done" in said if real else said.endswith("\n")


def _record_text(record: dict[str, Any] | None) -> str:
    """What a person wants of an audit record; `--json` has all of it."""
    if record is None:
        return "there is no such record: the owner was not asked"
    lines = [f"{record['event']}  {record['reason']}"]
    lines += [f"found:        {finding['message']} ({finding['rule']})" for finding in record.get("findings", ())]
    if explanation := record.get("explanation"):
        lines.append(f"explanation:  {explanation['sentence']}")
        if explanation.get("tried"):
            lines.append(f"              (found by search: {explanation['tried']} known neighbours were tried)")
    return "\n".join(lines)


def _nothing_left(evidence: dict[str, Any]) -> bool:
    return not evidence["packets"] and not evidence["secrets_read"] and evidence["machine"] != "running"


def _evidence_text(evidence: dict[str, Any]) -> str:
    rows = (
        ("the launch at the verifier", evidence["verifier"]),
        ("the launch at the agent", evidence["agent"]),
        ("the guest's machine", evidence["machine"]),
        ("secret packets made", evidence["packets"]),
        ("secrets that the guest read", evidence["secrets_read"]),
    )
    return "\n".join(f"{what:<27}  {value}" for what, value in rows)


def read_secrets(said: str) -> list[GuestSecret]:
    """The secrets in what a guest wrote to its serial line: `secret GUID SIZE HEX`, one a line."""
    words = [line.split() for line in console.lines(said)]
    return [
        GuestSecret(guid=line[1], size=int(line[2]), data=bytes.fromhex(line[3]))
        for line in words
        if len(line) == 4 and line[0] == "secret"
    ]
