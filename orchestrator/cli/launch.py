"""`sevattest launch`: one guest through the whole flow over both services.

Prints a line per step with its time, or with `--json` one object; nothing of what it prints is secret.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO
from uuid import UUID, uuid4

from common.command import clean, complain
from common.errors import InvalidInput, Reason, SevattestError, exit_code
from common.ids import canonical_uuid
from orchestrator.cli.receipt import readable
from orchestrator.flow import Launch, Order, Outcome, Step, StepResult

_WIDTH = max(map(len, Step))
_ENDING = (signal.SIGTERM, signal.SIGHUP)  # beside Ctrl-C, which asyncio sees to


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `sevattest launch`."""
    parser.add_argument("guest", metavar="GUEST", help="the guest's name in the agent's configuration")
    parser.add_argument("--workload", required=True, metavar="NAME", help="the workload's name at the verifier")
    parser.add_argument("--grant", metavar="NAME", help="the grant to spend, where there is more than one")
    parser.add_argument("--agent", required=True, metavar="HOST:PORT", help="the host agent")
    parser.add_argument("--verifier", required=True, metavar="HOST:PORT", help="the guest owner's verifier")
    parser.add_argument("--tls-cert", required=True, type=Path, metavar="FILE", help="the orchestrator's certificate")
    parser.add_argument("--tls-key", required=True, type=Path, metavar="FILE", help="its private key")
    parser.add_argument("--agent-ca", type=Path, metavar="FILE", help="CA of the agent (the datacenter's)")
    parser.add_argument("--verifier-ca", type=Path, metavar="FILE", help="CA of the verifier (the guest owner's)")
    parser.add_argument("--tls-ca", type=Path, metavar="FILE", help="one CA for both")
    parser.add_argument(
        "--timeout", type=_seconds, default=120.0, metavar="S", help="seconds for the whole launch (default: 120)"
    )
    parser.add_argument(
        "--request-id", type=_uuid, metavar="UUID", help="go on with the launch that this id began before"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 3600:
        raise argparse.ArgumentTypeError("must be more than 0 and at most 3600 seconds")
    return seconds


def _uuid(text: str) -> UUID:
    value = canonical_uuid(text)
    if value is None:
        raise argparse.ArgumentTypeError("must be a UUID of 36 characters in lower case")
    return value


def run(args: argparse.Namespace) -> int:
    """Launch the guest; the exit code says how it went."""
    agent_ca, verifier_ca = args.agent_ca or args.tls_ca, args.verifier_ca or args.tls_ca
    if agent_ca is None or verifier_ca is None:
        raise InvalidInput(
            Reason.INVALID_ARGUMENT,
            "the CAs of both sides are needed",
            hint="give --agent-ca and --verifier-ca, or --tls-ca where one CA signs for both",
        )
    order = Order(
        guest=args.guest,
        workload=args.workload,
        grant=args.grant,
        request_id=args.request_id or uuid4(),
        timeout=args.timeout,
    )
    received: list[signal.Signals] = []
    try:
        return asyncio.run(_run(args, order, agent_ca, verifier_ca, received))
    except (KeyboardInterrupt, asyncio.CancelledError):
        _say("sevattest: interrupted; the launch was given up", sys.stderr)
        return 128 + (received[0] if received else signal.SIGINT)


async def _run(
    args: argparse.Namespace, order: Order, agent_ca: Path, verifier_ca: Path, received: list[signal.Signals]
) -> int:
    # Imported here, so that a mistyped command line does not pay for gRPC.
    from common.rpc.client import open_channel
    from common.rpc.tls import ClientTls
    from orchestrator.drivers.agent import AgentHost
    from orchestrator.drivers.verifier import VerifierOwner

    agent_tls = ClientTls(cert=args.tls_cert, key=args.tls_key, server_ca=agent_ca)
    verifier_tls = ClientTls(cert=args.tls_cert, key=args.tls_key, server_ca=verifier_ca)
    outcome: Outcome | None = None
    with _ended_by_signals(received):
        try:
            async with (
                open_channel(args.agent, agent_tls) as agent,
                open_channel(args.verifier, verifier_tls) as verifier,
            ):
                launch = Launch(
                    host=AgentHost(agent),
                    owner=VerifierOwner(verifier),
                    order=order,
                    on_step=_no_line if args.json else print_step,
                    on_repeat=print_repeat,
                )
                outcome = await launch.run()
        except asyncio.CancelledError:
            # A signal that came when the launch had ended, while the connections close, changes nothing about it.
            if outcome is None:
                raise
        if args.json:
            _say(json.dumps(as_json(outcome), indent=2))
        else:
            print_end(outcome)
    return 0 if outcome.error is None else exit_code(outcome.error)


@contextlib.contextmanager
def _ended_by_signals(received: list[signal.Signals]) -> Iterator[None]:
    """Let them cancel the launch as Ctrl-C does: a job that is evicted, a terminal that hangs up, leave no guest."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    if task is None:  # cannot be: there is a running loop
        raise RuntimeError

    def end(number: signal.Signals) -> None:
        received.append(number)
        task.cancel()

    # What is ignored was made so by nohup, or by a shell that runs this in the background.
    caught = [number for number in _ENDING if signal.getsignal(number) is not signal.SIG_IGN]
    for number in caught:
        loop.add_signal_handler(number, end, number)
    try:
        yield
    finally:
        for number in caught:
            loop.remove_signal_handler(number)


def _no_line(_result: StepResult, _outcome: Outcome) -> None:
    pass


def step_line(result: StepResult, outcome: Outcome) -> str:
    """One step as a line: name, time, and what is worth knowing of its answer."""
    text = f"{result.step:<{_WIDTH}} {result.seconds * 1000:8.1f} ms"
    said = "failed" if result.error else _said(result.step, outcome)
    repeats = f"  (attempt {result.attempts})" if result.attempts > 1 else ""
    return f"{text}  {clean(said)}{repeats}".rstrip()


def _said(step: Step, outcome: Outcome) -> str:
    session, measured = outcome.session, outcome.measured
    match step:
        case Step.EXPORT if outcome.evidence:
            return f"{len(outcome.evidence.chain)} bytes of certificates"
        case Step.BEGIN if session:
            return f"launch {session.launch_id}: {session.generation} platform, chip {session.fingerprint[:16]}…"
        case Step.START if session:
            return f"guest {outcome.order.guest} paused, policy 0x{session.policy:02x}"
        case Step.MEASURE if measured:
            return f"measured by firmware {measured.firmware}"
        case Step.RELEASE if session:
            return f"accepted: workload {outcome.order.workload}, version {session.workload_version}"
        case Step.INJECT:
            return "secret packet in place"
        case Step.RESUME:
            return "guest runs"
        case _:
            return ""


def _say(text: str, stream: TextIO | None = None) -> None:
    """Print, at once: a person watches.

    A reader that has gone away, or a full disk, is no reason to give a launch up, and least of all to end its guest.
    """
    stream = stream or sys.stdout
    try:
        print(text, file=stream, flush=True)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if not isinstance(error, BrokenPipeError) and stream is not sys.stderr:
            complain("sevattest", f"standard output: {error.strerror or error}")


def print_step(result: StepResult, outcome: Outcome) -> None:
    """Print a step's line."""
    _say(step_line(result, outcome))


def print_repeat(step: Step, error: SevattestError, wait: float) -> None:
    """Say on stderr that a step will be repeated, and why."""
    _say(f"sevattest: {step}: {error.message}; trying again in {wait:.2g} s", sys.stderr)


def print_end(outcome: Outcome) -> None:
    """Print how the launch ended: one line on stdout, or on stderr why not."""
    if outcome.error is None:
        launch_id = outcome.session.launch_id if outcome.session else ""
        total = sum(result.seconds for result in outcome.steps)
        _say(f"running: {outcome.order.guest}, launch {launch_id}, {total * 1000:.0f} ms")
        return
    for line in error_lines(outcome):
        _say(line, sys.stderr)


def error_lines(outcome: Outcome) -> list[str]:
    """Why the launch failed: the sentence, the reason with the audit id, and where there is more to know."""
    error = outcome.error
    if error is None:
        return []
    step = outcome.steps[-1].step if outcome.steps else "launch"
    audit_id = error.fields.get("audit_id")
    code = f"{error.reason}, audit id {audit_id}" if audit_id else str(error.reason)
    lines = [f"sevattest: {step}: {error.message} ({code})"]
    if hint := error.fields.get("hint"):
        lines.append(f"hint: {hint}")
    elif audit_id:
        lines.append("hint: the guest owner's audit log has more under that id")
    elif exit_code(error) == 4:
        lines.append(f"hint: --request-id {outcome.order.request_id} repeats this launch")
    return lines


def as_json(outcome: Outcome) -> dict[str, object]:
    """The object that `--json` prints: always with the same members, null for what was not reached."""
    session, measured, error = outcome.session, outcome.measured, outcome.error
    firmware = measured.firmware if measured else None
    return {
        "launch_id": str(session.launch_id) if session else None,
        "state": outcome.state,
        "reason": str(error.reason) if error else None,
        "message": error.message if error else None,
        "audit_id": error.fields.get("audit_id") if error else None,
        "request_id": str(outcome.order.request_id),
        "platform": {
            "generation": session.generation if session else None,
            "api": f"{firmware.api_major}.{firmware.api_minor}" if firmware else None,
            "build": firmware.build if firmware else None,
            "fingerprint": session.fingerprint if session else None,
        },
        "measurement": base64.b64encode(measured.blob).decode() if measured else None,
        "steps": [{"name": str(result.step), "ms": round(result.seconds * 1000, 3)} for result in outcome.steps],
        "receipt": readable(outcome.receipt) if outcome.receipt else None,
        "receipt_token": outcome.receipt,
    }
